"""Tail of a research log, `<phase>.h5.tail`: entries that are not merged yet, appended by one writer.

It is a write-ahead log: a line that names its writer, then records. A record holds the entry of one step as
safetensors, behind its length and checksum, so that a reader stops at one that was torn by the death of its writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from bwlm.errors import UserError
from bwlm.record.lease import Lease

Entry = dict[str, NDArray[Any]]
"""Logged step of a group: its columns, `step` among them."""

_HEAD = 128
"""Bytes at the start of a tail that name its writer."""
_RECORD = struct.Struct("<4sIQ")
"""Head of a record: the magic bytes, the CRC-32 of its entry, the length of its entry."""
_MAGIC = b"bwlm"
_AT_ONCE = 2**26
"""Bytes of entries in memory while a tail is merged."""
_READER = "reader "
"""Prefix of the writer's name, for a process that only merges what a dead writer left."""
_WAIT_SECONDS = 0.02


class Tail:
    """Tail of the log at a path, open for this process alone until it is closed.

    Raises `UserError` naming the other writer if there is one. A `reader` has the tail for moments only, so writers
    wait for it. The holder of the run's `lease` takes the tail from a writer that lost the lease and is frozen.
    """

    def __init__(self, path: Path, reader: bool = False, lease: Lease | None = None) -> None:
        self._path = path
        self._file = _lock(path, _READER if reader else "", lease)

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self._file.tell() - _HEAD

    def append(self, group: str, entry: Entry) -> None:
        """Append all of an entry, or nothing: records behind a torn one could not be read."""
        payload = save_tensors({f"{group}/{name}": values for name, values in entry.items()})
        record = _RECORD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload
        end = self._file.tell()
        try:
            if self._file.write(record) != len(record):  # a nearly full disk takes a part, quietly
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except BaseException:
            self._cut(end)
            raise

    def clear(self) -> None:
        """Drop all records, once they are merged."""
        self._cut(_HEAD)

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)

    def sync(self) -> None:
        """Make the records durable; any thread may call it."""
        os.fsync(self._file.fileno())

    def delete(self) -> None:
        """Delete the tail from its folder."""
        tail_of(self._path).unlink()

    def close(self) -> None:
        """Let others write."""
        self._file.close()


def tail_of(path: Path) -> Path:
    """Return the path of a log's tail."""
    return path.with_name(f"{path.name}.tail")


def has_entries(path: Path) -> bool:
    """Return whether there is a tail beside the log with entries to merge."""
    return tail_of(path).exists() and tail_of(path).stat().st_size > _HEAD


def _records(path: Path) -> Iterator[tuple[str, Entry]]:
    """Yield the group and the columns of each whole entry of a tail, up to the first that is torn or damaged."""
    with tail_of(path).open("rb") as file:
        left = file.seek(0, os.SEEK_END) - file.seek(_HEAD)
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            magic, crc, length = _RECORD.unpack(head)
            left -= _RECORD.size + length
            if magic != _MAGIC or left < 0 or zlib.crc32(payload := file.read(length)) != crc:
                return
            try:
                tensors = load_tensors(payload)
            except SafetensorError:
                return
            yield next(iter(tensors)).partition("/")[0], {name.partition("/")[2]: v for name, v in tensors.items()}


def entries_of(path: Path, last: int | None) -> Iterator[dict[str, list[Entry]]]:
    """Yield the entries of a tail, of steps up to `last`, by group: as many at a time as memory should hold."""
    batch: dict[str, list[Entry]] = defaultdict(list)
    size = 0
    for group, entry in _records(path):
        if last is not None and entry["step"] > last:
            continue
        batch[group].append(entry)
        size += sum(values.nbytes for values in entry.values())
        if size >= _AT_ONCE:
            yield batch
            batch, size = defaultdict(list), 0
    if batch:
        yield batch


# ---- the lock ----


def _lock(path: Path, role: str, lease: Lease | None) -> BinaryIO:
    """Return the tail, locked by this process until it is closed.

    Raises `UserError` naming the other writer, unless this process holds the run's `lease`.
    """
    before = None
    while True:
        file: BinaryIO = os.fdopen(os.open(tail_of(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(_HEAD).decode(errors="replace").strip(" \0") or "another process"
            file.close()
            merges = holder.startswith(_READER) and not role  # a reader merges in moments, then lets go
            if not merges and lease is None:
                raise UserError(f"{path}: {holder} writes to it: wait for it, or end that process") from None
            if not merges and lease and holder == before:  # not at once: a reader may not have put its name there yet
                file = _take_tail(path, lease)
                break
            before = holder
            time.sleep(_WAIT_SECONDS)
            continue
        with contextlib.suppress(FileNotFoundError):  # its last writer may have deleted it before it freed the lock
            if os.path.samestat(os.fstat(file.fileno()), tail_of(path).stat()):
                break
        file.close()
    file.write(f"{role}{socket.gethostname()}:{os.getpid()}".encode()[:_HEAD].ljust(_HEAD))
    file.seek(0, os.SEEK_END)
    return file


def _take_tail(path: Path, lease: Lease) -> BinaryIO:
    """Put a locked copy in the tail's place and return it: the former writer's file has no name any more."""
    copy = tail_of(path).with_name(f".{tail_of(path).name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        shutil.copyfile(tail_of(path), copy)
        file = copy.open("r+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        lease.check()
        copy.replace(tail_of(path))
        return file
    finally:
        copy.unlink(missing_ok=True)
