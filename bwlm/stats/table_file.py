"""Table in a parquet or CSV file, written by bwlm or by others: the columns that statistics need, as they stand."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Columns of a kind of table."""

    rows: str
    """Name of the table in messages, such as `losses`."""
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    names: tuple[str, ...]
    """Columns of text, whatever it looks like: document 007 is not document 7."""


def read_table(path: Path, columns: Columns) -> pd.DataFrame:
    """Read the needed columns of a .parquet or .csv file, and the optional ones that are there, unchecked.

    If a needed column is missing, all columns are read: `require_columns` then names the nearest. In a CSV, only an
    empty field is missing: `NA` and `null` are names like others. Raises `UserError`, which names the file, if it is
    absent, damaged or of another kind, or if a needed column appears twice.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: neither .parquet nor .csv: save the {columns.rows} as one of them, under that name")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return readers[path.suffix.lower()](path, columns)
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


def _read_parquet(path: Path, wanted: Columns) -> pd.DataFrame:
    if path.is_dir():
        raise IsADirectoryError
    with pq.ParquetFile(path) as file:  # read_table would make columns of folders called size=4
        schema = file.schema_arrow
        present = _present([name.strip() for name in schema.names], path, wanted)
        columns = {field.name: field.name.strip() for field in schema if field.name.strip() in present}
        nested = [columns[field.name] for field in schema if field.name in columns and pa.types.is_nested(field.type)]
        if nested:
            raise UserError(f"{path}: column '{nested[0]}' holds lists or records: give it a single value a row")
        # pandas metadata may name an index, which would take columns out of the table
        table: pd.DataFrame = file.read(list(columns)).to_pandas(ignore_metadata=True)
    return table.rename(columns=columns)


def _read_csv(path: Path, wanted: Columns) -> pd.DataFrame:
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
    present = _present([str(name).strip() for name in header.iloc[0]], path, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # more fields than the header has: columns would shift
        table: pd.DataFrame = pd.read_csv(
            path,
            index_col=False,
            dtype=dict.fromkeys(wanted.names, str),
            float_precision="round_trip",
            low_memory=False,  # else a column's type may change half-way, and size 4 become two sizes
            **options,
        )
    table.columns = [str(name).strip() for name in table.columns]
    return table[present]


def _present(names: list[str], path: Path, wanted: Columns) -> list[str]:
    """Return the columns to read, or all if one is missing, so that an error can name the nearest."""
    twice = [name for name in (*wanted.needed, *wanted.optional) if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column '{twice[0]}' appears twice: keep one")
    if not set(wanted.needed) <= set(names):
        return [name for name in names if names.count(name) == 1]
    return [*wanted.needed, *(name for name in wanted.optional if name in names)]
