"""Losses by document in a parquet or CSV file, written by bwlm or by others: the columns that `stats` needs."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.paths import write_atomic
from bwlm.stats.gaps import Gap, judge, measured_pairs
from bwlm.stats.loss_table import COLUMNS, TOKEN_BYTES, checked_rows, with_counts
from bwlm.stats.table_file import Columns, read_table

_COLUMNS = Columns("losses", COLUMNS, (TOKEN_BYTES,), names=("run", "direction", "document", TOKEN_BYTES))

_LEAST = 0.05
"""Lowest plausible loss, in nats per token: no model of text is so sure."""


def gaps_from(path: Path, resamples: int = 10_000) -> tuple[list[Gap], list[str]]:
    """Return the judged gaps of a file's losses, and notes: pairs not compared, repeated rows, a loss too low.

    Raises `UserError`, which names the file, if it cannot be read, is no table of losses, or has no pair to measure.
    """
    losses = read_losses(path)
    try:
        losses = checked_rows(losses)
        measured, problems = measured_pairs(losses, resamples)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    twice = [f"{path}: {fault}" for fault in _repeated_rows(losses)]
    if not measured:
        raise UserError("; ".join([f"{path}: {problem}" for problem in problems] + twice))
    directions = losses.groupby("size")["direction"].unique()
    notes = [f"{path}: not compared: {problem}" for problem in problems]
    notes += [
        f"{path}: size {size} is not compared: it has runs of {present[0]} alone"
        for size, present in directions.items()
        if len(present) == 1
    ]
    each = losses["nll"].sum() / losses["tokens"].sum()
    if each < _LEAST:
        notes.append(f"{path}: a loss of {each:.4f} nats a token in all: nll must be a document's sum, not its mean")
    return judge(measured), notes + twice


def _repeated_rows(losses: pd.DataFrame) -> list[str]:
    repeated = losses[losses.duplicated()]
    if repeated.empty:
        return []
    first = repeated.iloc[0]
    return [
        f"{counted(len(repeated), 'row')} appear twice, the first of document '{first['document']}' in run "
        f"'{first['run']}': summed as windows of one document; leave copies out"
    ]


def write_losses(losses: pd.DataFrame, path: Path) -> Path:
    """Write what `gaps_from` reads, whole or not at all."""
    buffer = io.BytesIO()
    losses[with_counts(losses)].to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())
    return path


def read_losses(path: Path) -> pd.DataFrame:
    """Read the columns `COLUMNS`, and `TOKEN_BYTES` if there, from a .parquet or .csv file: see `read_table`."""
    return read_table(path, _COLUMNS)
