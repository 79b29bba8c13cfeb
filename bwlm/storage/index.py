"""Index of a folder's copy in the working folder: which object each of its files is a copy of.

A file whose size, time or inode is not the one in the index was written here since, and waits to be pushed. Several
processes of a machine share a working folder, so the index is read and written under a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bwlm.paths import exclusive, write_json
from bwlm.storage.head import Head
from bwlm.storage.objects import Tag

PLACE = ".bucket"
"""Folder of the indexes and locks in a working folder."""
Sign = tuple[int, int, int]
"""Size, time and inode of a file as it was pushed or pulled."""


@dataclass
class Index:
    """Content of a folder's index."""

    head: Head = field(default_factory=Head)
    """Head that the files here were compared with last. What older attempts than its own left here is dropped."""
    tag: Tag | None = None
    here: dict[str, tuple[str, Sign]] = field(default_factory=dict)
    """Key and sign of each file that lies here, by its path."""
    attempt: int = 0
    """Attempt that trained here last; while it is the head's too, what lies here is newer than the bucket."""

    def keep(self, head: Head, tag: Tag) -> None:
        """Keep a head that this process has swapped in; a pull learns one of another attempt, and drops files then."""
        if head.attempt == self.head.attempt and head.number > self.head.number:
            self.head, self.tag = head, tag


class IndexFile:
    """File of an index, with its lock, and the lock of the process that trains in the folder."""

    def __init__(self, root: Path, name: str) -> None:
        self._path = root / PLACE / f"{quote(name, safe='')}.json"

    @contextmanager
    def locked(self) -> Iterator[Index]:
        """Yield the index; it is written at the end of the block, also if that fails: what is done is done."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self._path.with_suffix(".lock")):
            index = self.read()
            before = _content(index)
            try:
                yield index
            finally:
                if (after := _content(index)) != before:
                    write_json(self._path, after)

    def read(self) -> Index:
        """Return the index; an empty one if there is none, or if it is damaged: its folder is then compared anew."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(self._path.read_bytes())
            here = {path: (key, (sign[0], sign[1], sign[2])) for path, (key, sign) in told["here"].items()}
            tag = (told["tag"][0], told["tag"][1]) if told["tag"] else None
            return Index(Head.from_bytes(json.dumps(told["head"]).encode()), tag, here, told["attempt"])
        return Index()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Say that this process trains in the folder: nobody on this machine pulls its files then.

        It is not alone if another process is frozen whose lease it took.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".trainer").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def is_training(self) -> bool:
        """Return whether a process of this machine trains in the folder."""
        try:
            with self._path.with_suffix(".trainer").open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def indexed(root: Path) -> list[str]:
    """Return the names of the folders that have an index, sorted."""
    return sorted(unquote(path.stem) for path in (root / PLACE).glob("*.json"))


def sign_of(path: Path) -> Sign:
    """Return the sign of a file."""
    return sign_in(path.stat())


def sign_in(stat: os.stat_result) -> Sign:
    """Return the sign in a file's state."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _content(index: Index) -> dict[str, Any]:
    head = json.loads(index.head.to_bytes())
    here = {path: [key, list(sign)] for path, (key, sign) in index.here.items()}
    return {"head": head, "tag": list(index.tag) if index.tag else None, "here": here, "attempt": index.attempt}
