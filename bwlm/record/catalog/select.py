"""Choice of runs on the command line: ids, globs over ids, or grids by name."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path

from bwlm.errors import UserError, nearest
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.grids import cells_of, grid_names
from bwlm.record.health import readable


def choose(storage: Path, names: list[str], damaged: bool = False) -> tuple[list[ExperimentFolder], list[str]]:
    """Return each experiment that is named, once, in the order of the names; and why some of them are left out.

    With `damaged` runs stay of which only config, status and link can be trusted, as in `readable`.

    Raises `UserError` for a name that is neither an experiment nor a grid, with the nearest, for a glob without a
    match, and if none can be read.
    """
    known = [folder.id for folder in list_experiments(storage)]
    ids = dict.fromkeys(run for name in names for run in named(storage, name, known))
    chosen, left_out = readable((ExperimentFolder(storage, run) for run in ids), damaged)
    if not chosen:
        raise UserError("; ".join(left_out) or f"{', '.join(names)}: holds no cell: name another grid or run")
    return chosen, left_out


def named(storage: Path, name: str, known: list[str]) -> list[str]:
    """Return the ids that a name stands for, of the `known` runs or of a grid's cells. Raises `UserError` for none."""
    if name in known:
        return [name]
    grids = grid_names(storage)
    if name in grids:
        return cells_of(storage, name)
    if not glob.has_magic(name):
        hint = nearest(name, [*known, *grids])
        raise UserError(f"{name}: no such experiment or grid in {storage}{hint}; see: bwlm runs list")
    matching = [run for run in known if fnmatch.fnmatchcase(run, name)]
    if not matching:
        raise UserError(f"{name}: no experiment in {storage} matches; see: bwlm runs list")
    return matching


def shortest_names(storage: Path, ids: list[str]) -> list[str]:
    """Return what a person would type for these experiments: a glob over seeds where it matches no other."""
    known, wanted = [folder.id for folder in list_experiments(storage)], set(ids)
    globs = {run: without_seed(run) for run in ids}
    exact = {name for name in globs.values() if set(fnmatch.filter(known, name)) <= wanted}
    return list(dict.fromkeys(globs[run] if globs[run] in exact else run for run in ids))


def without_seed(run: str) -> str:
    """Return an id with a glob in the place of its seed."""
    return re.sub(r"(_s|_seed)\d+(?=[_-]|$)", r"\1*", run)


def begun(folders: list[ExperimentFolder], left_out: list[str]) -> tuple[list[ExperimentFolder], list[str]]:
    """Return the runs that have done a step, and a note on each run that has not ended well.

    `left_out` are such notes on other runs. Raises `UserError` if no run has done a step.
    """
    states = {folder.id: folder.status() for folder in folders}
    notes = left_out + [
        f"{folder.id} is {status.state}: analysed up to step {status.step:,}"
        for folder in folders
        if (status := states[folder.id]).state != "finished" and status.step
    ]
    waiting = [run for run, status in states.items() if not status.step]
    if waiting:
        notes.append(f"not begun, and left out: {', '.join(waiting)}")
    if len(waiting) == len(folders):
        raise UserError(f"{', '.join(waiting)}: has not begun, so there is nothing to analyse: train it first")
    return [folder for folder in folders if states[folder.id].step], notes
