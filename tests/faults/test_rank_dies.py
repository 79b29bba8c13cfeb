"""Two ranks, real processes: one of them ends in the middle of a save, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bwlm.record.checkpoint import checkpoint_steps, load_checkpoint
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from tests.faults.checkpoints import names, same_bits
from tests.runs import STEPS, NewRun, losses

REPOSITORY = Path(__file__).parents[2]
LONG = 90.0
"""Seconds after which something that is waited for will never come"""


Ranks = subprocess.Popen[str]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A process that trains runs in two others."""
    command = [sys.executable, "-m", "tests.faults.ranks"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def launch(
    ranks: Ranks, folder: ExperimentFolder, ending: tuple[int, ...], fault: str = "", call: int = 0
) -> list[str]:
    """Trains a run until the ranks `ending` say how they ended, and both processes are gone."""
    says = [folder.path / f"rank{rank}.txt" for rank in (0, 1)]
    for path in (*says, folder.path / "go"):
        path.unlink(missing_ok=True)
    assert ranks.stdin is not None
    assert ranks.stdout is not None
    print(json.dumps([str(folder.path.parent), folder.id, fault, call]), file=ranks.stdin, flush=True)
    limit = time.monotonic() + LONG
    while not all(says[rank].exists() for rank in ending):
        assert ranks.poll() is None
        assert time.monotonic() < limit, "a rank hangs"
        time.sleep(0.01)
    (folder.path / "go").touch()
    assert ranks.stdout.readline() == "\n"
    assert [path.exists() for path in says] == [rank in ending for rank in (0, 1)]
    return [says[rank].read_text() for rank in ending]


def finish(ranks: Ranks, folder: ExperimentFolder) -> None:
    assert launch(ranks, folder, (0, 1)) == ["finished", "finished"]


def check_same(run: ExperimentFolder, calm: ExperimentFolder) -> None:
    assert [entry.step for entry in read_journal(run.path)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(calm)
    one, other = (load_checkpoint(folder.checkpoints, STEPS) for folder in (run, calm))
    assert one.rng.keys() == {"rank0/cpu", "rank1/cpu"}
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("model", "optimizer", "rng"))


def test_a_rank_that_is_killed_in_the_middle_of_a_save_costs_no_more_than_the_steps_since_the_last(
    ranks: Ranks, new_run: NewRun
) -> None:
    """Files 4 to 6 are the second checkpoint's, of step 8."""
    calm = new_run("calm")
    finish(ranks, calm)
    for dead, call in ((0, 2), (0, 5), (1, 5)):
        run = new_run(f"rank{dead}-file{call}")
        (survivor,) = launch(ranks, run, (1 - dead,), str(dead), call)
        assert survivor.startswith("raised")
        listed = checkpoint_steps(run.checkpoints)
        if dead == 0:
            assert listed == ([4] if call > 3 else [])
            assert any(name.startswith(".step_") for name in names(run.checkpoints))  # the partial one
        else:
            assert listed == [4, 8]  # the one who writes lives on
        for step in listed:
            load_checkpoint(run.checkpoints, step)
        finish(ranks, run)
        check_same(run, calm)
        assert names(run.checkpoints) == ["step_000004", "step_000008", "step_000012"]


@pytest.mark.parametrize(("call", "left"), [(1, []), (8, ["step_000004", "step_000008"])])
def test_where_rank_0_cannot_save_all_ranks_end(call: int, left: list[str], ranks: Ranks, new_run: NewRun) -> None:
    """The others would otherwise wait in the next step for one who does not come, until their patience ends."""
    run = new_run()
    assert launch(ranks, run, (0, 1), "disk", call) == ["failed", "failed"]
    assert "No space left" in run.status().reason
    assert names(run.checkpoints) == left
