"""Trains a run of a storage in a bucket, in a process that ends or freezes once a checkpoint of it is in the bucket.

    python -m tests.storage.trainer RUN_FOLDER STEP kill|stop|go LEASE_SECONDS

At the end of STEP it waits until its newest checkpoint is in the bucket, and then gets SIGKILL or SIGSTOP. It prints
how the run has ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bwlm.record.bucket import bring_run
from bwlm.record.experiment import ExperimentFolder
from bwlm.storage.folder import SharedFolder
from bwlm.storage.head import read_head
from bwlm.storage.opened import shared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process

EVERY = 4
"""Steps between checkpoints, as in the tests' runs."""
ENDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def pushed_steps(folder: SharedFolder) -> set[int]:
    files = read_head(folder.bucket, folder.name)[0].files
    return {int(path.split("/")[1][5:]) for path in files if path.endswith("/meta.json")}


class Doomed(LocalSession):
    """Session whose process ends or freezes at the end of a step."""

    def __init__(self, folder: ExperimentFolder, step: int, end: str) -> None:
        super().__init__()
        self._folder, self._step, self._end = folder, step, end

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if step == self._step and self._end in ENDS:
            in_bucket = shared(self._folder.path)
            assert in_bucket is not None
            while step - step % EVERY not in pushed_steps(in_bucket):
                time.sleep(0.05)
            os.kill(os.getpid(), ENDS[self._end])

    def stopping(self) -> bool:
        return self._folder.lost_lease


def train(path: Path, step: int = 0, end: str = "go", seconds: float = 60.0) -> str:
    folder = ExperimentFolder(path.parent, path.name)
    bring_run(folder)
    with folder.lease(wait=0.1, seconds=seconds):
        return run_phase(folder, Doomed(folder, step, end), in_process).state


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        print(train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
