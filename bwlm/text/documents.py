"""Text files as a corpus: each .txt or .md file is one document, and many of them become one parquet shard.

Packing makes a file of rows from each shard, and fills rows with the documents of that shard alone. So small files
are joined first, once, below the storage's cache. The folder there is named by the content of the files: files that
were copied, touched or moved are the same corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from bwlm.errors import UserError, first_line
from bwlm.paths import atomic_folder, sha256_of, write_atomic
from bwlm.text.listing import TEXTS, list_files
from bwlm.text.shards import parquet_of
from bwlm.text.splits import Shard

FORMAT_VERSION = 1
"""Version of the shards: raise it whenever the same files would give other documents."""
HELD_OUT = 20
"""Ratio of validation: about 1 document in 20."""
_SHARD_BYTES = 2**25
"""Bytes of text after which a shard is full: few enough that several are packed in parallel."""


def are_documents(files: Sequence[Shard]) -> bool:
    """Return whether all of the files are text files, which hold one document each."""
    return all(file.uri.endswith(TEXTS) for file in files)


def hold_out(files: Sequence[Shard]) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Return the training and the validation documents: about 1 in 20 validates, at least one.

    The content alone decides, so equal documents fall on one side, and a new file moves no other, unless it is the
    only one that validates.
    """
    numbers = {file: int(_digest(file)[:16], 16) for file in files}
    chosen = {number for number in numbers.values() if number % HELD_OUT == 0} or {min(numbers.values())}
    held_out = tuple(file for file, number in numbers.items() if number in chosen)
    return tuple(file for file, number in numbers.items() if number not in chosen), held_out


def write_documents(
    files: Sequence[Shard], column: str, folder: Path, progress: Callable[[str], None]
) -> tuple[Shard, ...]:
    """Return parquet shards of the files in their order, one row each; write them below `folder` if they are not there.

    Raises `UserError` for a file that cannot be read as UTF-8.
    """
    made_from = json.dumps([FORMAT_VERSION, column, [_digest(file) for file in files]])
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    target = folder / f"documents-{key}"
    if not target.exists():
        progress(f"reading {len(files)} text files")
        with atomic_folder(target) as temporary:
            for index, group in enumerate(_groups(files)):
                content = parquet_of([_read(file) for file in group], column)
                write_atomic(temporary / f"shard_{index:05d}.parquet", content)
    return tuple(replace(shard, stamp=key) for shard in list_files(str(target), "data.source"))


def _groups(files: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Yield the files in their order, as many at once as make a shard."""
    ends = itertools.accumulate(file.size for file in files)
    starts = (end - file.size for end, file in zip(ends, files, strict=True))
    places = dict(zip(files, starts, strict=True))
    for _, group in itertools.groupby(files, lambda file: places[file] // _SHARD_BYTES):
        yield list(group)


@cache
def _digest(file: Shard) -> str:
    try:
        return sha256_of(Path(file.uri))
    except OSError as error:
        raise _unreadable(file, error) from None


def _read(file: Shard) -> str:
    """Return the text of a file, without a byte order mark and with `\\n` at the end of each line."""
    try:
        return Path(file.uri).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file.uri}: not valid UTF-8; re-encode it") from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Shard, error: OSError) -> UserError:
    return UserError(f"{file.uri}: cannot be read ({first_line(error)}): make it readable, or take it out of the data")
