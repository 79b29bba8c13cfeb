"""Trains runs in processes that freeze (SIGSTOP) at a chosen moment, as a suspended machine does.

    python -m tests.faults.frozen

Reads lines of JSON, [storage, id, world, moment, call], and answers each with the process id of rank 0, which holds the
run's lease. It freezes itself at the call-th moment: `step`, the end of a step, or the name of what it is about to
rename into its place or, with `unlink`, to delete. Each rank says how it ended in STORAGE/ID.rank0 or .rank1, outside
the run's folder. The processes are forks of this one, which has imported torch already.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bwlm.paths import write_atomic
from bwlm.record.experiment import ExperimentFolder
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.faults.ranks import LIMIT
from tests.runs import in_process

SECONDS = 1.0
"""How long their leases last without a sign of life"""


class Freezing(LocalSession):
    """Freezes at the end of a step, and like a worker of a cluster asks its rank to end once the lease is lost."""

    def __init__(self, folder: ExperimentFolder, rank: int, world: int, step: int) -> None:
        super().__init__(rank, world)
        self._folder, self._step = folder, step

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if self.rank == 0 and step == self._step:
            freeze()

    def stopping(self) -> bool:
        return self._folder.lost_lease


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def freeze_before(name: str, call: int, event: str) -> None:
    """Python tells of each call that changes a disk before it makes it."""
    calls = count(1)

    def hear(happens: str, given: tuple[Any, ...]) -> None:
        if happens == event and Path(str(given[event == "os.rename"])).name == name and next(calls) == call:
            freeze()

    sys.addaudithook(hear)


def train(folder: ExperimentFolder, rank: int, world: int, step: int) -> None:
    session = Freezing(folder, rank, world, step)
    try:
        if rank == 0:
            with folder.lease(wait=0.02, seconds=SECONDS):
                outcome = run_phase(folder, session, in_process).state
        else:
            outcome = run_phase(folder, session, in_process).state
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    write_atomic(folder.path.with_suffix(f".rank{rank}"), outcome.encode())


def start(folder: ExperimentFolder, world: int, moment: str, call: int) -> int:
    store = Path(tempfile.mkdtemp(dir=folder.path.parent)) / "store"
    what, _, name = moment.rpartition(" ")
    for rank in reversed(range(world)):
        child = os.fork()
        if child:
            continue
        try:
            if world > 1:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT
                )
            if rank == 0 and name != "step":
                freeze_before(name, call, "os.remove" if what == "unlink" else "os.rename")
            train(folder, rank, world, call if name == "step" else 0)
        finally:
            os._exit(0)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    for line in sys.stdin:
        storage, experiment_id, *how = json.loads(line)
        print(start(ExperimentFolder(Path(storage), experiment_id), *how), flush=True)
