"""Documents that validate where no file does: about 1 in 20, chosen by content.

Of several .txt and .md files each is one document, and many of them become one parquet shard: packing makes a file of
rows from each shard, and fills rows with the documents of that shard alone. So small files are joined first, once,
below the storage's cache. The folder there is named by the content of the files: files that were copied, touched or
moved are the same corpus.

A file that is alone, of any kind, is divided into shards for training and for validation. A text file is then cut
into documents: at `<|endoftext|>` if it is in the text, else at blank lines.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from bwlm.errors import UserError, first_line
from bwlm.paths import atomic_folder, sha256_of, write_atomic
from bwlm.progress import track, working
from bwlm.text.listing import TEXTS, list_files
from bwlm.text.shards import parquet_of
from bwlm.text.splits import Shard

FORMAT_VERSION = 1
"""Version of the shards: raise it whenever the same files would give other documents."""
HELD_OUT = 20
"""Ratio of validation: about 1 document in 20."""
END_OF_TEXT = "<|endoftext|>"
"""Mark between the documents of one text file."""
_SHARD_BYTES = 2**25
"""Bytes of text after which a shard is full: few enough that several are packed in parallel."""
_SPLITS = ("train", "validation")

Item = TypeVar("Item")


def are_documents(files: Sequence[Shard]) -> bool:
    """Return whether all of the files are text files, which hold one document each."""
    return all(file.uri.endswith(TEXTS) for file in files)


def hold_out(files: Sequence[Shard]) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Return the training and the validation documents: about 1 in 20 validates, at least one.

    The content alone decides, so equal documents fall on one side, and a new file moves no other, unless it is the
    only one that validates.
    """
    numbers = {file: _number(_digest(file)) for file in files}
    is_held_out = _choose(numbers.values())
    held_out = tuple(file for file, number in numbers.items() if is_held_out(number))
    return tuple(file for file, number in numbers.items() if not is_held_out(number)), held_out


def _number(digest: str) -> int:
    return int(digest[:16], 16)


def _choose(numbers: Collection[int]) -> Callable[[int], bool]:
    """Return what says whether the document with a number validates: 1 in 20, or else the one with the least number."""
    least, count = min(numbers), sum(number % HELD_OUT == 0 for number in numbers)
    if 0 < count < len(numbers):
        return lambda number: number % HELD_OUT == 0
    return lambda number: number == least


def write_documents(files: Sequence[Shard], column: str, folder: Path) -> tuple[Shard, ...]:
    """Return parquet shards of the files in their order, one row each; write them below `folder` if they are not there.

    Raises `UserError` for a file that cannot be read as UTF-8.
    """
    made_from = json.dumps([FORMAT_VERSION, column, [_digest(file) for file in files]])
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    target = folder / f"documents-{key}"
    if not target.exists():
        with atomic_folder(target) as temporary:
            groups = _groups(track(files, "reading text", "files"), lambda file: file.size)
            _write_shards(temporary, ([_read(file) for file in group] for group in groups), column)
    return _written(target, key)


def _groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield the items in their order, as many at once as make a shard."""
    place = 0

    def shard_of(item: Item) -> int:
        nonlocal place
        first, place = place, place + size(item)
        return first // _SHARD_BYTES

    for _, group in itertools.groupby(items, shard_of):
        yield list(group)


def _write_shards(folder: Path, groups: Iterable[list[str]], column: str) -> None:
    for index, texts in enumerate(groups):
        write_atomic(folder / f"shard_{index:05d}.parquet", parquet_of(texts, column))


def _written(folder: Path, key: str) -> tuple[Shard, ...]:
    return tuple(replace(shard, stamp=key) for shard in list_files(str(folder), "data.source"))


# ---- one file alone ----


def split_documents(
    file: Shard, texts: Callable[[], Iterator[str]], column: str, folder: Path
) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Return parquet shards of the training and of the validation documents that `texts` reads from a file.

    They are written below `folder` if they are not there. Raises `UserError` if all documents are equal.
    """
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, column, *file.version]).encode()).hexdigest()[:16]
    target = folder / f"split-{key}"
    if not target.exists():
        with working(f"holding out documents of {Path(file.uri).name}"):
            is_held_out = _choose(_numbers(file, texts()))
            with atomic_folder(target) as temporary:
                for split in _SPLITS:
                    (temporary / split).mkdir()
                    chosen = (one for one in texts() if is_held_out(_number_of(one)) == (split == "validation"))
                    _write_shards(temporary / split, _groups(chosen, lambda text: len(text.encode())), column)
    train, validation = (_written(target / split, key) for split in _SPLITS)
    return train, validation


def _numbers(file: Shard, texts: Iterable[str]) -> array[int]:
    """Return a number for each document that is not blank. Raises `UserError` if they are all equal, or if none is."""
    numbers = array("Q", (_number_of(text) for text in texts if text.strip()))
    if not numbers:
        raise UserError(f"data.source: {file.uri} holds no text: give documents that are not empty")
    if min(numbers) == max(numbers):
        mend = f"put a blank line or {END_OF_TEXT} between documents" if are_documents([file]) else "add documents"
        raise UserError(
            f"data.source: {file.uri} holds one document, and validation needs another: "
            f"{mend}, or name another file in data.validation"
        )
    return numbers


def _number_of(text: str) -> int:
    return _number(hashlib.sha256(text.encode()).hexdigest())


def read_documents(file: Shard) -> Iterator[str]:
    """Yield the documents of one text file, cut at `<|endoftext|>` if it is in the text, else at blank lines."""
    is_marked = any(END_OF_TEXT in line for line in _lines(file))
    pieces = _split_at_marks(_lines(file)) if is_marked else _lines(file)
    for is_between, group in itertools.groupby(pieces, END_OF_TEXT.__eq__ if is_marked else str.isspace):
        text = "".join(group).strip("\n")
        if text.strip() and not is_between:
            yield text


def _split_at_marks(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines, each mark in them apart."""
    for line in lines:
        yield from filter(None, re.split(f"({re.escape(END_OF_TEXT)})", line))


# ---- reading ----


@cache
def _digest(file: Shard) -> str:
    try:
        return sha256_of(Path(file.uri))
    except OSError as error:
        raise _unreadable(file, error) from None


def _read(file: Shard) -> str:
    return "".join(_lines(file))


def _lines(file: Shard) -> Iterator[str]:
    """Yield the lines of a file, without a byte order mark and each with `\\n` at its end."""
    try:
        with Path(file.uri).open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError:
        raise UserError(f"{file.uri}: not valid UTF-8; re-encode it") from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Shard, error: OSError) -> UserError:
    return UserError(f"{file.uri}: cannot be read ({first_line(error)}): make it readable, or take it out of the data")
