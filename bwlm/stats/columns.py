"""Columns that tables of losses and of scores share: names, directions, seeds and sizes, and their checks.

`rows` is what a message calls the table: `the losses`, `the scores`. Errors are `UserError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bwlm.directions import DIRECTIONS
from bwlm.errors import UserError, nearest

Size = int | str
FloatArray = npt.NDArray[np.float64]


def require_columns(table: pd.DataFrame, needed: Sequence[str], rows: str) -> None:
    """Raise `UserError` that names the first column that `rows`, the table in words, lack."""
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UserError(
            f"{rows} lack column '{missing[0]}'{nearest(missing[0], map(str, table.columns))}; "
            f"needed: {', '.join(needed)}"
        )


def refuse_blanks(table: pd.DataFrame, names: Sequence[str], rows: str) -> None:
    """Raise `UserError` that names the first row without a value in one of the columns."""
    for name in names:
        blank = table[name].isna() | (stripped(table[name]) == "")
        if blank.any():
            row = int(blank.to_numpy().argmax()) + 1
            raise UserError(f"{rows}' row {row} has no {name}: fill it in or leave the row out")


def refuse_spellings(rows: pd.DataFrame, column: str) -> None:
    """Raise `UserError` for two names that differ in case alone: each would group only a part of the runs."""
    known: dict[str, str] = {}
    for name in dict.fromkeys(map(str, rows[column])):
        if (other := known.setdefault(name.casefold(), name)) != name:
            raise UserError(f"column '{column}' has both '{other}' and '{name}': write one name one way")


def stripped(names: pd.Series[Any]) -> pd.Series[str]:
    """Return names as text without blanks around them."""
    if isinstance(names.dtype, pd.StringDtype) or pd.api.types.is_integer_dtype(names.dtype):
        # of one type, so that equal names are one name; objects may hold 1 and 1.0, which are equal and two names
        places, values = pd.factorize(names, use_na_sentinel=False)
        texts = np.array([str(value).strip() for value in values], dtype=object)
        return pd.Series(texts[places], index=names.index, dtype=object)
    return names.astype(object).map(lambda name: str(name).strip())


def plain_directions(names: pd.Series[Any]) -> list[str]:
    """Return names of directions without blanks; those that bwlm knows in lower case."""
    return [name.lower() if name.lower() in DIRECTIONS else name for name in stripped(names)]


def whole_seeds(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Return the seeds. Raises `UserError`, which names the run, for one that is no whole number."""
    seeds = pd.to_numeric(table["seed"], errors="coerce")
    values = seeds.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(values) | (values != np.rint(values))
    if wrong.any():
        row = table.iloc[int(wrong.argmax())]
        raise UserError(f"seed of run '{row['run']}' is {row['seed']}: seeds must be whole numbers")
    return seeds.to_numpy(dtype=np.int64)


def plain_size(size: object) -> Size:
    """Return a size as an int if it is a whole number, else as text."""
    if isinstance(size, int | float | np.integer | np.floating) and float(size).is_integer():
        return int(size)
    return str(size).strip()
