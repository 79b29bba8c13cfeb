"""Filter and order of a list of runs: `--where 'val_bpb<2.5' --sort -step`."""

from __future__ import annotations

import fnmatch
import glob
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

from bwlm.directions import DIRECTIONS
from bwlm.errors import UserError, nearest
from bwlm.phases import PHASES, order
from bwlm.record.catalog.rows import FIGURES, CellRow
from bwlm.record.experiment import State

WORDS = ("id", "phase", "direction", "parent", "state")
NUMBERS = ("depth", "lr", "seed", "step")
METRICS = ("val_bpb", "val_bpb_forward", "val_bpb_backward", "val_loss", "val_reward", "tokens_per_second")
"""Metrics that are known also if no run has them yet."""

_METRIC_OF = {heading: metric for heading, (metric, _) in FIGURES.items()} | {"reward": "val_reward"}
"""Metrics by the headings that lists of runs give them."""

_ONE_OF = {"phase": tuple(PHASES), "direction": tuple(DIRECTIONS), "state": get_args(State)}
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt
}  # fmt: skip
_CONDITION = re.compile(rf"\s*([^\s=!<>]+)\s*(==|{'|'.join(_OPERATORS)})\s*(.*?)\s*")


@dataclass(frozen=True)
class Condition:
    """Condition `FIELD=VALUE` with = != < > <= >=; words take = and != alone, and their values are globs."""

    field: str
    sign: str
    value: str | float

    def holds(self, cell: CellRow) -> bool:
        """Return whether a run meets the condition."""
        value = value_of(cell, self.field)
        if isinstance(self.value, float):  # a figure that was not measured meets no condition, not even !=
            return isinstance(value, int | float) and _OPERATORS[self.sign](value, self.value)
        matches = value == self.value if value in (None, "") else fnmatch.fnmatchcase(str(value), self.value)
        return matches == (self.sign == "=")


def value_of(cell: CellRow, field: str) -> str | float | None:
    """Return the value of a field; None if the run has no such figure, '' if it has no parent."""
    if field == "parent":
        return cell.parent or ""
    if field in WORDS or field in NUMBERS:
        value: str | float = getattr(cell, field)
        return value
    return cell.metrics.get(_METRIC_OF.get(field, field))


def choose_cells(cells: list[CellRow], where: Iterable[str], sort: str | None) -> list[CellRow]:
    """Return the runs that meet every condition; by id, or by the field `sort`, from the highest if it begins with `-`.

    Runs without the figure come last. Raises `UserError` for an unknown field and for a condition that cannot be
    read.
    """
    metrics = {*METRICS, *(name for cell in cells for name in cell.metrics)}
    conditions = [parse(text, metrics) for text in where]
    kept = [cell for cell in cells if all(condition.holds(cell) for condition in conditions)]
    kept.sort(key=lambda cell: cell.id)
    if sort is None:
        return kept
    field = sort.removeprefix("-")
    _check_field("--sort", field, metrics)
    ranks = {cell.id: _rank(cell, field) for cell in kept}
    have = [cell for cell in kept if ranks[cell.id] is not None]
    have.sort(key=lambda cell: ranks[cell.id] or 0, reverse=sort.startswith("-"))
    return have + [cell for cell in kept if ranks[cell.id] is None]


def _rank(cell: CellRow, field: str) -> tuple[float, str] | None:
    """Return the key by which runs are sorted: phases in their order, other words by the alphabet; None comes last."""
    value = value_of(cell, field)
    if value in (None, ""):
        return None
    if isinstance(value, str):
        return float(order(value)) if field == "phase" else 0.0, value
    assert value is not None
    return value, ""


def parse(text: str, metrics: Iterable[str]) -> Condition:
    """Return the condition that a text states. Raises `UserError` that says what is wrong with it."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UserError(f"--where {text}: write it as FIELD=VALUE, or with != < > <= >=")
    field, sign, value = match[1], match[2].replace("==", "="), match[3]
    _check_field("--where", field, metrics)
    if field not in WORDS:
        return Condition(field, sign, _number(text, value))
    if sign not in ("=", "!="):
        raise UserError(f"--where {text}: {field} holds words, not numbers: compare it with = or !=")
    known = _ONE_OF.get(field)
    if known and not glob.has_magic(value) and value not in known:
        raise UserError(f"--where {text}: no such {field}{nearest(value, known)}: use one of {', '.join(known)}")
    return Condition(field, sign, value)


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        shown = repr(value) if value else "nothing"
        raise UserError(f"--where {text}: {shown} is not a number: compare this field with a number")
    return number


def _check_field(option: str, field: str, metrics: Iterable[str]) -> None:
    known = [*WORDS, *NUMBERS, *_METRIC_OF, *sorted(metrics)]
    if field not in known:
        besides = ", ".join((*WORDS, *NUMBERS))
        raise UserError(f"{option} {field}: unknown field{nearest(field, known)}: use one of {besides}, or a metric")
