"""Table of losses for statistics: its checks, and its runs by size, direction and seed.

A row per run and document (or per window of a document), with the columns `COLUMNS`; nll in nats, summed over the text
tokens. Errors are `UserError` and name the row, run or document at fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

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

COLUMNS: Final = ("run", "direction", "seed", "size", "document", "nll", "tokens", "bytes")
TOKEN_BYTES: Final = "token_bytes"
"""Optional column: digest of the table of bytes per token by which a run's bytes are counted; empty: unknown."""
_CELL: Final = ["size", "direction", "seed"]
_HAS_COMMA: Final = re.compile(r"[-+]?[0-9.]*,[0-9.,]*(?:[eE][-+]?[0-9]+)?")
_LARGEST: Final = 1e15  # largest value of a row; above it doubles do not hold every whole number


@dataclass(frozen=True, eq=False)
class LossRun:
    """Losses of one run by document, sorted by document id."""

    name: str
    documents: list[str]
    nll_d: FloatArray
    tokens_d: FloatArray
    bytes_d: FloatArray


LossRuns = dict[Size, dict[str, dict[int, LossRun]]]  # by size, direction, seed


def loss_runs(losses: pd.DataFrame) -> LossRuns:
    """Check the table, sum the windows of each document, and return its runs.

    Raises `UserError` if two runs share a size, direction and seed, if runs of one size count bytes by other tables, if
    a document has no text, or if a run's losses do not sum to more than 0.
    """
    rows = checked_rows(losses)
    _refuse_other_byte_counts(rows)
    _refuse_two_runs_in_a_cell(rows)
    summed = rows.groupby([*_CELL, "run", "document"], sort=False)[["nll", "tokens", "bytes"]].sum()
    summed = summed.reset_index().sort_values("document", ignore_index=True)
    _refuse_empty_documents(summed)
    column = {str(name): summed[name].to_numpy() for name in summed.columns}
    runs: LossRuns = {}
    for of_run in summed.groupby(_CELL, sort=False).indices.values():
        size, direction, seed, name = (column[key][of_run[0]] for key in (*_CELL, "run"))
        run = LossRun(
            name, list(column["document"][of_run]), *(column[key][of_run] for key in ("nll", "tokens", "bytes"))
        )
        if run.nll_d.sum() <= 0:
            raise UserError(f"nll of run '{name}' does not sum to a positive loss: it must be -log p, in nats")
        runs.setdefault(plain_size(size), {}).setdefault(direction, {})[int(seed)] = run
    return runs


def checked_rows(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the table with plain types.

    Names and document ids become text without blanks around it, and directions that bwlm knows lower case. Losses and
    counts are finite, not negative, at most 1e15, in double precision; seeds are whole numbers.
    """
    require_columns(losses, COLUMNS, "the losses")
    if losses.empty:
        raise UserError("the losses hold no rows: give a row for each run and document")
    refuse_blanks(losses, ("run", "direction", "seed", "size", "document"), "the losses")
    rows = pd.DataFrame(
        {
            "run": stripped(losses["run"]).to_numpy(),
            "direction": plain_directions(losses["direction"]),
            "seed": whole_seeds(losses),
            "size": [plain_size(size) for size in losses["size"]],
            "document": stripped(losses["document"]).to_numpy(),
        }
        | {name: _finite(losses, name) for name in ("nll", "tokens", "bytes")}
    )
    for name in ("direction", "size"):
        refuse_spellings(rows, name)
    if TOKEN_BYTES in losses.columns:
        rows[TOKEN_BYTES] = losses[TOKEN_BYTES].fillna("").to_numpy()
    return rows


def _finite(losses: pd.DataFrame, name: str) -> FloatArray:
    values = pd.to_numeric(losses[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    mend = "evaluate that run again or leave it out"
    log_p = f"{name} is -log p: turn the sign of what is log p" if name == "nll" else mend
    faults = {
        ("not a finite number", mend): ~np.isfinite(values),
        ("which is negative", log_p): values < 0,
        ("more than any text can have", mend): values > _LARGEST,
    }
    for (fault, advice), wrong in faults.items():
        if wrong.any():
            place = int(wrong.argmax())
            row = losses.iloc[place]
            if _HAS_COMMA.fullmatch(text := str(row[name]).strip()):
                fault, advice = "which has a comma", "write numbers without commas, with a point before decimals"
            raise UserError(
                f"row {place + 1}: {name} of document '{row['document']}' in run '{row['run']}' is {text}, {fault}: "
                f"{advice}"
            )
    return values


def with_counts(losses: pd.DataFrame) -> list[str]:
    """Return the columns that statistics take: `COLUMNS`, and `TOKEN_BYTES` if the table has it."""
    return [*COLUMNS, *([TOKEN_BYTES] if TOKEN_BYTES in losses.columns else [])]


def _refuse_other_byte_counts(losses: pd.DataFrame) -> None:
    """Raise `UserError` if runs of one size count the bytes of tokens by other tables: bpb would not compare."""
    if TOKEN_BYTES not in losses.columns:
        return
    known = losses[losses[TOKEN_BYTES].ne("")]
    for size, of_size in known.groupby("size", sort=False):
        first = of_size.drop_duplicates(TOKEN_BYTES)
        if len(first) > 1:
            (one, counts), (other, others) = first[["run", TOKEN_BYTES]].head(2).itertuples(index=False)
            raise UserError(
                f"runs '{one}' and '{other}' of size {size} count the bytes of tokens by other tables (token_bytes "
                f"{counts} and {others}): evaluate both again with one version, or leave one out"
            )


def _refuse_two_runs_in_a_cell(rows: pd.DataFrame) -> None:
    cells = rows[[*_CELL, "run"]].drop_duplicates()
    clashes = cells[cells.duplicated(_CELL, keep=False)]
    if not clashes.empty:
        first = clashes.iloc[0]
        same = (clashes[_CELL] == first[_CELL]).all(axis=1)
        raise UserError(
            f"direction {first['direction']}, seed {first['seed']}, size {first['size']} has several runs: "
            f"{listed(clashes['run'][same])}; keep one of them"
        )


def _refuse_empty_documents(summed: pd.DataFrame) -> None:
    for name in ("tokens", "bytes"):
        empty = summed[summed[name] <= 0]
        if not empty.empty:
            first = empty.sort_values(["run", "document"]).iloc[0]
            raise UserError(
                f"document '{first['document']}' in run '{first['run']}' has {first[name]:g} {name} in all: "
                "leave out documents without text"
            )
