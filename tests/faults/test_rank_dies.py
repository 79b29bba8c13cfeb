"""Two ranks, real processes: one of them ends in the middle of a save, and the run goes on as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bwlm.record.checkpoint import checkpoint_steps, load_checkpoint
from bwlm.record.journal import read_journal
from bwlm.record.lineage import ExperimentFolder
from tests.faults.checkpoints import names, same_bits
from tests.faults.ranks import LIMIT
from tests.train.runs import STEPS, NewRun, losses

REPOSITORY = Path(__file__).parents[2]
LONG = 90.0
"""Seconds after which something that is waited for will never come"""


@contextmanager
def ranks(folder: ExperimentFolder, fault: str = "", call: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Both ranks of a run; at the end of the block they are told to go, and waited for."""
    for rank in (0, 1):
        said(folder, rank).unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.faults.ranks", str(folder.path.parent), folder.id, fault, str(call)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LONG) == 0


def said(folder: ExperimentFolder, rank: int) -> Path:
    return folder.path / f"rank{rank}.txt"


def outcome(folder: ExperimentFolder, rank: int, process: subprocess.Popen[bytes]) -> str:
    """How a rank ended, when it has."""
    path, limit = said(folder, rank), time.monotonic() + LONG
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < limit, f"rank {rank} hangs"
        time.sleep(0.01)
    return path.read_text()


def finish(folder: ExperimentFolder) -> None:
    with ranks(folder) as process:
        assert [outcome(folder, rank, process) for rank in (0, 1)] == ["finished", "finished"]


@pytest.fixture
def calm(new_run: NewRun) -> ExperimentFolder:
    """A run of two ranks to which nothing happened."""
    folder = new_run("calm")
    finish(folder)
    return folder


def check_same(run: ExperimentFolder, calm: ExperimentFolder) -> None:
    assert [entry.step for entry in read_journal(run.path)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(calm)
    one, other = (load_checkpoint(folder.checkpoints, STEPS) for folder in (run, calm))
    assert one.rng.keys() == {"rank0/cpu", "rank1/cpu"}
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("model", "optimizer", "rng"))


def test_a_rank_that_is_killed_in_the_middle_of_a_save_costs_no_more_than_the_steps_since_the_last(
    new_run: NewRun, calm: ExperimentFolder
) -> None:
    """Files 4 to 6 are the second checkpoint's, of step 8."""
    for dead, call in ((0, 2), (0, 5), (1, 5)):
        run = new_run(f"rank{dead}-file{call}")
        with ranks(run, str(dead), call) as process:
            assert outcome(run, 1 - dead, process).startswith("raised")
        assert not said(run, dead).exists()
        listed = checkpoint_steps(run.checkpoints)
        if dead == 0:
            assert listed == ([4] if call > 3 else [])
            assert any(name.startswith(".step_") for name in names(run.checkpoints))  # the partial one
        else:
            assert listed == [4, 8]  # the one who writes lives on
        for step in listed:
            load_checkpoint(run.checkpoints, step)
        finish(run)
        check_same(run, calm)
        assert names(run.checkpoints) == ["step_000004", "step_000008", "step_000012"]


@pytest.mark.parametrize(("call", "left"), [(1, []), (8, ["step_000004", "step_000008"])])
def test_where_rank_0_cannot_save_all_ranks_end(call: int, left: list[str], new_run: NewRun) -> None:
    """The others would otherwise wait in the next step for one who does not come."""
    run = new_run()
    with ranks(run, "disk", call) as process:
        began = time.monotonic()
        assert outcome(run, 0, process) == "failed"
        assert outcome(run, 1, process) in ("failed", "finished")  # who had no more steps did not need rank 0
        assert time.monotonic() - began < LIMIT.total_seconds()
    assert "No space left" in run.status().reason
    assert (names(run.checkpoints) if run.checkpoints.exists() else []) == left
