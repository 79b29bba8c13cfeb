"""Splits by the names of files (train, validation, test), and copies of one file.

Names are read as the hub's `datasets` reads them: the words of a file's name, then those of the folders between it
and the source, the nearest folder first. The first word of `SPLIT_WORDS` decides (`train-00000-of-00002.parquet`,
`validation.parquet`, `data/test/0.parquet`). A file without such a word is for training.

A file is identified by its content, not by the spelling of its path. Paths through links, relative paths, URIs with
and without a revision, and copies under another name are found by comparing bytes, which is done only for files of
equal size.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import fsspec

from bwlm.errors import UserError

FileSplit = Literal["train", "validation", "test"]
_WORDS: dict[FileSplit, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS: dict[str, FileSplit] = {word: split for split, words in _WORDS.items() for word in words}
_INSTEAD: dict[FileSplit, str] = {"validation": "validates", "test": "is left for evaluation"}
_COMPARED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Shard:
    """File of data; size and stamp tell when it changed."""

    uri: str
    """Absolute path without links to folders, or a URI."""
    size: int
    stamp: str
    split: FileSplit = field(default="train", compare=False)
    """Split that the file's name says."""

    @property
    def version(self) -> tuple[str, int, str]:
        """Identity that changes when the file does: it goes into the names of what is made from the file."""
        return self.uri, self.size, self.stamp


def split_of(name: str, folder: str = "") -> FileSplit:
    """Return the split that a path below its source says.

    `folder` is the source's own folder where its name counts too (`is_split_folder`).
    """
    *folders, file = [part for part in (folder, *name.split("/")) if part]
    for part in (file, *reversed(folders)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def is_split_folder(folder: str, exists: Callable[[str], bool]) -> bool:
    """Return true if the source's own folder is a split: named so, and beside a folder of training files.

    The name alone says nothing: many people keep all their work in folders called `dev` or `test`.
    """
    above, _, own = folder.rstrip("/").rpartition("/")
    is_held_out = SPLIT_WORDS.get(own.lower(), "train") != "train"
    return is_held_out and any(exists(f"{above}/{word}") for word in _WORDS["train"])


@dataclass(frozen=True)
class NamedSplits:
    """Files by the split that their names say, and lines that tell a person what is not trained on."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    notes: tuple[str, ...]
    test: tuple[Shard, ...] = ()


def split_by_name(files: Sequence[Shard], source: str, field: str) -> NamedSplits:
    """Sort files into splits.

    No training file has the content of a validation or test file, and none is listed twice. Raises `UserError` that
    names `field` if no file is left for training.
    """
    named = {split: [file for file in files if file.split == split] for split in _WORDS}
    notes = [f"{listed(named['test'])}: left for evaluation, neither trained nor validated on"] if named["test"] else []
    train, copies = without_copies(named["train"], [*named["validation"], *named["test"]])
    train, repeats = without_repeats(train)
    validation, held_repeats = without_repeats(named["validation"])
    if not train:
        held_out = [f"{listed(named[split])} {what}" for split, what in _INSTEAD.items() if named[split]]
        raise UserError(
            f"{field}: {source}: no file to train on ({', '.join(held_out)}): "
            "name a training file, or rename one whose name says another split than it is"
        )
    return NamedSplits(train, validation, (*notes, *copies, *repeats, *held_repeats), tuple(named["test"]))


def without_copies(files: Iterable[Shard], held_out: Iterable[Shard]) -> tuple[tuple[Shard, ...], list[str]]:
    """Return the files whose content no held-out file has, and a line for each copy under another name."""
    by_size: dict[int, list[Shard]] = defaultdict(list)
    for other in held_out:
        by_size[other.size].append(other)
    kept, notes = [], []
    for file in files:
        same = next((other for other in by_size[file.size] if _same_content(file, other)), None)
        if same is None:
            kept.append(file)
        elif same.uri != file.uri:
            notes.append(f"{file.uri}: not trained on: it has the content of {same.uri}, which is held out")
    return tuple(kept), notes


def without_repeats(files: Iterable[Shard]) -> tuple[tuple[Shard, ...], list[str]]:
    """Return each file once, however many links to it are listed, and a line for each repeated link.

    Copies stay: weighing a text by copies of its file is a choice, but no link is a copy.
    """
    kept: dict[object, Shard] = {}
    notes = []
    for file in files:
        first = kept.setdefault(_place(file), file)
        if first is not file:
            notes.append(f"{file.uri}: read once: it is the same file as {first.uri}")
    return tuple(kept.values()), notes


def _place(file: Shard) -> object:
    if "://" in file.uri:
        return file.uri
    status = Path(file.uri).stat()
    return (status.st_dev, status.st_ino) if status.st_ino else file.uri


def _same_content(one: Shard, other: Shard) -> bool:
    if _place(one) == _place(other):
        return True
    with _open(one.uri) as left, _open(other.uri) as right:
        while (part := left.read(_COMPARED_AT_ONCE)) == right.read(_COMPARED_AT_ONCE):
            if not part:
                return True
    return False


def _open(uri: str) -> IO[bytes]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        file: Any = filesystem.open(path)
        try:
            file.read(1)
            file.seek(0)
        except ValueError:  # an HTTP server without range requests
            return io.BytesIO(filesystem.cat_file(path))
    except Exception as error:  # every file system has its own errors, without a common base class
        raise UserError(f"{uri}: cannot be read ({error}): make it readable, or remove it from the data") from None
    return file  # type: ignore[no-any-return]


def listed(files: Sequence[Shard]) -> str:
    """Return the files in short: x/a.parquet and 4 more."""
    return files[0].uri + (f" and {len(files) - 1} more" if len(files) > 1 else "")
