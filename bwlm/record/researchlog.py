"""The research log `<phase>.h5`: what every token cost, and how the model looked inside, step by step.

A file of HDF5 that is written in place does not survive the death of its writer. So entries are appended to a tail
beside it (`<phase>.h5.tail`), and from time to time the tail is merged into a copy that takes the file's name. Whoever
opens the file, beside a running training or after a kill, sees whole entries from the first to the last merge; what
came later is in the tail, and the next writer merges it.

Every group is a table: its datasets have one entry a logged step along their first axis, of which `step` is one.
Datasets that hold for the whole run (`fixed`) have no such axis. `schema.py` says what they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import struct
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from bwlm.errors import UserError
from bwlm.paths import sync
from bwlm.record.schema import GROUPS, VERSION, Column

log = logging.getLogger(__name__)

Array = NDArray[Any]
Entry = dict[str, Array]
"""One logged step of a group: its columns, `step` among them."""

_HEAD = 128
"""Bytes at the start of a tail that name its writer."""
_RECORD = struct.Struct("<4sIQ")
_MAGIC = b"bwlm"
_MERGED_AT_ONCE = 2**26
"""Bytes of entries in memory while a tail is merged."""
_CHUNK = 2**18
"""Bytes of a chunk of HDF5, at most, where an entry is smaller."""
_ROOM = 2**16
"""Bytes that HDF5 may need for its own accounts in a merge."""
_COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""What every build of HDF5 reads."""
_SHARE = 0.003
"""Of the time, at most, that merging may take from its writer."""


class ResearchLog:
    """The one writer of a research log.

        with ResearchLog(Path("base.h5")) as log:
            log.write("train", step=1, loss=3.2, grad_norm=0.7)

    Raises `UserError` naming the other writer if there is one, `OSError` where the disk does not take it.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        about: Mapping[str, str | int | float] | None = None,
        fixed: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """`about` are attributes of a new file and `fixed` its datasets that hold for the whole run, by `group/name`.

        A file that is there is gone on with; entries of later steps than `resume_step` are forgotten, since a run that
        goes on from there will write them again.
        """
        self.path = path
        self._tail = _lock(path)
        try:
            began = time.monotonic()
            if not _is_readable(path):
                _create(path, about or {}, fixed or {})
            self._steps, self._shapes = _state(path)
            self._merge(resume_step)
            self._merged, self._merge_seconds = time.monotonic(), time.monotonic() - began
        except BaseException:
            self._tail.close()
            raise

    def write(self, group: str, step: int, **columns: ArrayLike) -> None:
        """Adds one step to a group. Raises `ValueError` where the columns are not the group's, or change their shape,
        or the step is not later than the group's last."""
        if step <= self._steps.get(group, -1):
            raise ValueError(f"{group}: step {step} is not after step {self._steps[group]}, the last that was logged")
        entry = {"step": np.asarray(step, np.int64)}
        for name, values in columns.items():
            entry[name] = _checked(group, name, values)
            shape = self._shapes.setdefault(f"{group}/{name}", entry[name].shape)
            if entry[name].shape != shape:
                raise ValueError(f"{group}/{name}: shape {entry[name].shape} at step {step}, {shape} before")
        payload = save_tensors({f"{group}/{name}": values for name, values in entry.items()})
        record = _RECORD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload
        if self._tail.write(record) != len(record):
            raise OSError(28, os.strerror(28), str(self.path))  # ENOSPC: a nearly full disk takes a part, quietly
        self._steps[group] = step

    def flush(self, merge: bool = False) -> None:
        """Makes what was written durable, and merges it into the file, always or where that takes little time."""
        os.fsync(self._tail.fileno())
        if merge or time.monotonic() - self._merged >= self._merge_seconds / _SHARE:
            began = time.monotonic()
            self._merge(None)
            self._merged, self._merge_seconds = time.monotonic(), time.monotonic() - began

    def close(self) -> None:
        """Merges everything into the file and lets others write."""
        try:
            self._merge(None)
            tail_of(self.path).unlink()
        finally:
            self._tail.close()

    def __enter__(self) -> ResearchLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _merge(self, last: int | None) -> None:
        """Moves the tail into the file, without what is later than `last`."""
        if self._tail.tell() > _HEAD or any(last is not None and step > last for step in self._steps.values()):
            room = self.path.stat().st_size + self._tail.tell() + _ROOM
            with _replacing(self.path, room) as copy, h5py.File(copy, "r+") as file:
                if last is not None:
                    _forget_after(file, last)
                for entries in _batches(_records(self.path), last):
                    for group, rows in entries.items():
                        _append(file, group, rows)
            self._steps, self._shapes = _state(self.path)
        self._tail.truncate(_HEAD)
        self._tail.seek(_HEAD)


def open_log(path: Path) -> h5py.File:
    """A research log to read, with what a writer that died left in its tail.

    Raises `UserError` naming the file if it is missing or damaged.
    """
    with contextlib.suppress(UserError, OSError):  # a writer is at work, or the storage is not ours to write
        if path.exists() and tail_of(path).exists() and tail_of(path).stat().st_size > _HEAD:
            ResearchLog(path).close()
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: this run kept no research log") from None
    except OSError as error:
        raise UserError(f"{path}: damaged, not readable as HDF5 ({error})") from None


def tail_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.tail")


# ---- the tail ----


def _lock(path: Path) -> BinaryIO:
    """The tail, held by this process until it is closed."""
    while True:
        file = os.fdopen(os.open(tail_of(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(_HEAD).decode(errors="replace").strip(" \0") or "another process"
            file.close()
            raise UserError(f"{path}: is being written by {holder}: a research log has one writer") from None
        with contextlib.suppress(FileNotFoundError):  # its last writer may have removed it before it let it go
            if os.path.samestat(os.fstat(file.fileno()), tail_of(path).stat()):
                break
        file.close()
    file.write(f"{socket.gethostname()}:{os.getpid()}".encode()[:_HEAD].ljust(_HEAD))
    file.seek(0, os.SEEK_END)
    return file


def _records(path: Path) -> Iterator[tuple[str, Entry]]:
    """The whole entries of a tail, up to the first that is torn or damaged."""
    with tail_of(path).open("rb") as file:
        file.seek(_HEAD)
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            magic, crc, length = _RECORD.unpack(head)
            payload = file.read(length) if magic == _MAGIC else b""
            if magic != _MAGIC or len(payload) != length or zlib.crc32(payload) != crc:
                return
            try:
                tensors = load_tensors(payload)
            except SafetensorError:
                return
            yield next(iter(tensors)).partition("/")[0], {name.partition("/")[2]: v for name, v in tensors.items()}


def _batches(records: Iterator[tuple[str, Entry]], last: int | None) -> Iterator[dict[str, list[Entry]]]:
    """Entries of steps up to `last`, by group, as many at a time as memory should hold."""
    batch: dict[str, list[Entry]] = defaultdict(list)
    size = 0
    for group, entry in records:
        if last is not None and entry["step"] > last:
            continue
        batch[group].append(entry)
        size += sum(values.nbytes for values in entry.values())
        if size >= _MERGED_AT_ONCE:
            yield batch
            batch, size = defaultdict(list), 0
    if batch:
        yield batch


# ---- the file ----


def _is_readable(path: Path) -> bool:
    """Whether there is a file to go on with; one that is damaged is put aside, loudly."""
    try:
        with h5py.File(path, "r"):
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        log.warning("%s is damaged (%s): kept as %s, the research log begins again", path, error, aside.name)
        return False


def _create(path: Path, about: Mapping[str, str | int | float], fixed: Mapping[str, ArrayLike]) -> None:
    room = _ROOM + sum(np.asarray(values).nbytes for values in fixed.values())
    with _replacing(path, room) as fresh, h5py.File(fresh, "w") as file:
        file.attrs["schema_version"] = VERSION
        file.attrs["source"] = "bwlm research log, docs/research-log.md"
        for name, value in about.items():
            file.attrs[name] = value
        for name, group in GROUPS.items():
            file.create_group(name).attrs["description"] = group.description
        for name, values in fixed.items():
            group_name, _, column = name.partition("/")
            known = GROUPS[group_name].fixed[column]
            is_text = known.dtype == "str"
            stored = np.asarray(values, dtype=object if is_text else known.dtype)
            dataset = file.create_dataset(
                name, data=stored, dtype=h5py.string_dtype() if is_text else None, **_COMPRESSION
            )
            _describe(dataset, known, known.axes)


def _describe(dataset: Any, column: Column, axes: str) -> None:
    dataset.attrs.update({"unit": column.unit, "axes": axes, "description": column.description})


def _state(path: Path) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """The last step of each group, and the shape of one entry of each column."""
    steps, shapes = {}, {}
    with h5py.File(path, "r") as file:
        for group in GROUPS:
            if group in file and "step" in file[group] and len(file[group]["step"]):
                steps[group] = int(file[group]["step"][-1])
                for name, dataset in _columns(file[group]).items():
                    shapes[f"{group}/{name}"] = dataset.shape[1:]
    return steps, shapes


def _columns(group: Any) -> dict[str, Any]:
    """The datasets of a group with an entry a step."""
    fixed = GROUPS[group.name.strip("/")].fixed
    return {name: dataset for name, dataset in group.items() if name not in fixed}


def _forget_after(file: Any, last: int) -> None:
    for name in GROUPS:
        if "step" in file[name]:
            kept = int(np.searchsorted(file[name]["step"][:], last, side="right"))
            for dataset in _columns(file[name]).values():
                dataset.resize(kept, axis=0)


def _append(file: Any, name: str, rows: Sequence[Entry]) -> None:
    """Adds entries to a group, but for those that an earlier merge took and did not come to strike from the tail."""
    group = file[name]
    there = len(group["step"]) if "step" in group else 0
    newest = int(group["step"][-1]) if there else -1
    rows = [row for row in rows if row["step"] > newest]
    known = {column for row in rows for column in row} | (set(_columns(group)) if rows else set())
    for column in sorted(known):
        given = [index for index, row in enumerate(rows) if column in row]
        if column not in group:
            _make(group, column, rows[given[0]][column])
        dataset = group[column]
        dataset.resize(there + len(rows), axis=0)  # what a step lacks is the fill value, which reads as missing
        if len(given) == len(rows):
            dataset[there:] = np.stack([row[column] for row in rows])
        else:
            for index in given:
                dataset[there + index] = rows[index][column]


def _make(group: Any, name: str, entry: Array) -> None:
    column = GROUPS[group.name.strip("/")].columns[name]
    rows = max(1, min(1024, _CHUNK // max(1, entry.nbytes)))
    dataset = group.create_dataset(
        name,
        shape=(0, *entry.shape),
        maxshape=(None, *entry.shape),
        chunks=(rows, *entry.shape),
        dtype=entry.dtype,
        fillvalue=np.nan if entry.dtype.kind == "f" else -1,
        **_COMPRESSION,
    )
    _describe(dataset, column, f"step {column.axes}".strip())


@contextlib.contextmanager
def _replacing(path: Path, room: int) -> Iterator[Path]:
    """A copy of a file (empty, if there is none) that takes its name when the block ends well.

    Raises `OSError` before the block if the disk has no room for so many bytes: HDF5 cannot close a file that it
    cannot write.
    """
    copy = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with copy.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
            file.truncate(0)
        if path.exists():
            shutil.copyfile(path, copy)
        yield copy
        sync(copy)
        copy.replace(path)
        sync(path.parent)
    finally:
        copy.unlink(missing_ok=True)


def _checked(group: str, name: str, values: ArrayLike) -> Array:
    """In the column's type. Raises `ValueError` for a column that the group has not, or values that are no numbers."""
    known = GROUPS[group].columns if group in GROUPS else {}
    if name not in known or name == "step":
        raise ValueError(f"{group}/{name}: not a column of the research log; of {group} are: {', '.join(known)}")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{group}/{name}: must be numbers, not {array.dtype}")
    wanted = known[name].dtype
    return np.asarray(array, dtype=array.dtype if wanted == "int" else wanted, order="C")
