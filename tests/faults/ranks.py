"""Trains runs in two processes each, to one of which something happens in the middle of a save.

    python -m tests.faults.ranks

Reads lines of JSON, [storage, id, fault, call], and answers each with an empty line when both ranks are gone. Rank 0
writes the checkpoints; before it writes its call-th file, the fault happens: rank 0 or 1 is killed, or (`disk`) the
disk is full. Each rank that ends says how in ID/rank0.txt or rank1.txt, and then waits for the file ID/go, as a worker
of a cluster outlives what it ran. The processes are forks of this one, which has imported torch already.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bwlm.paths import write_atomic
from bwlm.record import checkpoint
from bwlm.record.experiment import ExperimentFolder
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process

WORLD = 2
LIMIT = timedelta(seconds=60)
"""A rank that waits for another one gives up after this"""


def fail_at(deadly: int, happens: Callable[[], None]) -> None:
    """Calls `happens` before the file of that number is written, counted from 1 over all saves of this process."""
    real, calls = checkpoint.save_file, count(1)

    def save_file(*given: Any) -> None:
        if next(calls) == deadly:
            happens()
        real(*given)

    checkpoint.save_file = save_file


def fault(name: str, other: int) -> None:
    """What happens to rank 0 in the middle of a save."""
    if name == "disk":
        raise OSError(28, "No space left on device")
    os.kill({"0": os.getpid(), "1": other}[name], signal.SIGKILL)


def train(rank: int, folder: ExperimentFolder, store: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=LIMIT)
    try:
        outcome = run_phase(folder, LocalSession(rank, WORLD), in_process).state
    except Exception as error:  # the other rank is gone
        outcome = f"raised {error}"
    write_atomic(folder.path / f"rank{rank}.txt", outcome.encode())
    while not (folder.path / "go").exists():
        time.sleep(0.01)


def run(folder: ExperimentFolder, name: str, deadly: int) -> None:
    store = Path(tempfile.mkdtemp(dir=folder.path.parent)) / "store"
    ranks: list[int] = []
    for rank in (1, 0):
        child = os.fork()
        if child == 0:
            try:
                if rank == 0 and name:
                    fail_at(deadly, lambda: fault(name, ranks[0]))
                train(rank, folder, store)
            finally:
                os._exit(0)
        ranks.append(child)
    for child in ranks:
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        storage, experiment_id, *fault_and_call = json.loads(line)
        run(ExperimentFolder(Path(storage), experiment_id), *fault_and_call)
        print(flush=True)
