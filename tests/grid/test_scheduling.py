"""In which order cells are trained, and what is noted of one when it ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bwlm.grid import scheduling
from bwlm.grid.cells import PlannedCell
from bwlm.grid.scheduling import CellStates
from bwlm.grid.training import _in_order
from bwlm.plan.spec import Cell
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.storage.objects import BucketAway
from bwlm.train.termination import Termination
from tests.analysis.storage import make_cell


def planned(storage: Path, depth: int) -> PlannedCell:
    folder = make_cell(storage, "forward", depth=depth)
    config = folder.config()
    return PlannedCell(Cell(folder.id, config.experiment, config.steps), folder, Status(), [])


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
