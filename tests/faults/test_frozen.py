"""A process that trains is frozen, another takes its run over and finishes it: the first wakes and writes nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bwlm.record.checkpoint import checkpoint_steps, load_checkpoint
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from bwlm.record.researchlog import open_log
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.faults.checkpoints import same_bits
from tests.faults.frozen import SECONDS
from tests.runs import STEPS, NewRun, in_process, losses, make_run

REPOSITORY = Path(__file__).parents[2]
LONG = 90.0
"""Seconds after which something that is waited for will never come"""

Trainers = subprocess.Popen[str]


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    """A process that starts others, which train and freeze."""
    command = [sys.executable, "-m", "tests.faults.frozen"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def train_until_frozen(
    trainers: Trainers, folder: ExperimentFolder, moment: str, call: int = 1, world: int = 1
) -> psutil.Process:
    assert trainers.stdin is not None
    assert trainers.stdout is not None
    print(json.dumps([str(folder.path.parent), folder.id, world, moment, call]), file=trainers.stdin, flush=True)
    rank_0 = psutil.Process(int(trainers.stdout.readline()))
    wait_until(lambda: rank_0.status() == psutil.STATUS_STOPPED)
    return rank_0


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


def take_over(folder: ExperimentFolder) -> str:
    """Trains a run to its end once the lease of a frozen process has run out; gives how it ended."""
    with folder.lease(wait=0.02, seconds=SECONDS):
        return run_phase(folder, LocalSession(), in_process).state


def wake(frozen: psutil.Process, folder: ExperimentFolder, world: int = 1) -> list[str]:
    """How each of its ranks ended."""
    frozen.send_signal(signal.SIGCONT)
    says = [folder.path.with_suffix(f".rank{rank}") for rank in range(world)]
    wait_until(lambda: all(path.exists() for path in says))
    return [path.read_text() for path in says]


def content(folder: ExperimentFolder) -> dict[str, tuple[bytes, int]]:
    """Every file of a run, and when it was written."""
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder.path)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def check_same(run: ExperimentFolder, calm: ExperimentFolder) -> None:
    assert run.status().state == "finished"
    assert run.status().metrics["val_bpb"] == calm.status().metrics["val_bpb"]
    assert [entry.step for entry in read_journal(run.path)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(calm)
    assert checkpoint_steps(run.checkpoints) == checkpoint_steps(calm.checkpoints)
    one, other = (load_checkpoint(folder.checkpoints, STEPS) for folder in (run, calm))
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("model", "optimizer", "rng"))
    with open_log(run.research_log("base")) as log, open_log(calm.research_log("base")) as expected:
        for column in ("train/step", "train/loss", "validation/step"):
            assert log[column][:].tolist() == expected[column][:].tolist()


@pytest.fixture(scope="module")
def calm(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> ExperimentFolder:
    """A run that nothing happened to. Read only."""
    folder = make_run(prepared, tmp_path_factory.mktemp("calm"), "calm", checkpoint__keep=1)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    return folder


MOMENTS = [
    ("step", 6),  # it goes on training when it wakes
    ("metrics.jsonl", 1),  # it was about to begin
    ("base.h5", 1),
    ("step_000008", 1),
    ("unlink meta.json", 1),  # of step 4, which it does not keep
    ("validation.json", 1),
    ("base.h5", 2),  # its last merge
    ("status.json", 1),  # all but finished
]
"""When the first freezes; before a file takes its name the lease has been checked, and found to be its own."""


@pytest.mark.parametrize(("moment", "call"), MOMENTS)
def test_a_process_that_was_frozen_writes_nothing_when_it_wakes(
    moment: str, call: int, trainers: Trainers, calm: ExperimentFolder, new_run: NewRun
) -> None:
    run = new_run("run", checkpoint__keep=1)
    frozen = train_until_frozen(trainers, run, moment, call)
    reached = [entry.step for entry in read_journal(run.path)]
    assert take_over(run) == "finished"
    check_same(run, calm)
    before = content(run)
    (said,) = wake(frozen, run)
    assert said.startswith(f"LeaseLost: run: {socket.gethostname()}:{os.getpid()} writes to it since ")
    assert f"it was taken from this process ({socket.gethostname()}:{frozen.pid})" in said
    assert content(run) == before
    assert reached == list(range(1, len(reached) + 1))
    assert not list(run.path.rglob(".*.tmp"))


def test_the_other_ranks_of_a_process_that_was_frozen_end_with_it(trainers: Trainers, new_run: NewRun) -> None:
    run = new_run(checkpoint__every=0)
    frozen = train_until_frozen(trainers, run, "step", 6, world=2)
    assert take_over(run) == "finished"
    before = content(run)
    rank_0, rank_1 = wake(frozen, run, world=2)
    assert rank_0.startswith("LeaseLost: ")
    assert rank_1 == "failed"  # which only rank 0 would write down
    assert content(run) == before


def test_a_process_that_was_frozen_and_not_missed_goes_on(trainers: Trainers, new_run: NewRun) -> None:
    run = new_run()
    frozen = train_until_frozen(trainers, run, "step", 6)
    wait_until(lambda: run.lease_holder() is None)
    assert run.status().state == "stopped"
    assert wake(frozen, run) == ["finished"]
