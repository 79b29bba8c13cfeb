"""Rows of a data set in parquet or JSONL files, and the split of its files and rows.

Files are split by the words of their names, as documents' files are (`bwlm.text.splits`): `validation`, `valid`,
`val` or `dev` validates, `test` is left for evaluation, every other file is for training; a source without a training
file is refused. If no file validates, one training row in 20 does: a row where the first 64 bits of the SHA-256 of
its columns that are read, as JSON with sorted keys, are divisible by 20. Equal rows fall on one side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from bwlm.errors import UserError, nearest
from bwlm.format import json_kind
from bwlm.paths import local_path
from bwlm.text.corpus import first_line, list_files, open_parquet, refuse_repeated
from bwlm.text.splits import NamedSplits, Shard, split_by_name
from tasks.task import SplitName, draw, recipe_key

HELD_OUT = 20
"""Number of training rows of which about one is validation, if no file's name says validation."""

PARQUET = ".parquet"
JSONL = (".jsonl", ".jsonl.gz")
_ROWS_AT_ONCE = 256
_MEND = "write the file again, or remove it"


@dataclass(frozen=True)
class Row:
    """Row of a file. Reading a field of another type raises `UserError` with file, row and field."""

    place: str
    """File, and the row counted from 0 (parquet) or the line counted from 1 (JSONL)."""
    values: Mapping[str, Any]

    def get(self, field: str) -> Any:
        """Return the value of a field. Raises `UserError` with the nearest name if the row has no such field."""
        if field not in self.values:
            raise UserError(
                f"{self.place}: no field {field!r}{nearest(field, self.values)}: it has {', '.join(self.values)}"
            )
        return self.values[field]

    def text(self, field: str) -> str:
        """Return the string in a field."""
        value = self.get(field)
        if not isinstance(value, str):
            raise self.fault(field, "a string", value)
        return value

    def texts(self, field: str) -> list[str]:
        """Return the list of strings in a field."""
        value = self.get(field)
        if not isinstance(value, list):
            raise self.fault(field, "a list of strings", value)
        for index, text in enumerate(value):
            if not isinstance(text, str):
                raise self.fault(f"{field}[{index}]", "a string", text)
        return value

    def integer(self, field: str) -> int:
        """Return the integer in a field; true and false are no integers."""
        value = self.get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(field, "an integer", value)
        return value

    def within(self, field: str) -> Row:
        """Return the object in a field, as a row of its own at the same place."""
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.fault(field, "an object", value)
        return Row(f"{self.place}: {field}", value)

    def fault(self, field: str, wanted: str, found: Any) -> UserError:
        """Return the error for a field that holds `found` instead of `wanted`."""
        return UserError(f"{self.place}: {field}: must be {wanted} (found {json_kind(found)})")


@dataclass(frozen=True)
class DataSet:
    """Source of a task's rows: its files on the hub or elsewhere, and the columns that are read."""

    field: str
    """Setting that names the files, for errors: `tasks.gsm8k.path`."""
    address: str
    """Address that is read if no path is given, such as a folder on the hub."""
    columns: tuple[str, ...]
    subset: str = ""
    """Folder below `address` that holds the files; it may stand below a path too, as in a copy of the hub's folder."""

    def rows(self, split: SplitName, path: str | None = None) -> Iterator[Row]:
        """Yield the rows of a split, file by file. Raises `UserError` naming the file and, if known, the row."""
        named = self.splits(path)
        by_name = bool(named.validation)
        for file in named.validation if by_name and split == "validation" else named.train:
            for row in _read(file.uri, self.columns):
                if by_name or self._held_out(row) == (split == "validation"):
                    yield row

    def key(self, path: str | None, *recipe: Any) -> str:
        """Return a short hash of both splits' files and of `recipe`, which names all else that makes conversations.

        Local files count by their content, so that a copy or a touched file gives the same rows; remote files by
        address, size and stamp.
        """
        named = self.splits(path)
        files = [[_content(file) for file in split] for split in (named.train, named.validation)]
        return recipe_key(*recipe, HELD_OUT, files)

    def splits(self, path: str | None = None) -> NamedSplits:
        """Return the files by split. Raises `UserError` for a file of another kind, and if no file is for training."""
        files = self._list(path)
        for file in files:
            if not file.uri.endswith((PARQUET, *JSONL)):
                raise UserError(f"{self.field}: {file.uri}: name a {PARQUET}, {' or '.join(JSONL)} file")
        return split_by_name(files, path or self.address, self.field)

    def _list(self, path: str | None) -> list[Shard]:
        if path is not None:
            folder = local_path(path)
            below = folder / self.subset if folder and self.subset else None
            return list_files(str(below) if below and below.is_dir() else path, self.field, (PARQUET, *JSONL))
        try:
            return list_files(f"{self.address}/{self.subset}".rstrip("/"), self.field, (PARQUET, *JSONL))
        except UserError as error:
            copy = ", or give the path of a copy" if self.address.startswith("hf://") else ""
            raise type(error)(f"{error}{copy}") from None

    def _held_out(self, row: Row) -> bool:
        read = {column: row.values.get(column) for column in self.columns}
        return draw(json.dumps(read, sort_keys=True, default=str)) % HELD_OUT == 0


def _content(file: Shard) -> tuple[str | int, ...]:
    """Return what identifies a file: a local one its SHA-256, another its version.

    Raises `UserError` if a local file cannot be read.
    """
    path = local_path(file.uri)
    if path is None:
        return file.version
    try:
        with path.open("rb") as opened:
            return (hashlib.file_digest(opened, "sha256").hexdigest(),)
    except OSError as error:
        raise UserError(f"{file.uri}: cannot be read ({first_line(error)}): {_MEND}") from None


def _read(uri: str, columns: tuple[str, ...]) -> Iterator[Row]:
    return _read_parquet(uri, columns) if uri.endswith(PARQUET) else _read_jsonl(uri)


def _read_parquet(uri: str, columns: tuple[str, ...]) -> Iterator[Row]:
    with open_parquet(uri, _MEND) as file:
        names = file.schema_arrow.names
        for column in columns:
            refuse_repeated(column, names, uri)
            if column not in names:
                raise UserError(f"{uri}: no column {column!r}{nearest(column, names)}: it has {', '.join(names)}")
            _refuse_repeated_fields(file.schema_arrow.field(column), f"{uri}: {column}")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns)):
                for values in batch.to_pylist():
                    yield Row(f"{uri}: row {number}", values)
                    number += 1
        except Exception as error:
            raise UserError(f"{uri}: damaged after row {number} ({first_line(error)}): {_MEND}") from None


def _refuse_repeated_fields(field: pa.Field, where: str) -> None:
    """Raise `UserError` if an object in a column, at any depth, has two fields of one name."""
    inner = [field.type.field(index) for index in range(field.type.num_fields)]
    for one in inner:
        refuse_repeated(one.name, [other.name for other in inner], where)
        _refuse_repeated_fields(one, where)


def _read_jsonl(uri: str) -> Iterator[Row]:
    number = 0
    try:
        with fsspec.open(uri, "rb", compression="gzip" if uri.endswith(".gz") else None) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"{uri}: line {number}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{uri}: cannot be read after line {number} ({first_line(error)}): {_MEND}") from None


def _parse(line: bytes, place: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({first_line(error)}): correct the line or remove it") from None
    if isinstance(values, list):  # nanochat writes a conversation as the list of its messages
        values = {"messages": values}
    if not isinstance(values, dict):
        raise UserError(f"{place}: must be an object or a list of messages (found {json_kind(values)})")
    return Row(place, values)
