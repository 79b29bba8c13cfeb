"""Head of a folder in the bucket: the one object that says which objects are the folder's files now.

    <prefix>/.heads/<folder>.json                 the head: number, attempt, and the object of each file
    <prefix>/<folder>/<attempt>.<mark>/<path>     the objects; each has one writer, and is never written again

A file takes effect when the head names it, and the head is swapped in one step: a reader sees all of a push or
nothing. A swap is refused by the server if somebody else has swapped the head since it was read. Its writer then reads
it again, and stops if the attempt in it is newer than its own. So a process that was frozen, or cut off from the
network, and comes back after another one has taken its run over, changes nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from bwlm.errors import RunError
from bwlm.storage.objects import Bucket, Tag

HEADS = ".heads"
"""Folder of all heads, so that one listing finds what has changed."""


class LateWriter(RunError):
    """Write after a newer attempt has begun, or after the folder was deleted: the bucket stays as it is."""


@dataclass(frozen=True)
class Stored:
    """File of a folder, as its head names it."""

    key: str
    """Key of the object that holds its content."""
    size: int
    """Bytes."""
    sha256: str
    attempt: int
    """Attempt that wrote it: the number of the lease under which its run was trained; 0: written outside of one."""


Gone = Callable[[str, Stored], bool]
"""(path, file as a head names it) -> whether the head names it no longer"""


def nothing_gone(path: str, stored: Stored) -> bool:
    """Return False: a swap that takes no file out."""
    return False


@dataclass(frozen=True)
class Head:
    """Content of a head."""

    number: int = 0
    """Number of swaps so far; 0: there is none yet."""
    attempt: int = 0
    """Newest attempt: pushes of older ones are refused."""
    mark: str = ""
    """Text that is different for each swap."""
    files: Mapping[str, Stored] = field(default_factory=dict)
    """Files by their path in the folder; none in the head of a folder that was deleted."""
    dropped: tuple[str, ...] = ()
    """Keys that the swap before made useless. They are deleted by the next one, since a reader may be at them still."""

    @property
    def is_deleted(self) -> bool:
        """True if its folder was deleted."""
        return self.number > 0 and not self.files

    @property
    def is_half_deleted(self) -> bool:
        """True if its folder was deleted, and some of its objects may be there still: the process was killed."""
        return not self.files and bool(self.dropped)

    def changed(self, files: Mapping[str, Stored], is_gone: Gone, attempt: int | None = None) -> Head:
        """Return the next head: with these files put in and others taken out."""
        left = {path: stored for path, stored in self.files.items() if not is_gone(path, stored)} | dict(files)
        used = {stored.key for stored in left.values()}
        dropped = tuple(sorted({stored.key for stored in self.files.values()} - used))
        newest = self.attempt if attempt is None else attempt
        return Head(self.number + 1, newest, uuid.uuid4().hex, left, dropped)

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Head:
        """Return the head that a JSON document tells."""
        told = json.loads(content)
        files = {path: Stored(**stored) for path, stored in told["files"].items()}
        if outside := [path for path in files if not is_inside(path)]:
            raise RunError(
                f"storage: a head in the bucket names {outside[0]}, which lies outside its folder: delete it"
            )
        return replace(cls(**told), files=files, dropped=tuple(told["dropped"]))


def is_inside(path: str) -> bool:
    """Return whether a path from a bucket stays below the folder that it is relative to."""
    return not path.startswith("/") and ".." not in path.split("/")


def head_key(folder: str) -> str:
    """Return the key of a folder's head."""
    return f"{HEADS}/{folder}.json"


def read_head(bucket: Bucket, folder: str) -> tuple[Head, Tag | None]:
    """Return a folder's head and its tag; a head without files, and None, if there is none."""
    found = bucket.read(head_key(folder))
    return (Head(), None) if found is None else (Head.from_bytes(found[0]), found[1])


def swap_head(
    bucket: Bucket,
    folder: str,
    known: tuple[Head, Tag | None],
    files: Mapping[str, Stored],
    is_gone: Gone = nothing_gone,
    attempt: int | None = None,
    begins: bool = False,
) -> tuple[Head, Tag]:
    """Put files into a folder's head, and take others out; return the new head.

    With an `attempt`, raises `LateWriter` if the head has a newer one. `begins`: this is the attempt's first swap, and
    it ends all older ones; without it, the head must have this very attempt. `known` is the head as it was read last:
    also raises `LateWriter` if files are to be put into a folder that was deleted since.
    """
    before, tag = known
    while True:
        if files and known[0].files and before.is_deleted:
            raise LateWriter(f"{folder}: it was deleted while this process wrote to it")
        if attempt is not None and (before.attempt > attempt or (before.attempt != attempt and not begins)):
            raise LateWriter(f"{folder}: attempt {before.attempt} has written to it, and this is attempt {attempt}")
        head = before.changed(files, is_gone, attempt)
        if swapped := bucket.swap(head_key(folder), head.to_bytes(), tag):
            bucket.delete(key for key in before.dropped if key not in {one.key for one in head.files.values()})
            return head, swapped
        before, tag = read_head(bucket, folder)
