"""Losses by document in a parquet or CSV file, written by bwlm or by others: the columns that `stats` needs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.paths import write_atomic
from bwlm.stats.gaps import Gap, judge, measured_pairs
from bwlm.stats.loss_table import COLUMNS, TOKEN_BYTES, checked_rows, with_counts

_NAMES = ("run", "direction", "document", TOKEN_BYTES)  # text, whatever it looks like: document 007 is not document 7

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
    """Read the columns `COLUMNS`, and `TOKEN_BYTES` if there, from a .parquet or .csv file, unchecked.

    If a needed column is missing, all columns are read: `require_columns` then names the nearest. In a CSV, only an
    empty field is missing: `NA` and `null` are names like others. Raises `UserError`, which names the file, if it is
    absent, damaged or of another kind, or if a needed column appears twice.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: neither .parquet nor .csv: save the losses as one of them, under that name")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return readers[path.suffix.lower()](path)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name one file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as csv ({error}): save it as UTF-8") from None
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path}: cannot be read as csv (its rows have more fields than its first line): put names with commas "
            "between quotes, and write numbers without commas"
        ) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].lower()} ({reason}): write it again") from None


def _read_parquet(path: Path) -> pd.DataFrame:
    if path.is_dir():
        raise IsADirectoryError
    with pq.ParquetFile(path) as file:  # read_table would make columns of folders called size=4
        schema = file.schema_arrow
        present = _needed([name.strip() for name in schema.names], path)
        columns = {field.name: field.name.strip() for field in schema if field.name.strip() in present}
        nested = [columns[field.name] for field in schema if field.name in columns and pa.types.is_nested(field.type)]
        if nested:
            raise UserError(f"{path}: column '{nested[0]}' holds lists or records: give it a single value a row")
        # pandas metadata may name an index, which would take columns out of the table
        table: pd.DataFrame = file.read(list(columns)).to_pandas(ignore_metadata=True)
    return table.rename(columns=columns)


def _read_csv(path: Path) -> pd.DataFrame:
    options: dict[str, Any] = {
        "encoding": "utf-8-sig",
        "skipinitialspace": True,
        "keep_default_na": False,
        "na_values": [""],
    }
    header: pd.DataFrame = pd.read_csv(path, header=None, nrows=1, dtype=str, **options)
    if header.shape[1] == 1 and any(other in str(header.iloc[0, 0]) for other in ";\t"):
        raise UserError(
            f"{path}: its first line has no comma: separate the columns by commas, and write decimals with a point"
        )
    present = _needed([str(name).strip() for name in header.iloc[0]], path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # more fields than the header has: columns would shift
        table: pd.DataFrame = pd.read_csv(
            path,
            index_col=False,
            dtype=dict.fromkeys(_NAMES, str),
            float_precision="round_trip",
            low_memory=False,  # else a column's type may change half-way, and size 4 become two sizes
            **options,
        )
    table.columns = [str(name).strip() for name in table.columns]
    return table[present]


def _needed(names: list[str], path: Path) -> list[str]:
    """Return the columns to read: the needed ones, or all if one is missing, so that an error can name the nearest."""
    twice = [name for name in (*COLUMNS, TOKEN_BYTES) if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column '{twice[0]}' appears twice: keep one")
    if not set(COLUMNS) <= set(names):
        return [name for name in names if names.count(name) == 1]
    return [*COLUMNS, *([TOKEN_BYTES] if TOKEN_BYTES in names else [])]
