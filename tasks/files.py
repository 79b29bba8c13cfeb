"""Rows of a data set in parquet, JSONL or JSON files, and the split of its files and rows.

Files are split by the words of their names, as documents' files are (`bwlm.text.splits`): `validation`, `valid`,
`val` or `dev` validates, `test` is left for evaluation, every other file is for training; a source without a training
file is refused. If no file validates, one training row in 20 does: a row where the first 64 bits of the SHA-256 of
its columns that are read, as JSON with sorted keys, are divisible by 20. Equal rows fall on one side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.errors import UserError, first_line, nearest
from bwlm.paths import local_path
from bwlm.text.corpus import open_parquet, refuse_repeated
from bwlm.text.listing import JSON_LINES, PARQUET, any_of, list_files
from bwlm.text.splits import NamedSplits, Shard, listed, split_by_name
from tasks.rows import MEND, Row, begins_array, first_of, read_array, read_lines
from tasks.task import SplitName, draw, recipe_key

HELD_OUT = 20
"""Number of training rows of which about one is validation, if no file's name says validation."""

JSON = ".json"
ENDINGS = (*PARQUET, *JSON_LINES, JSON)
_ABOUT = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Names of files that tell of a data set beside its rows, on the hub and as `datasets` saves it."""
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class DataSet:
    """Source of a task's rows: its files on the hub or elsewhere, and the columns that are read."""

    field: str
    """Setting that names the files, for errors: `tasks.gsm8k.path`."""
    address: str
    """Address that is read if no path is given, such as a folder on the hub."""
    columns: tuple[str, ...]
    """Columns that are read or, with `any_of`, the columns of which a row has one: the first is read."""
    subset: str = ""
    """Folder below `address` that holds the files; it may stand below a path too, as in a copy of the hub's folder."""
    any_of: bool = False

    def rows(self, split: SplitName, path: str | None = None) -> Iterator[Row]:
        """Yield the rows of a split, file by file. Raises `UserError` naming the file and, if known, the row."""
        named = self.splits(path)
        by_name = bool(named.validation)
        for file in named.validation if by_name and split == "validation" else named.train:
            for row in self._read(file.uri):
                if by_name or self._held_out(row) == (split == "validation"):
                    yield row

    def test_rows(self, path: str | None = None) -> Iterator[Row]:
        """Yield the rows of the test split, file by file. Raises `UserError` as `rows` does, and for an empty split."""
        yield from self._some_rows(self._test_files(self._list(path), path), f"{self.field}: {path or self.address}")

    def example_rows(self, path: str | None = None) -> Iterator[Row]:
        """Yield the rows that examples are taken from: of validation files, else of training, else of test files."""
        files = self._list(path)
        test = self._test_files(files, path)
        for split in ("validation", "train"):
            if chosen := [file for file in files if file.split == split and file not in test]:
                return self._some_rows(chosen, f"{self.field}: {path or self.address}")
        return self.test_rows(path)

    def test_source(self, path: str | None = None) -> str:
        """Return the address of the test split: its file, or the folder of its files."""
        files = self._test_files(self._list(path), path)
        return files[0].uri if len(files) == 1 else files[0].uri.rpartition("/")[0]

    def _test_files(self, files: list[Shard], path: str | None) -> list[Shard]:
        """Return the files for evaluation: named for it or, where no name says a split, all; one file is always it."""
        files, _ = _without_notes(files)
        test = [file for file in files if file.split == "test"]
        if not test and len(files) > 1 and any(file.split == "validation" for file in files):
            raise UserError(
                f"{self.field}: {path or self.address}: no test file (by their names {listed(files)} train or "
                "validate): name the file to evaluate on"
            )
        return test or files

    def _some_rows(self, files: Sequence[Shard], where: str) -> Iterator[Row]:
        """Yield the rows of files. Raises `UserError` if there is none."""
        empty = True
        for file in files:
            for row in self._read(file.uri):
                empty = False
                yield row
        if empty:
            raise UserError(f"{where}: no rows: name a file that holds some")

    def all_rows(self, path: str | None = None) -> Iterator[Row]:
        """Yield the rows of both splits, file by file, as `rows` does."""
        named = self.splits(path)
        for file in (*named.train, *named.validation):
            yield from self._read(file.uri)

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
            if not file.uri.endswith(ENDINGS):
                raise UserError(f"{self.field}: {file.uri}: name a {any_of(ENDINGS)} file")
        read, notes = _without_notes(files)
        named = split_by_name(read, path or self.address, self.field)
        return replace(named, notes=(*notes, *named.notes))

    def _list(self, path: str | None) -> list[Shard]:
        if path is not None:
            folder = local_path(path)
            below = folder / self.subset if folder and self.subset else None
            return list_files(str(below) if below and below.is_dir() else path, self.field, ENDINGS)
        try:
            return list_files(f"{self.address}/{self.subset}".rstrip("/"), self.field, ENDINGS)
        except UserError as error:
            copy = ", or give the path of a copy" if self.address.startswith("hf://") else ""
            raise type(error)(f"{error}{copy}") from None

    def _held_out(self, row: Row) -> bool:
        read = {column: row.values.get(column) for column in self._columns(row.values)}
        return draw(json.dumps(read, sort_keys=True, default=str)) % HELD_OUT == 0

    def _columns(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the columns to read of a file or row that has these names."""
        return (first_of(self.columns, names) or self.columns[0],) if self.any_of else self.columns

    def _read(self, uri: str) -> Iterator[Row]:
        if uri.endswith(PARQUET):
            return self._read_parquet(uri)
        return read_array(uri) if uri.endswith(JSON) and begins_array(uri) else read_lines(uri)

    def _read_parquet(self, uri: str) -> Iterator[Row]:
        with open_parquet(uri, MEND) as file:
            names = file.schema_arrow.names
            columns = list(self._columns(names))
            for column in columns:
                refuse_repeated(column, names, uri)
                if column not in names:
                    wanted = " or ".join(map(repr, self.columns if self.any_of else [column]))
                    raise UserError(f"{uri}: no column {wanted}{nearest(column, names)}: it has {', '.join(names)}")
                _refuse_repeated_fields(file.schema_arrow.field(column), f"{uri}: {column}")
            number = 0
            try:
                for values in _values(file, columns):
                    yield Row(f"{uri}: row {number}", values)
                    number += 1
            except Exception as error:
                raise UserError(f"{uri}: damaged after row {number} ({first_line(error)}): {MEND}") from None


def _without_notes(files: list[Shard]) -> tuple[list[Shard], list[str]]:
    """Return the files that hold rows, and a line about the others.

    JSON files beside parquet or JSONL are taken to tell of the data.
    """
    rows = [file for file in files if not file.uri.endswith(JSON)]
    others = [file for file in files if file.uri.endswith(JSON) and file.uri.rpartition("/")[2] not in _ABOUT]
    if rows and others:
        return rows, [f"{listed(others)}: not read: files of parquet or JSONL lie beside it"]
    return rows or others or files, []


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
        raise UserError(f"{file.uri}: cannot be read ({first_line(error)}): {MEND}") from None


def _values(file: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    for group in range(file.num_row_groups):  # pyarrow reads dictionaries inside of lists in one row group at a time
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=columns):
            yield from batch.to_pylist()


def _refuse_repeated_fields(field: pa.Field, where: str) -> None:
    """Raise `UserError` if an object in a column, at any depth, has two fields of one name."""
    inner = [field.type.field(index) for index in range(field.type.num_fields)]
    for one in inner:
        refuse_repeated(one.name, [other.name for other in inner], where)
        _refuse_repeated_fields(one, where)
