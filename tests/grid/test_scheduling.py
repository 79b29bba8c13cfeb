"""In which order cells are trained, and what is noted of one when it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.experiment import Trial

from bwlm.grid import scheduling
from bwlm.grid.cells import PlannedCell
from bwlm.grid.scheduling import CellScheduler, CellStates, build_scheduler
from bwlm.grid.training import _in_order
from bwlm.plan.spec import Cell, LaunchSettings, Plan, SchedulerSettings
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.storage.objects import BucketAway
from bwlm.train.termination import Termination
from tests.analysis.storage import make_cell


def planned(storage: Path, depth: int, lr: float = 1.0, steps: int | None = None) -> PlannedCell:
    folder = make_cell(storage, "forward", depth=depth, lr=lr)
    config = folder.config()
    return PlannedCell(Cell(folder.id, config.experiment, steps or config.steps), folder, Status(), [])


def test_the_longest_come_first_but_beside_another_launch_the_shortest(tmp_path: Path) -> None:
    """Two launches that took the same order would come to the same cell each time one ends."""
    cells = [planned(tmp_path, depth) for depth in (2, 4, 1, 3)]

    def order() -> list[int]:
        return [one.cell.experiment.depth for one in _in_order(cells)]

    assert order() == [4, 3, 2, 1]
    with cells[1].folder.lease():
        assert order() == [1, 2, 3, 4]
    with cells[2].folder.lease():
        assert order() == [2, 3, 4, 1]


def asha(storage: Path, *cells: PlannedCell) -> Callable[[PlannedCell, int, float], str]:
    """Return a function that tells ASHA's decision on a validation of a cell, after a step, with a loss."""
    plan = Plan("g", (), LaunchSettings(), SchedulerSettings(kind="asha"), "name: g")
    scheduler = build_scheduler(plan, list(cells), storage, Termination())
    trials = {one.cell.id: SimpleNamespace(config={"cell": one.cell.id}, trial_id=one.cell.id) for one in cells}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)

    def says(one: PlannedCell, step: int, loss: float) -> str:
        return str(scheduler.on_trial_result(None, trials[one.cell.id], {"step": step, "val_bpb_tuning": loss}))

    return says


def test_asha_stops_the_worse_rate_of_one_size(tmp_path: Path) -> None:
    better, worse, deeper = (planned(tmp_path, depth, lr, 1000) for depth, lr in ((1, 1.0), (1, 0.5), (2, 1.0)))
    says = asha(tmp_path, better, worse, deeper)
    assert [says(better, 250, 2.0), says(worse, 250, 3.0), says(deeper, 250, 3.0)] == ["CONTINUE", "STOP", "CONTINUE"]


@pytest.mark.parametrize(("steps", "every"), [(1000, 250), (400, 100)])
def test_asha_stops_no_cell_at_its_last_step(steps: int, every: int, tmp_path: Path) -> None:
    """Not at a rung of that step, nor at one that the cell has passed since its last validation."""
    first, second = (planned(tmp_path, 1, lr, steps) for lr in (1.0, 0.5))
    says = asha(tmp_path, first, second, planned(tmp_path, 2, 1.0, 10 * steps))
    for step in range(every, steps, every):  # the later one is better, so that both go on
        assert [says(first, step, 2.0), says(second, step, 1.5)] == ["CONTINUE"] * 2
    assert [says(first, steps, 1.0), says(second, steps, 1.2)] == ["CONTINUE"] * 2


@pytest.mark.parametrize(
    ("holders", "is_left"),
    [
        (["own:1", "own:2"], False),
        (["own:1", "other:2"], False),
        (["other:1", "other:2"], True),
        (["other:1", None], False),  # one has not begun
    ],
)
def test_a_launch_asks_its_own_workers_alone_to_end(
    holders: list[str | None], is_left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that another launch trains are left to it, and once they are all that is left, not waited for."""
    by_cell, asked = {f"g_{number}": holder for number, holder in enumerate(holders)}, list[str]()
    monkeypatch.setattr(ExperimentFolder, "lease_holder", lambda folder: by_cell[folder.id])
    monkeypatch.setattr(scheduling, "own_workers", lambda: {"own:1", "own:2", "own:3"})
    monkeypatch.setattr(scheduling, "ask_to_end", asked.append)
    trials = [SimpleNamespace(config={"cell": cell}, status=Trial.RUNNING) for cell in by_cell]
    controller = SimpleNamespace(get_live_trials=lambda: trials)
    with Termination() as termination:
        scheduler = CellScheduler(tmp_path, termination, grace_seconds=60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(SystemExit) if is_left else contextlib.nullcontext():
                assert scheduler.choose_trial_to_run(controller) is None
    assert sorted(asked) == [holder for holder in holders if holder and holder.startswith("own")]


class Heard:
    def __init__(self) -> None:
        self.ends: list[tuple[str, Status]] = []

    def ended(self, cell: str, status: Status) -> None:
        self.ends.append((cell, status))

    def released(self, cell: str) -> None:
        pass

    def warned(self, cell: str, warning: str) -> None:
        pass


def trial_of(folder: ExperimentFolder, error: Path | None = None) -> Any:
    return SimpleNamespace(config={"cell": folder.id}, error_file=str(error))


def test_an_end_that_cannot_be_noted_does_not_end_the_other_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: ExperimentFolder, status: Status) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, heard = make_cell(tmp_path, "forward"), Heard()
    states = CellStates(tmp_path, cast(Any, heard), Termination())
    monkeypatch.setattr(ExperimentFolder, "write_status", full)
    states._close(folder, Status(), Status("failed", "crashed", 3))
    assert heard.ends == [(folder.id, Status("failed", "crashed", 3))]
    assert f"{folder.path}: cannot be written (No space left on device): free space or make it writable" in caplog.text


def test_nothing_is_written_over_the_end_of_a_cell_that_the_bucket_cannot_tell_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker, on another machine, has finished it; the copy that lies here says that it still trains."""
    folder, heard, finished = make_cell(tmp_path, "forward"), Heard(), Status("finished", "", 12, {"val_bpb": 2.0})
    is_away = True

    def pull(path: Path) -> None:
        if is_away:
            raise BucketAway("s3://b does not answer (timed out)")
        folder.write_status(finished)

    monkeypatch.setattr(scheduling, "pull", pull)
    monkeypatch.setattr(scheduling, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(scheduling, "_PATIENCE_SECONDS", 0.1)
    folder.write_status(Status())
    states = CellStates(tmp_path, cast(Any, heard), Termination(), cast(Any, heard))
    states.on_trial_complete(1, [], trial_of(folder))
    states.on_step_end(1, [])
    states.on_experiment_end([])  # which does not wait for ever
    assert (folder.status(), heard.ends) == (Status(), [])
    assert caplog.text.count("does not answer (timed out): how cells have ended is not known until it does") == 1
    is_away = False
    states.on_experiment_end([])
    assert (folder.status(), heard.ends) == (finished, [(folder.id, finished)] * 2)


def test_a_crashed_cell_is_failed_once_no_process_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed on another node holds its lease for a minute; another launch for longer."""
    monkeypatch.setattr(scheduling, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(scheduling, "_PATIENCE_SECONDS", 0.1)
    folder, heard, error = make_cell(tmp_path, "forward"), Heard(), tmp_path / "error"
    folder.write_status(Status())
    error.write_text("Traceback:\nActorDiedError: killed for memory\n")
    states = CellStates(tmp_path, cast(Any, heard), Termination())
    with ExperimentFolder(tmp_path, folder.id).lease():
        states.on_trial_error(1, [], trial_of(folder, error))
        states.on_step_end(1, [])
        states.on_experiment_end([])  # which does not wait for ever
        assert (folder.status().state, heard.ends) == ("running", [])
    states.on_experiment_end([])
    failed = folder.status()
    assert (failed.state, failed.reason) == ("failed", "crashed, see error.txt: ActorDiedError: killed for memory")
    assert heard.ends == [(folder.id, failed)]
    assert (folder.path / "error.txt").read_text() == error.read_text()
