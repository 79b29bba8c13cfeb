"""Trains one run in so many processes; all of them are killed at a step, if one is given.

python -m tests.train.worlds STORAGE ID WORLD [STEP]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bwlm.record.experiment import ExperimentFolder
from bwlm.text.batches import Batch, DirectedPlan
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession

LIMIT = timedelta(seconds=60)
"""A rank that waits for another one gives up after this"""


def train(rank: int, world: int, folder: ExperimentFolder, store: Path, deadly: int | None) -> None:
    def stream(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            if step == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            yield plan.batch(step)

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT)
    assert run_phase(folder, LocalSession(rank, world), stream).state == "finished"


def main(folder: ExperimentFolder, world: int, deadly: int | None) -> None:
    store = folder.path.parent / f"store-{os.getpid()}"
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                train(rank, world, folder, store, deadly)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    # ranks of a killed one may fail on the lost connection before they reach the deadly step themselves
    assert ended == [0] * world if deadly is None else -signal.SIGKILL in ended, ended


if __name__ == "__main__":
    step = int(sys.argv[4]) if len(sys.argv) > 4 else None
    main(ExperimentFolder(Path(sys.argv[1]), sys.argv[2]), int(sys.argv[3]), step)
