"""Axes of a grid file and the product of their values; each value knows its place in the file, for errors."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from bwlm.config import Experiment
from bwlm.errors import UserError, nearest
from bwlm.plan.inherit import check_phase_names
from bwlm.settings_file import Document, assign, field_names, holds

IN_ID = ("direction", "depth", "lr", "seed")
_AXES_BESIDES = (*IN_ID, "parent")
"""Fields outside of sections in which cells can differ."""


def with_first_values(document: Document) -> tuple[dict[str, Any], Document]:
    """Return the grid's content with its dotted axes at their first values, and the document with their places.

    A section may be complete only with these values.
    """
    content, places = copy.deepcopy(document.content), dict(document.places)
    axes = content.get("axes")
    for name, values in axes.items() if isinstance(axes, dict) else []:
        if "." in name and isinstance(values, list) and values and not holds(content, name):
            places[name] = document.place(f"axes.{name}")
            assign(content, name, values[0], places[name])
    return content, Document(document.name, content, places)


def blocks_of(document: Document) -> dict[str, dict[str, list[Any]]]:
    """Return the products of axes that make the grid, by the field that states each: `axes`, `also.0`, `also.1`, ..

    Raises `UserError` for axes that are not valid.
    """
    blocks = {"axes": document.content["axes"]}
    blocks |= {f"also.{index}": axes for index, axes in enumerate(document.content.get("also", []))}
    for where, axes in blocks.items():
        _check_axes(axes, where, document)
    return blocks


def _check_axes(
    axes: dict[str, list[Any]], where: str, document: Document, beside: Mapping[str, Any] | None = None
) -> None:
    """Raise `UserError` for an axis that is unknown, fixed elsewhere, without values, or with one value twice.

    `beside` are the settings that the axes would contradict; by default the whole file's.
    """
    section = where.rpartition("axes")[0]
    known = [name for name in field_names(Experiment) if name not in Experiment.model_fields or name in _AXES_BESIDES]
    if not axes:
        raise UserError(
            f"{document.where(where)}: needs at least one axis, for instance direction: [forward, backward]"
        )
    for name, values in axes.items():
        field = f"{where}.{name}"
        if name not in known:
            raise UserError(f"{document.where(field)}: not a setting that cells can differ in{nearest(name, known)}")
        if holds(document.content if beside is None else beside, name):
            raise UserError(
                f"{document.where(section + name)}: a fixed value here and an axis in {where}: keep one "
                f"(--set {where}.{name}=[..])"
            )
        if not values:
            raise UserError(f"{document.where(field)}: needs a list of values, for instance [1, 2]")
        repeated = [value for index, value in enumerate(values) if value in values[:index]]
        if repeated:
            raise UserError(f"{document.where(field)}: {repeated[0]!r} appears twice: keep one")


def following_phases(document: Document, first: str) -> list[str]:
    """Return the phases after the first. Raises `UserError` for one that cannot follow, or whose axes are not valid."""
    following = check_phase_names(document, first)
    for phase in following:
        if axes := axes_of(phase, document):
            _check_axes(axes, f"phases.{phase}.axes", document, document.content["phases"][phase])
    return following


def axes_of(phase: str, document: Document) -> dict[str, list[Any]]:
    """Return the axes that a phase after the first has of its own. Raises `UserError` unless they hold lists."""
    axes = (document.content["phases"][phase] or {}).get("axes", {})
    if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
        raise UserError(f"{document.where(f'phases.{phase}.axes')}: must hold lists of values, field: [1, 2]")
    return axes


def product_size(axes: dict[str, list[Any]]) -> int:
    """Return the number of cells in a product of axes."""
    return math.prod(len(values) for values in axes.values())


def family_size(following: list[str], document: Document) -> int:
    """Return the number of cells that descend from one cell of the first phase, that cell included."""
    sizes = [1, *(product_size(axes_of(phase, document)) for phase in following)]
    return sum(itertools.accumulate(sizes, operator.mul))


def choices(axes: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield a value for each axis, for every combination of values."""
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def with_chosen(
    fixed: Mapping[str, Any], chosen: dict[str, Any], where: str, document: Document
) -> tuple[dict[str, Any], Document]:
    """Return content with one value of each axis, and the document with the place where each value was given."""
    content, places = copy.deepcopy(dict(fixed)), dict(document.places)
    for name, value in chosen.items():
        places[name] = document.place(f"{where}.{name}")
        assign(content, name, value, places[name])
    return content, Document(document.place(where), content, places)
