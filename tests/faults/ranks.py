"""Trains one run in two processes, and ends one of them in the middle of a save.

    python -m tests.faults.ranks STORAGE ID FAULT CALL

Rank 0 writes the checkpoints. Before it writes its CALL-th file, the FAULT happens: rank 0 or 1 is killed, or (`disk`)
the disk is full. Each rank that ends says how in ID/rank0.txt or rank1.txt, and then waits until standard input is
closed, as a worker of a cluster outlives what it ran.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bwlm.paths import write_atomic
from bwlm.record import checkpoint
from bwlm.record.lineage import ExperimentFolder
from bwlm.train.base import run_base
from bwlm.train.session import AloneSession
from tests.train.runs import in_process

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
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=LIMIT)
    try:
        outcome = run_base(folder, AloneSession(rank, WORLD), in_process).state
    except Exception as error:  # the other rank is gone
        outcome = f"raised {error}"
    write_atomic(folder.path / f"rank{rank}.txt", outcome.encode())
    sys.stdin.read()


def main(folder: ExperimentFolder, name: str, deadly: int) -> None:
    store = folder.path.parent / f"store-{os.getpid()}"
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
    main(ExperimentFolder(Path(sys.argv[1]), sys.argv[2]), sys.argv[3], int(sys.argv[4]))
