"""Sources of text: shards of parquet or JSON lines, text files, or the name of a built-in corpus.

Validation text is never trained on. It is the files of `data.validation`, else the files whose names hold them out
(`bwlm.text.splits`), else, by nanochat's convention, the last shard; of text files, which hold one document each,
one in 20, and of a file that is alone one document in 20. Test files are left alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.config import CONTROL_SOURCES, DataSettings
from bwlm.errors import UserError, first_line, nearest
from bwlm.format import json_kind
from bwlm.paths import local_path
from bwlm.progress import track, working
from bwlm.text.documents import (
    HELD_OUT,
    are_documents,
    hold_out,
    read_documents,
    split_documents,
    write_documents,
)
from bwlm.text.json_lines import read_json_lines
from bwlm.text.listing import JSON_LINES, PARQUET, TEXTS, deeper, list_files, unreachable
from bwlm.text.splits import Shard, listed, split_by_name, without_copies, without_repeats

BUILTINS = ("builtin:pydocs", *CONTROL_SOURCES, "builtin:reversal")
"""Names of all built-in corpora."""
_ROWS_AT_ONCE = 256
_MEND = "write the shard again, or remove it from data.source"
_KINDS = (PARQUET, JSON_LINES, TEXTS)
"""Endings of files that hold documents. Of a folder with several kinds the first is read: parquet beside a README."""


@dataclass(frozen=True)
class Corpus:
    """Shards of a corpus, by split."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    text_column: str
    shuffle: bool = True
    """True: documents are packed in a shuffled order inside each shard. The tokenizer reads them in the order of the
    file."""
    written: str = field(default="", compare=False)
    """Folder inside the storage for corpora that bwlm writes."""
    documents: tuple[int, int] = (0, 0)
    """Documents of the training and of the validation shards, once `checked` has counted them; those of JSON lines
    are not counted."""

    def listing(self) -> str:
        """Return a short hash of the files, their sizes and times, and the column: it names what is made from them.

        Files inside the storage are named relative to it, so that a storage that was moved still finds its cache.
        """
        splits = [
            [(uri.removeprefix(f"{self.written}/"), *rest) for uri, *rest in (shard.version for shard in split)]
            for split in (self.train, self.validation)
        ]
        return hashlib.sha256(json.dumps([*splits, self.text_column]).encode()).hexdigest()[:16]


def find_corpus(data: DataSettings, cache: Path, progress: Callable[[str], None]) -> Corpus:
    """Return the shards that `data` names; a built-in corpus and text files are written below `cache` as shards first.

    Reports the files that validate and the files that are not trained on through `progress`. Raises `UserError` if
    the source is missing, empty, or too small to hold a validation shard.
    """
    corpora = cache.resolve() / "corpora"
    if data.source in BUILTINS:
        with working(f"writing {data.source}"):
            folder = _write_builtin(data.source, corpora, progress)
        written = data.model_copy(update={"source": str(folder), "text_column": "text"})
        return find_corpus(written, cache, progress)
    if data.source.startswith("builtin:"):
        raise UserError(
            f"data.source: {data.source!r} is not a built-in corpus{nearest(data.source, BUILTINS)}: "
            f"give {', '.join(BUILTINS)}, or a folder of text"
        )
    named = split_by_name(_list(data.source, "data.source", progress), data.source, "data.source")
    for note in named.notes:
        progress(note)
    train, held_out, why = named.train, named.validation, "held out by its name"
    if data.validation is not None:
        held_out, why = _named_validation(data.validation, progress), "data.validation"
        if unused := without_copies(named.validation, held_out)[0]:
            progress(f"{listed(unused)}: neither trained nor validated on: data.validation names other files")
    elif not held_out and len(train) == 1:
        return _split_file(train[0], data, corpora, progress)
    elif not held_out and are_documents(train):
        (train, held_out), why = hold_out(train), "about 1 document in 20, chosen by content"
    elif not held_out:
        train, held_out, why = train[:-1], train[-1:], "the last shard"
    kept, copies = without_copies(train, held_out)
    if not kept:
        raise UserError(_nothing_left(data, held_out))
    for note in copies:
        progress(note)
    progress(f"validation: {listed(held_out)} ({why})")
    kept, held_out = (
        write_documents(files, data.text_column, corpora) if are_documents(files) else files
        for files in (kept, held_out)
    )
    return Corpus(kept, held_out, data.text_column, data.shuffle, str(corpora))


def _list(address: str, field: str, progress: Callable[[str], None]) -> list[Shard]:
    """Return the files of one kind behind an address, and tell which files of other kinds are not read."""
    is_far = local_path(address) is None
    if is_far and address.endswith(TEXTS):
        raise UserError(
            f"{field}: {address}: {' and '.join(TEXTS)} files are read from this machine: copy them here, "
            "or write their texts into .jsonl or parquet files"
        )
    files = list_files(address, field, sum(_KINDS[:2] if is_far else _KINDS, ()))
    kinds = [[file for file in files if file.uri.endswith(endings)] for endings in _KINDS]
    chosen = next(filter(None, kinds), files)
    if others := [file for file in files if file not in chosen]:
        progress(f"{listed(others)}: not read, since {field} holds {Path(chosen[0].uri).suffix} files too")
    return chosen


def _named_validation(address: str, progress: Callable[[str], None]) -> tuple[Shard, ...]:
    """Return the files of `data.validation`; of a folder with several splits, the files whose names hold them out."""
    files = without_repeats(_list(address, "data.validation", progress))[0]
    return tuple(file for file in files if file.split == "validation") or files


def _split_file(file: Shard, data: DataSettings, corpora: Path, progress: Callable[[str], None]) -> Corpus:
    """Return the corpus of one file alone, some of whose documents validate."""
    is_text = are_documents([file])
    if is_text and (hint := deeper(data.source, sum(_KINDS, ()))):
        raise UserError(
            f"data.source: {data.source} holds one text file; {hint}; to read that file alone, name {file.uri}"
        )

    def documents() -> Iterator[str]:
        if is_text:
            return read_documents(file)
        return itertools.chain.from_iterable(read_texts(file.uri, data.text_column))

    progress(f"validation: about 1 document in {HELD_OUT} of {file.uri}, chosen by content")
    train, held_out = split_documents(file, documents, data.text_column, corpora)
    return Corpus(train, held_out, data.text_column, data.shuffle, str(corpora))


def _nothing_left(data: DataSettings, held_out: Sequence[Shard]) -> str:
    if data.validation is not None:
        return f"data.validation: {data.validation} leaves no file of data.source to train on: name fewer files"
    if are_documents(held_out):
        return (
            f"data.source: {data.source} holds one document, {held_out[0].uri}, and validation needs another: "
            "add a file, or name one in data.validation"
        )
    return (
        f"data.source: {data.source}: no shard has other text than the validation text: "
        "add one, or name another validation file in data.validation"
    )


def _write_builtin(source: str, folder: Path, progress: Callable[[str], None]) -> Path:
    """Return the folder of the built-in corpus, below `folder`; write it if it is not there yet."""
    from bwlm.text.controls import control_key, write_control
    from bwlm.text.pydocs import pydocs_key, write_pydocs
    from bwlm.text.reversal import reversal_key, write_reversal

    name = source.removeprefix("builtin:")
    if source in CONTROL_SOURCES:
        target = folder / f"{name}-{control_key(name)}"
        write_control(name, target, progress)
    elif name == "reversal":
        target = folder / f"{name}-{reversal_key()}"
        write_reversal(target, progress)
    else:
        target = folder / f"{name}-{pydocs_key()}"
        write_pydocs(target, progress)
    return target


def open_parquet(uri: str, mend: str = _MEND) -> pq.ParquetFile:
    """Open a path or URI. Raises `UserError` with the advice `mend` if it is missing, cut off or not parquet."""
    try:
        if "://" in uri:
            return _open_remote(uri)
        return pq.ParquetFile(uri, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"{uri}: the shard does not exist: {mend}") from None
    except Exception as error:
        if cause := unreachable(error):
            raise UserError(f"{uri}: its server cannot be reached ({first_line(cause)}): check the network") from None
        raise UserError(f"{uri}: not a readable parquet file; is it cut off? ({first_line(error)}): {mend}") from None


def _open_remote(uri: str) -> pq.ParquetFile:
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        return pq.ParquetFile(filesystem.open(path), page_checksum_verification=True)
    except pa.ArrowException:
        raise
    except ValueError:  # an HTTP server without range requests: read the whole shard
        return pq.ParquetFile(pa.BufferReader(filesystem.cat_file(path)), page_checksum_verification=True)


def checked(corpus: Corpus) -> Corpus:
    """Read the beginning of every shard, or its footer, and return the corpus with the number of its documents.

    Raises `UserError` that names the shard which is broken or lacks the text column.
    """
    documents = []
    for shard in track((*corpus.train, *corpus.validation), "checking the text", "shards"):
        if shard.uri.endswith(JSON_LINES):
            next(read_texts(shard.uri, corpus.text_column), None)
            documents.append(0)
            continue
        with open_parquet(shard.uri) as file:
            documents.append(file.metadata.num_rows)
            _check_column(file, corpus.text_column, shard.uri)
    train = len(corpus.train)
    return replace(corpus, documents=(sum(documents[:train]), sum(documents[train:])))


def _check_column(file: pq.ParquetFile, column: str, uri: str) -> None:
    """Raise `UserError` if the file has no such column of strings."""
    schema, where = file.schema_arrow, f"{uri}: data.text_column"
    refuse_repeated(column, schema.names, where)
    if column not in schema.names:
        raise UserError(
            f"{where}: no column {column!r}{nearest(column, schema.names)}: name one of {', '.join(schema.names)}"
        )
    kind = schema.field(column).type
    if not any(is_kind(kind) for is_kind in _TEXT_TYPES):
        raise UserError(f"{where}: {column!r} holds {kind}: name a column of strings")


_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
"""Types of a text column; a shard whose texts are all null has a column of the type null."""


def refuse_repeated(column: str, names: Sequence[str], where: str) -> None:
    """Raise `UserError` if two columns have the name `column`."""
    if (count := names.count(column)) > 1:
        raise UserError(f"{where}: {count} columns are called {column!r}: rename all but one")


def read_texts(uri: str, column: str) -> Iterator[list[str]]:
    """Yield the documents of a shard some at a time, null values as empty texts.

    Raises `UserError` that names the shard, and the row where it can, for damage and for text that is not UTF-8. A
    bit that flipped inside a value is noticed only in files with page checksums, which writers of parquet leave out
    by default.
    """
    yield from _read_json_texts(uri, column) if uri.endswith(JSON_LINES) else _read_parquet_texts(uri, column)


def _read_json_texts(uri: str, column: str) -> Iterator[list[str]]:
    texts = (_text(value, column, place) for place, value in read_json_lines(uri, _MEND))
    while some := list(itertools.islice(texts, _ROWS_AT_ONCE)):
        yield some


def _text(value: Any, column: str, place: str) -> str:
    """Return the document of a line of JSON. Raises `UserError` that names its place if there is none."""
    where = f"{place}: data.text_column"
    if not isinstance(value, dict):
        raise UserError(f'{where}: the line is no object: write {{"{column}": ".."}}')
    if column not in value:
        raise UserError(f"{where}: no field {column!r}{nearest(column, value)}: name one of {', '.join(value)}")
    text = value[column]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: {column!r} holds {json_kind(text)}: name a field of strings")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {column!r} holds half of a surrogate pair, which is no character: remove it"
        ) from None
    return text or ""


def _read_parquet_texts(uri: str, column: str) -> Iterator[list[str]]:
    with open_parquet(uri) as file:
        _check_column(file, column, uri)
        row = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
                yield [text or "" for text in _decoded(batch.column(0), uri, column, row)]
                row += batch.num_rows
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{uri}: damaged after row {row} ({first_line(error)}): {_MEND}") from None


def _decoded(values: pa.Array, uri: str, column: str, first_row: int) -> list[Any]:
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        for index, value in enumerate(values.cast(pa.large_binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                raise UserError(
                    f"{uri}: row {first_row + index}, column {column!r}: not valid UTF-8; re-encode it"
                ) from None
        raise
