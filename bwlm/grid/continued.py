"""Cells that the scheduler stopped early, taken up again by request and trained to their end."""

from __future__ import annotations

import fnmatch
import time
from pathlib import Path

from bwlm.errors import UserError, nearest
from bwlm.grid.cells import PlannedCell, find_cells
from bwlm.paths import write_json
from bwlm.plan.spec import Plan
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import run_command
from bwlm.storage.opened import push

_MARK = "continued.json"
"""File of a run that no scheduler stops any more."""


def is_continued(folder: ExperimentFolder) -> bool:
    """Return whether a run was asked to go on to its end after the scheduler had stopped it."""
    return (folder.path / _MARK).exists()


def choose_stopped(plan: Plan, storage: Path, names: list[str]) -> list[PlannedCell]:
    """Return the cells that ids or globs name: of a glob those that the scheduler stopped.

    Raises `UserError` for a name that stands for no such cell.
    """
    planned = {one.cell.id: one for one in find_cells(plan, storage)}
    chosen: dict[str, PlannedCell] = {}
    for name in names:
        matching = [run for run in fnmatch.filter(planned, name) if _may_continue(planned[run])]
        if not matching:
            _refuse(plan, storage, planned, name)
        chosen |= {run: planned[run] for run in matching}
    return list(chosen.values())


def _refuse(plan: Plan, storage: Path, planned: dict[str, PlannedCell], name: str) -> None:
    if name not in planned:
        raise UserError(f"{name}: the scheduler has stopped no such cell of {plan.name}{nearest(name, planned)}")
    raise UserError(
        f"{name} is {planned[name].status.state}: only cells that the scheduler stopped early are continued; "
        f"`{run_command(plan.name, storage)}` trains the others"
    )


def _may_continue(planned: PlannedCell) -> bool:
    if planned.status.state == "finished":
        return False
    return (planned.is_done and planned.status.state == "stopped") or is_continued(planned.folder)


def reopen(folder: ExperimentFolder) -> None:
    """Take back the early stop of a cell: a launch resumes it, and no scheduler stops it again.

    Raises `LateWriter` if another machine has begun to train it in a bucket.
    """
    status = folder.status()
    write_json(folder.path / _MARK, {"step": status.step, "time": time.time()})
    if status.state == "stopped":
        folder.write_status(Status())
    push(folder.path, trained=True)
