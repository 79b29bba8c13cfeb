"""Sources of text: parquet shards behind a path, a glob, a URI, or the name of a built-in corpus.

Validation text is never trained on. It is the files of `data.validation`, else the files whose names hold them out
(`bwlm.text.splits`), else, by nanochat's convention, the last shard. Test files are left alone.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.config import CONTROL_SOURCES, DataSettings
from bwlm.credentials import refuse_secret
from bwlm.errors import UserError, nearest
from bwlm.paths import local_path
from bwlm.text.splits import (
    FileSplit,
    Shard,
    is_split_folder,
    listed,
    split_by_name,
    split_of,
    without_copies,
    without_repeats,
)

_PYDOCS = "builtin:pydocs"
BUILTINS = (_PYDOCS, *CONTROL_SOURCES)
"""Names of all built-in corpora."""
_ROWS_AT_ONCE = 256
_MEND = "write the shard again, or remove it from data.source"
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created", "blob_id")
"""Names that file systems give to a value that changes with the file."""


class NoSource(UserError):
    """Text is gone, or out of reach from this machine."""


@dataclass(frozen=True)
class Corpus:
    """Shards of a corpus, by split."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    text_column: str
    shuffle: bool = True
    """True: documents are packed in a shuffled order inside each shard. The tokenizer reads them in the order of the
    file."""
    builtin: str = ""
    """Folder of a built-in corpus, inside the storage; '' for any other."""

    def listing(self) -> str:
        """Return a short hash of the files, their sizes and times, and the column: it names what is made from them.

        Files of a built-in corpus are named relative to its folder, so that a storage that was moved still finds its
        cache.
        """
        above = f"{Path(self.builtin).parent}/" if self.builtin else ""
        splits = [
            [(uri.removeprefix(above), *rest) for uri, *rest in (shard.version for shard in split)]
            for split in (self.train, self.validation)
        ]
        return hashlib.sha256(json.dumps([*splits, self.text_column]).encode()).hexdigest()[:16]


def find_corpus(data: DataSettings, cache: Path, progress: Callable[[str], None]) -> Corpus:
    """Return the shards that `data` names; write a built-in corpus below `cache` if it is asked for and not there yet.

    Reports the files that validate and the files that are not trained on through `progress`. Raises `UserError` if
    the source is missing, empty, or too small to hold a validation shard.
    """
    if data.source in BUILTINS:
        folder = _write_builtin(data.source, cache / "corpora", progress)
        written = data.model_copy(update={"source": str(folder), "text_column": "text"})
        return replace(find_corpus(written, cache, progress), builtin=str(folder.absolute()))
    if data.source.startswith("builtin:"):
        raise UserError(
            f"data.source: {data.source!r} is not a built-in corpus{nearest(data.source, BUILTINS)}: "
            f"give {', '.join(BUILTINS)}, or a folder of parquet files"
        )
    named = split_by_name(list_files(data.source, "data.source"), data.source, "data.source")
    for note in named.notes:
        progress(note)
    train, held_out, why = named.train, named.validation, "held out by its name"
    if data.validation is not None:
        held_out, why = _named_validation(data.validation), "data.validation"
        if unused := without_copies(named.validation, held_out)[0]:
            progress(f"{listed(unused)}: neither trained nor validated on: data.validation names other files")
    elif not held_out:
        train, held_out, why = train[:-1], train[-1:], "the last shard"
    kept, copies = without_copies(train, held_out)
    if not kept:
        raise UserError(_nothing_left(data, len(train)))
    for note in copies:
        progress(note)
    progress(f"validation: {listed(held_out)} ({why})")
    return Corpus(kept, held_out, data.text_column, data.shuffle)


def _named_validation(address: str) -> tuple[Shard, ...]:
    """Return the files of `data.validation`; of a folder with several splits, the files whose names hold them out."""
    files = without_repeats(list_files(address, "data.validation"))[0]
    return tuple(file for file in files if file.split == "validation") or files


def _nothing_left(data: DataSettings, shards: int) -> str:
    if data.validation is not None:
        return f"data.validation: {data.validation} leaves no file of data.source to train on: name fewer files"
    if not shards:
        return (
            f"data.source: {data.source} holds one shard to train on, and the last shard is validation: "
            "add a second or name one in data.validation"
        )
    return (
        f"data.source: {data.source}: no shard has other text than the validation text: "
        "add one, or name another validation file in data.validation"
    )


def _write_builtin(source: str, folder: Path, progress: Callable[[str], None]) -> Path:
    """Return the folder of the built-in corpus, below `folder`; write it if it is not there yet."""
    from bwlm.text.controls import control_key, write_control
    from bwlm.text.pydocs import pydocs_key, write_pydocs

    name = source.removeprefix("builtin:")
    if source in CONTROL_SOURCES:
        target = folder / f"{name}-{control_key(name)}"
        write_control(name, target, progress)
    else:
        target = folder / f"{name}-{pydocs_key()}"
        write_pydocs(target, progress)
    return target


def list_files(source: str, field: str, endings: tuple[str, ...] = (".parquet",)) -> list[Shard]:
    """Return the files of a folder, glob, file or URI whose names have one of these endings, sorted by name.

    A path of one file is taken whatever its ending. Raises `UserError` that names `field` if there is no file.
    """
    refuse_secret(source, field)
    path = local_path(source)
    shards = _remote(source, field, endings) if path is None else _local(path, source, field, endings)
    if not shards:
        raise UserError(f"{field}: no {' or '.join(endings)} file in {source}: {_give(endings)}")
    return shards


def _give(endings: tuple[str, ...]) -> str:
    return f"give a folder, glob, file or URI of {' or '.join(endings)} files"


def _local(path: Path, source: str, field: str, endings: tuple[str, ...]) -> list[Shard]:
    root = path.parent
    if path.is_dir():
        root, paths = path, sorted(file for file in path.iterdir() if file.name.endswith(endings))
    elif path.exists():
        paths = [path]
    elif glob.has_magic(str(path)):
        root = Path(_fixed_part(str(path)))
        paths = [Path(file) for file in sorted(_glob(str(path))) if file.endswith(endings)]
    else:
        raise NoSource(f"{field}: {source} does not exist: {_give(endings)}")
    folder = str(root.resolve())
    own = root.resolve().name if is_split_folder(folder, lambda name: Path(name).is_dir()) else ""
    return [_local_shard(file, split_of(str(file.relative_to(root)), own)) for file in paths]


def _local_shard(path: Path, split: FileSplit) -> Shard:
    """Return a local file as a shard.

    Folders are resolved, so that one file has one URI. The file itself is not: a link may bear the better name.
    """
    status = path.stat()
    return Shard(str(path.parent.resolve() / path.name), status.st_size, str(status.st_mtime_ns), split)


def _fixed_part(pattern: str) -> str:
    """Return the folder in which a pattern begins to match: /a/b for /a/b/c*/*.parquet."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))
    return "/".join(fixed) or ("/" if pattern.startswith("/") else ".")


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern


def _remote(source: str, field: str, endings: tuple[str, ...]) -> list[Shard]:
    scheme, rest = source.split("://", 1)
    try:
        filesystem, path = fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}")
        single = path.endswith(endings) and not glob.has_magic(path)
        pattern = path if glob.has_magic(path) else f"{path.rstrip('/')}/*"
        paths = [path] if single else sorted(name for name in filesystem.glob(pattern) if name.endswith(endings))
        infos = [filesystem.info(name) for name in paths]
        root = path.rpartition("/")[0] if single else _fixed_part(pattern)
        own = root.rpartition("/")[2] if is_split_folder(root, filesystem.isdir) else ""
    except FileNotFoundError:
        raise NoSource(f"{field}: {source} does not exist: {_give(endings)}") from None
    except ImportError as error:
        raise NoSource(f"{field}: {source}: {error}: install that package, or copy the files here") from None
    except Exception as error:  # every file system has its own errors, without a common base class
        raise NoSource(f"{field}: {source} cannot be listed ({first_line(error)}): check the address") from None
    return [
        Shard(
            filesystem.unstrip_protocol(name),
            int(info.get("size") or 0),
            _stamp(info),
            split_of(name.removeprefix(root), own),
        )
        for name, info in zip(paths, infos, strict=True)
    ]


def _stamp(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")


def open_parquet(uri: str, mend: str = _MEND) -> pq.ParquetFile:
    """Open a path or URI. Raises `UserError` with the advice `mend` if it is missing, cut off or not parquet."""
    try:
        if "://" in uri:
            return _open_remote(uri)
        return pq.ParquetFile(uri, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"{uri}: the shard does not exist: {mend}") from None
    except Exception as error:
        raise UserError(f"{uri}: not a readable parquet file; is it cut off? ({first_line(error)}): {mend}") from None


def _open_remote(uri: str) -> pq.ParquetFile:
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        return pq.ParquetFile(filesystem.open(path), page_checksum_verification=True)
    except pa.ArrowException:
        raise
    except ValueError:  # an HTTP server without range requests: read the whole shard
        return pq.ParquetFile(pa.BufferReader(filesystem.cat_file(path)), page_checksum_verification=True)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, short enough to be quoted in one of ours."""
    return (str(error) or type(error).__name__).split("\n")[0].strip().rstrip(".")


def check_shards(corpus: Corpus) -> None:
    """Read every shard's footer. Raises `UserError` that names the shard which is broken or lacks the text column."""
    for shard in (*corpus.train, *corpus.validation):
        with open_parquet(shard.uri) as file:
            schema = file.schema_arrow
            refuse_repeated(corpus.text_column, schema.names, f"{shard.uri}: data.text_column")
            if corpus.text_column not in schema.names:
                raise UserError(
                    f"{shard.uri}: data.text_column: no column {corpus.text_column!r}"
                    f"{nearest(corpus.text_column, schema.names)}: name one of {', '.join(schema.names)}"
                )
            kind = schema.field(corpus.text_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UserError(
                    f"{shard.uri}: data.text_column: {corpus.text_column!r} holds {kind}: name a column of strings"
                )


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
    with open_parquet(uri) as file:
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
