"""Cells of a grid: one of the first phase for each choice of axis values, and the phases that follow it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.paths import LONGEST_ID, check_id
from bwlm.phases import FIRST, LATER
from bwlm.plan.axes import IN_ID, axes_of, choices, with_chosen
from bwlm.plan.inherit import inherit, leaves, phase_content, with_defaults, without_mixture
from bwlm.plan.resolve import resolve_experiment, resolve_steps
from bwlm.plan.spec import Cell
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import open_finished
from bwlm.record.lineage import check_order
from bwlm.settings_file import Document

_GRID_ONLY = ("name", "axes", "also", "phases", "scheduler", "launch")


def grid_cells(blocks: dict[str, dict[str, list[Any]]], family: CellBuilder) -> Iterator[Cell]:
    """Yield the cells of a grid. Raises `UserError` if a cell is not valid, or if two have the same id."""
    document = family.document
    fixed = {name: value for name, value in document.content.items() if name not in _GRID_ONLY}
    seen: dict[str, Experiment] = {}
    for where, axes in blocks.items():
        for chosen in choices(axes):
            content, at = with_chosen(fixed, chosen, where, document)
            experiment = family.first(content, at)
            for cell in family.cells(experiment, _cell_id(experiment, chosen, document), content, at):
                if cell.id in seen:
                    raise UserError(f"{document.where(where)}: {_same_id(cell, seen[cell.id])}")
                seen[cell.id] = cell.experiment
                yield cell


def _same_id(cell: Cell, before: Experiment) -> str:
    """Return what is wrong with two cells of one id: they are the same, or values are spelled alike in their ids."""
    one, other = dict(leaves(before.model_dump())), dict(leaves(cell.experiment.model_dump()))
    field = next((field for field in one | other if one.get(field) != other.get(field)), None)
    if field is None:
        return f"cell {cell.id} appears twice: remove one"
    return (
        f"{field}: {one.get(field)!r} and {other.get(field)!r} would both be cell {cell.id}: "
        "rename one of them, or put it into a grid of its own"
    )


@dataclass(frozen=True)
class CellBuilder:
    """Builder of cells; it knows the phases that follow the first, and the storage of parents that are no cells."""

    document: Document
    following: list[str]
    storage: Path

    def first(self, content: dict[str, Any], document: Document) -> Experiment:
        """Return the experiment of the first phase; past base it inherits settings from its parent run.

        Raises `UserError` if the parent is not named, does not exist or has not finished, or if settings are not
        valid.
        """
        phase = content.get("phase", FIRST)
        if phase not in LATER:
            return resolve_experiment(without_mixture(content, phase) if self.following else content, document)
        run = content.get("parent")
        if not isinstance(run, str):
            raise UserError(f"{document.where('parent')}: missing: name the run that {phase} begins from")
        try:
            name = CheckpointName.parse(run)
            folder = open_finished(self.storage, name.run)
            parent = folder.config().experiment
            check_order(phase, name.run, parent.phase)
            if name.which:
                name.step_in(folder)
        except UserError as error:
            raise UserError(f"{document.where('parent')}: {str(error).removeprefix('parent: ')}") from None
        return resolve_experiment(inherit(with_defaults(content, phase), run, parent, document), document)

    def cells(self, first: Experiment, name: str, content: dict[str, Any], document: Document) -> Iterator[Cell]:
        """Yield the cell of an experiment and all cells that descend from it, each after its parent."""
        run = f"{name}-{first.phase}" if self.following else name
        cell = Cell(_checked(run, self.document), first, resolve_steps(first))
        yield cell
        yield from self._descendants(cell, name, "", content, document, self.following)

    def _descendants(
        self, parent: Cell, name: str, ending: str, content: dict[str, Any], document: Document, phases: list[str]
    ) -> Iterator[Cell]:
        if not phases:
            return
        phase, *following = phases
        own, at = phase_content(content, phase, Document(document.name, self.document.content, document.places))
        for chosen in choices(axes_of(phase, self.document)):
            chosen_content, place = with_chosen(own, chosen, f"phases.{phase}.axes", at)
            content_of_phase = with_defaults(chosen_content, phase)
            experiment = resolve_experiment(inherit(content_of_phase, parent.id, parent.experiment, place), place)
            longer = ending + "".join(f"_{part}" for part in _parts(chosen))
            run = _checked(re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{phase}{longer}"), self.document)
            cell = Cell(run, experiment, resolve_steps(experiment))
            yield cell
            yield from self._descendants(cell, name, longer, content, document, following)


def _cell_id(experiment: Experiment, chosen: dict[str, Any], document: Document) -> str:
    rate = f"{experiment.lr:g}" if float(f"{experiment.lr:g}") == experiment.lr else repr(experiment.lr)
    parts = [document.content["name"], experiment.direction, f"d{experiment.depth}", f"lr{rate}", f"s{experiment.seed}"]
    parts += _parts({name: value for name, value in chosen.items() if name not in IN_ID})
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def _parts(chosen: dict[str, Any]) -> list[str]:
    """Return the parts of an id that name choices on axes: the last part of each axis name, and its value."""
    return [f"{name.rpartition('.')[2]}{value}" for name, value in chosen.items()]


def _checked(run: str, document: Document) -> str:
    if len(run) > LONGEST_ID:
        raise UserError(
            f"{document.where('name')}: cell id {run!r} is longer than {LONGEST_ID} characters: "
            "give the grid a shorter name"
        )
    return check_id(run, "cell id")
