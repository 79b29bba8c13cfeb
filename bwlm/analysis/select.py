"""Which runs an analysis is about: ids, globs over ids, or grids by name."""

from __future__ import annotations

import fnmatch
import glob
from pathlib import Path

from bwlm.errors import UserError, nearest
from bwlm.paths import read_json
from bwlm.record.lineage import ExperimentFolder, list_experiments


def choose(storage: Path, names: list[str]) -> list[ExperimentFolder]:
    """Each experiment that is named, once, in the order of the names.

    Raises `UserError` for a name that is neither an experiment nor a grid, with the nearest, and for a glob without a
    match.
    """
    known = {folder.id: folder for folder in list_experiments(storage)}
    grids = {path.parent.name: path for path in (storage / "grids").glob("*/grid.json")}
    chosen: dict[str, ExperimentFolder] = {}
    for name in names:
        found = _named(name, known, grids)
        if not found:
            raise UserError(f"{name}: no experiment in {storage} matches; see: bwlm runs list")
        if found == [name] and name not in known:
            told = nearest(name, [*known, *grids])
            raise UserError(f"{name}: no such experiment or grid in {storage}{told}; see: bwlm runs list")
        chosen |= {run: known[run] for run in found if run in known}
    return list(chosen.values())


def _named(name: str, known: dict[str, ExperimentFolder], grids: dict[str, Path]) -> list[str]:
    if name in known:
        return [name]
    if name in grids:
        try:
            return [run for run in read_json(grids[name])["cells"] if run in known]
        except (KeyError, TypeError):
            raise UserError(f"{grids[name]}: not a grid's list of cells; run the grid's command again") from None
    if glob.has_magic(name):
        return [run for run in known if fnmatch.fnmatchcase(run, name)]
    return [name]


def begun(folders: list[ExperimentFolder]) -> tuple[list[ExperimentFolder], list[str]]:
    """The runs that have done a step, and what a reader must know of those that have not ended well.

    Raises `UserError` if none has.
    """
    states = {folder.id: folder.status() for folder in folders}
    notes = [
        f"{folder.id} is {status.state}: analysed up to step {status.step:,}"
        for folder in folders
        if (status := states[folder.id]).state != "finished" and status.step
    ]
    waiting = [run for run, status in states.items() if not status.step]
    if waiting:
        notes.append(f"not begun, and left out: {', '.join(waiting)}")
    if len(waiting) == len(folders):
        raise UserError(f"{', '.join(waiting)}: not begun: there is nothing to analyse yet")
    return [folder for folder in folders if states[folder.id].step], notes
