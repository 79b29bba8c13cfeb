"""Table of scores for statistics: its checks, and its runs by task, arm and seed.

A row per run and item, with the columns `COLUMNS` and any of `OPTIONAL`. An arm is a direction, or any label of models
that differ in their seeds alone. Errors are `UserError` and name the row, run or item at fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from bwlm.errors import UserError
from bwlm.format import listed
from bwlm.stats.columns import (
    FloatArray,
    Size,
    plain_directions,
    plain_size,
    refuse_blanks,
    refuse_spellings,
    require_columns,
    stripped,
    whole_seeds,
)

COLUMNS: Final = ("run", "direction", "seed", "task", "item", "correct")
OPTIONAL: Final = ("size", "rule", "reading", "form", "chance", "digest")
"""Optional columns: an empty `size`, `rule`, `reading` or `form` is a value like others; `digest` tells an item's
content, so that two items under one name are not taken for one."""
NAMES: Final = ("run", "direction", "task", "item", "rule", "reading", "form", "digest")
"""Columns of text, whatever it looks like."""
_SETTING: Final = ["task", "size", "rule", "reading", "form"]
_CELL: Final = [*_SETTING, "direction", "seed"]


class Setting(NamedTuple):
    """Task, and what else arms must share to be compared."""

    task: str
    size: Size = ""
    rule: str = ""
    reading: str = ""
    form: str = ""

    def __str__(self) -> str:
        """Return the filled parts in words: `arc_easy, size 4, rule acc`."""
        rest = [f"{name} {value}" for name, value in zip(self._fields[1:], self[1:], strict=True) if value != ""]
        return ", ".join([self.task, *rest])


@dataclass(frozen=True, eq=False)
class ScoreRun:
    """Scores of one run on one task by item, sorted by item id."""

    name: str
    items: list[str]
    digests: list[str]
    score_i: FloatArray
    chance: float | None
    """Mean score of a guess; None if the table does not say."""


ScoreRuns = dict[Setting, dict[str, dict[int, ScoreRun]]]  # by setting, direction, seed


def score_runs(rows: pd.DataFrame) -> ScoreRuns:
    """Return the runs of rows that `checked_scores` returned, of one table or of several together.

    Raises `UserError` if two runs share a setting, direction and seed, if one run has two of these, or an item twice.
    """
    for name in ("direction", *_SETTING):
        refuse_spellings(rows, name)
    _refuse_two_runs_in_a_cell(rows)
    _refuse_runs_in_two_cells(rows)
    _refuse_items_twice(rows, are_of_one_table=False)
    ordered = rows.sort_values("item", ignore_index=True, kind="stable")
    column = {str(name): ordered[name].to_numpy() for name in ordered.columns}
    runs: ScoreRuns = {}
    for of_run in ordered.groupby(_CELL, sort=False).indices.values():
        first = {name: column[name][of_run[0]] for name in (*_CELL, "run")}
        chance = float(column["chance"][of_run].mean())
        run = ScoreRun(
            name=first["run"],
            items=list(column["item"][of_run]),
            digests=list(column["digest"][of_run]),
            score_i=column["correct"][of_run],
            chance=None if math.isnan(chance) else chance,
        )
        runs.setdefault(_setting(first), {}).setdefault(first["direction"], {})[int(first["seed"])] = run
    return runs


def checked_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with plain types and all optional columns.

    Names become text without blanks around it, and directions that bwlm knows lower case. Scores are numbers in 0..1,
    or not finite: an arm with such a score is refused by name later, and hides no other. Raises `UserError`, which
    names the row and column, for any other value.
    """
    require_columns(scores, COLUMNS, "the scores")
    if scores.empty:
        raise UserError("the scores hold no rows: give a row for each run and item")
    refuse_blanks(scores, COLUMNS[:-1], "the scores")
    rows = pd.DataFrame(
        {name: stripped(scores[name]).to_numpy() for name in ("run", "task", "item")}
        | {"direction": plain_directions(scores["direction"]), "seed": whole_seeds(scores)}
        | {name: _text(scores, name) for name in ("rule", "reading", "form", "digest")}
        | {"size": _sizes(scores), "correct": _shares(scores, "correct"), "chance": _shares(scores, "chance")}
    )
    _refuse_items_twice(rows, are_of_one_table=True)
    return rows


def _setting(row: Mapping[str, Any] | pd.Series[Any]) -> Setting:
    return Setting(*(row[name] for name in _SETTING))


def _text(scores: pd.DataFrame, name: str) -> list[str]:
    if name not in scores.columns:
        return [""] * len(scores)
    return ["" if pd.isna(value) else str(value).strip() for value in scores[name]]


def _sizes(scores: pd.DataFrame) -> list[Size]:
    if "size" not in scores.columns:
        return [""] * len(scores)
    return ["" if pd.isna(size) else plain_size(size) for size in scores["size"]]


def _shares(scores: pd.DataFrame, name: str) -> FloatArray:
    """Return a column of numbers in 0..1; NaN where it is missing, empty or not finite."""
    if name not in scores.columns:
        return np.full(len(scores), np.nan)
    values = pd.to_numeric(_zero_or_one(scores[name]), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    is_missing = scores[name].isna() | (stripped(scores[name]).str.lower() == "nan")
    unread = np.isnan(values) & ~is_missing.to_numpy()
    outside = np.isfinite(values) & ((values < 0) | (values > 1))
    for wrong, fault in ((unread, "not a number"), (outside, "outside 0..1")):
        if wrong.any():
            place = int(wrong.argmax())
            row = scores.iloc[place]
            raise UserError(
                f"row {place + 1}: {name} of item '{row['item']}' in run '{row['run']}' is {row[name]}, {fault}: "
                f"{_MEND[name]}"
            )
    return np.where(np.isfinite(values), values, np.nan)


_MEND = {
    "correct": "write 1 for a right answer, 0 for a wrong one, and a share for a tie",
    "chance": "write the share of right answers of a guess, such as 0.25, or leave it empty",
}


def _zero_or_one(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column with True and False, also as text, as 1 and 0."""
    words = {"true": 1, "false": 0}
    return column.astype(object).map(lambda value: words.get(str(value).strip().lower(), value))


def _refuse_items_twice(rows: pd.DataFrame, are_of_one_table: bool) -> None:
    twice = rows.duplicated([*_CELL, "run", "item"]).to_numpy()
    if twice.any():
        place = int(twice.argmax())
        row = rows.iloc[place]
        at = f"row {place + 1}: " if are_of_one_table else ""
        raise UserError(f"{at}item '{row['item']}' of {_setting(row)} stands in run '{row['run']}' twice: keep one row")


def _refuse_two_runs_in_a_cell(rows: pd.DataFrame) -> None:
    cells = rows[[*_CELL, "run"]].drop_duplicates()
    clashes = cells[cells.duplicated(_CELL, keep=False)]
    if not clashes.empty:
        first = clashes.iloc[0]
        same = (clashes[_CELL] == first[_CELL]).all(axis=1)
        raise UserError(
            f"direction {first['direction']}, seed {first['seed']} has several runs on {_setting(first)}: "
            f"{listed(clashes['run'][same])}; keep one of them"
        )


def _refuse_runs_in_two_cells(rows: pd.DataFrame) -> None:
    """Raise `UserError` for a run with two directions, seeds or sizes: it would be compared with itself."""
    for name in ("direction", "seed", "size"):
        values = rows[["run", name]].drop_duplicates()
        several = values[values.duplicated("run", keep=False)]
        if not several.empty:
            run = several.iloc[0]["run"]
            found = listed(several[name][several["run"] == run])
            raise UserError(f"run '{run}' has several {name}s: {found}; give each model a name of its own")
