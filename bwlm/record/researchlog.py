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
import errno
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from bwlm.errors import UserError
from bwlm.paths import Check, sync, unchecked
from bwlm.record.lease import Lease
from bwlm.record.researchlog_schema import GROUPS, VERSION, Column

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
"""Bytes that HDF5 may need for its own accounts in a merge, besides those of each dataset's last chunk."""
_COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""What every build of HDF5 reads."""
_SPACE: dict[str, Any] = {"fs_strategy": "fsm", "fs_persist": True}
"""The file remembers what is free in it: each merge rewrites the last chunk of every dataset, somewhere else."""
_READER = "reader "
"""Stands before the name of one that only merges what a dead writer left."""
_WAIT_SECONDS = 0.02
_SHARE = 0.003
"""Of the time, at most, that merging may take from its writer."""


class ResearchLog:
    """The one writer of a research log.

        with ResearchLog(Path("base.h5")) as log:
            log.write("train", step=1, loss=3.2, grad_norm=0.7)

    Raises `UserError` naming the other writer if there is one, `OSError` where the disk does not take it, `LeaseLost`
    where the run's lease was lost before something is renamed or deleted.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        about: Mapping[str, str | int | float] | None = None,
        fixed: Mapping[str, ArrayLike] | None = None,
        reader: bool = False,
        lease: Lease | None = None,
    ) -> None:
        """`about` are attributes of a new file and `fixed` its datasets that hold for the whole run, by `group/name`.

        A file that is there is gone on with; entries of later steps than `resume_step` are forgotten, since a run that
        goes on from there will write them again. A `reader` merges what a dead writer left, and is waited for. Who
        holds the run's `lease` takes the tail from a writer that lost it and is frozen.
        """
        self.path = path
        self._check = lease.check if lease else unchecked
        self._tail = _lock(path, _READER if reader else "", lease)
        try:
            began = time.monotonic()
            if not self._goes_on(resume_step):
                _create(path, about or {}, fixed or {}, self._check)
                self._begin(resume_step)
            self._merged, self._merge_seconds = time.monotonic(), time.monotonic() - began
        except BaseException:
            self._tail.close()
            raise

    def write(self, group: str, step: int, **columns: ArrayLike) -> None:
        """Adds one step to a group; what it leaves out reads as missing (NaN, or -1 among integers).

        Raises `ValueError` where the columns are not the group's, or hold no numbers, or change their shape or type,
        or the step is not later than the group's last; `OSError` where the disk does not take it. Nothing of the entry
        is kept then.
        """
        entry = {"step": _checked_step(group, step, self._steps.get(group))}
        entry |= {name: _checked(group, name, values) for name, values in columns.items()}
        kinds = {f"{group}/{name}": Kind(values.dtype, values.shape) for name, values in entry.items()}
        for name, kind in kinds.items():
            if (before := self._kinds.get(name, kind)) != kind:
                raise ValueError(f"{name}: {kind} at step {step}, {before} before")
        payload = save_tensors({f"{group}/{name}": values for name, values in entry.items()})
        self._add(_RECORD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload)
        self._steps[group] = step
        self._kinds |= kinds

    def _add(self, record: bytes) -> None:
        """Appends to the tail all of a record or nothing: what stood behind a torn one could not be read."""
        end = self._tail.tell()
        try:
            if self._tail.write(record) != len(record):  # a nearly full disk takes a part, quietly
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except BaseException:
            self._tail.truncate(end)
            self._tail.seek(end)
            raise

    def sync(self) -> None:
        """Makes what was written durable; any thread may."""
        os.fsync(self._tail.fileno())

    def merge(self, now: bool = True) -> None:
        """Moves what was written into the file, `now` or where that has come to take little of the time."""
        if now or time.monotonic() - self._merged >= self._merge_seconds / _SHARE:
            began = time.monotonic()
            self._merge(None)
            self._merged, self._merge_seconds = time.monotonic(), time.monotonic() - began

    def close(self) -> None:
        """Merges everything into the file and lets others write."""
        try:
            self._merge(None)
            self._check()
            tail_of(self.path).unlink()
        finally:
            self._tail.close()

    def __enter__(self) -> ResearchLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _goes_on(self, resume_step: int | None) -> bool:
        """Begins where the file ends, if there is one; one that is damaged is put aside, loudly."""
        try:
            self._begin(resume_step)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # whatever h5py calls what it cannot decode
            if isinstance(error, OSError) and error.errno:  # the system's, such as a full disk
                raise
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self._check()
            self.path.replace(aside)
            log.warning("%s is damaged (%s): kept as %s, the research log begins again", self.path, error, aside.name)
            return False
        return True

    def _begin(self, resume_step: int | None) -> None:
        self._steps, self._kinds = _state(self.path)
        self._merge(resume_step)

    def _merge(self, last: int | None) -> None:
        """Moves the tail into the file, without what is later than `last`."""
        if self._tail.tell() > _HEAD or any(last is not None and step > last for step in self._steps.values()):
            rewritten = sum(_chunk_rows(kind) * kind.nbytes for kind in self._kinds.values())
            room = self.path.stat().st_size + self._tail.tell() + rewritten + _ROOM
            with _replacing(self.path, room, self._check) as copy, h5py.File(copy, "r+") as file:
                if last is not None:
                    _forget_after(file, last)
                for entries in _batches(_records(self.path), last):
                    for group, rows in entries.items():
                        _append(file, group, rows)
            self._steps, self._kinds = _state(self.path)
        self._tail.truncate(_HEAD)
        self._tail.seek(_HEAD)


def open_log(path: Path) -> h5py.File:
    """A research log to read, with what a writer that died left in its tail.

    Raises `UserError` naming the file if it is missing or damaged.
    """
    try:
        h5py.File(path, "r").close()  # first: a reader does not put a damaged one aside
        with contextlib.suppress(UserError, OSError):  # a writer is at work, or the storage is not ours to write
            if tail_of(path).exists() and tail_of(path).stat().st_size > _HEAD:
                ResearchLog(path, reader=True).close()
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: this run kept no research log") from None
    except OSError as error:
        raise UserError(f"{path}: damaged, not readable as HDF5 ({' '.join(str(error).split())})") from None


def fault_of_log(path: Path, due: int) -> list[str]:
    """The fault of an ended run's log, if it has one; `due` is the last step of its group `train`, 0: unknown."""
    try:
        with h5py.File(path, "r") as file:
            steps = [int(step) for step in file["train/step"][-1:]] if "train/step" in file else []
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # whatever h5py calls what it cannot decode
        return [f"{path.name}: damaged ({' '.join(str(error).split())})"]
    return [f"{path.name}: ends at step {step:,} instead of {due:,}" for step in steps if due and step != due]


def tail_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.tail")


# ---- the tail ----


def _lock(path: Path, role: str, lease: Lease | None) -> BinaryIO:
    """The tail, held by this process until it is closed."""
    before = None
    while True:
        file: BinaryIO = os.fdopen(os.open(tail_of(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(_HEAD).decode(errors="replace").strip(" \0") or "another process"
            file.close()
            merges = holder.startswith(_READER) and not role  # which takes moments, and it lets go
            if not merges and lease is None:
                raise UserError(f"{path}: is being written by {holder}: a research log has one writer") from None
            if not merges and lease and holder == before:  # not at once: a reader may not have said yet that it is one
                file = _take_tail(path, lease)
                break
            before = holder
            time.sleep(_WAIT_SECONDS)
            continue
        with contextlib.suppress(FileNotFoundError):  # its last writer may have removed it before it let it go
            if os.path.samestat(os.fstat(file.fileno()), tail_of(path).stat()):
                break
        file.close()
    file.write(f"{role}{socket.gethostname()}:{os.getpid()}".encode()[:_HEAD].ljust(_HEAD))
    file.seek(0, os.SEEK_END)
    return file


def _take_tail(path: Path, lease: Lease) -> BinaryIO:
    """A copy in the tail's place, held by this process: whoever has the tail writes to a file without a name then."""
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


def _records(path: Path) -> Iterator[tuple[str, Entry]]:
    """The whole entries of a tail, up to the first that is torn or damaged."""
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


@dataclass(frozen=True)
class Kind:
    """What every entry of a column is like."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def _create(path: Path, about: Mapping[str, str | int | float], fixed: Mapping[str, ArrayLike], check: Check) -> None:
    room = _ROOM + sum(np.asarray(values).nbytes for values in fixed.values())
    with _replacing(path, room, check) as fresh, h5py.File(fresh, "w", **_SPACE) as file:
        file.attrs["schema_version"] = VERSION
        file.attrs["source"] = "bwlm research log, docs/research-log.md"
        for name, value in about.items():
            file.attrs[name] = value
        for name, group in GROUPS.items():
            file.create_group(name).attrs["description"] = group.description
        for name, values in fixed.items():
            known = _fixed_column(name)
            is_text = known.dtype == "str"
            stored = np.asarray(values, dtype=object if is_text else known.dtype)
            dataset = file.create_dataset(
                name, data=stored, dtype=h5py.string_dtype() if is_text else None, **_COMPRESSION
            )
            _describe(dataset, known, known.axes)


def _fixed_column(name: str) -> Column:
    group, _, column = name.partition("/")
    known = GROUPS[group].fixed if group in GROUPS else {}
    if column not in known:
        raise ValueError(f"{name}: no dataset that holds for a whole run; {group} has: {', '.join(known) or 'none'}")
    return known[column]


def _describe(dataset: Any, column: Column, axes: str) -> None:
    dataset.attrs.update({"unit": column.unit, "axes": axes, "description": column.description})


def _state(path: Path) -> tuple[dict[str, int], dict[str, Kind]]:
    """The last step of each group, and what its columns are like."""
    steps, kinds = {}, {}
    with h5py.File(path, "r") as file:
        for group in GROUPS:
            for name, dataset in _columns(file[group]).items():
                kinds[f"{group}/{name}"] = Kind(dataset.dtype, dataset.shape[1:])
            if "step" in file[group] and len(file[group]["step"]):
                steps[group] = int(file[group]["step"][-1])
    return steps, kinds


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
    """Adds entries to a group, except those that an interrupted merge had added already."""
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
    dataset = group.create_dataset(
        name,
        shape=(0, *entry.shape),
        maxshape=(None, *entry.shape),
        chunks=(_chunk_rows(Kind(entry.dtype, entry.shape)), *entry.shape),
        dtype=entry.dtype,
        fillvalue=np.nan if entry.dtype.kind == "f" else -1,
        **_COMPRESSION,
    )
    _describe(dataset, column, f"step {column.axes}".strip())


def _chunk_rows(kind: Kind) -> int:
    return max(1, min(1024, _CHUNK // kind.nbytes))


@contextlib.contextmanager
def _replacing(path: Path, room: int, check: Check) -> Iterator[Path]:
    """A copy of a file (empty, if there is none) that takes its name when the block ends well and `check` lets it.

    Raises `OSError` before the block if the disk has no room for so many bytes: HDF5 cannot close a file that it
    cannot write.
    """
    left = list(path.parent.glob(f".{path.name}.????????.tmp"))  # by writers that died here
    check()
    for other in left:
        other.unlink(missing_ok=True)
    copy = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with copy.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
            file.truncate(0)
        if path.exists():
            shutil.copyfile(path, copy)
        yield copy
        sync(copy)
        check()
        copy.replace(path)
        sync(path.parent)
    finally:
        copy.unlink(missing_ok=True)


def _checked_step(group: str, step: int, last: int | None) -> Array:
    """Raises `ValueError` for a group that there is not, or a step that is no count or not after the last."""
    if group not in GROUPS:
        raise ValueError(f"{group}: not a group of the research log; those are: {', '.join(GROUPS)}")
    if not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"{group}: step {step!r} is not a whole number from 0")
    if last is not None and step <= last:
        raise ValueError(f"{group}: step {step} is not after step {last}, the last that was logged")
    return np.asarray(step, np.int64)


def _checked(group: str, name: str, values: ArrayLike) -> Array:
    """In the column's type. Raises `ValueError` for a column that the group has not, or values that do not fit it."""
    known = GROUPS[group].columns
    if name not in known or name == "step":
        raise ValueError(f"{group}/{name}: not a column of the research log; of {group} are: {', '.join(known)}")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{group}/{name}: not an array ({error})") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{group}/{name}: must be numbers, not {array.dtype}")
    axes = known[name].axes.split()
    if array.ndim != len(axes) or not array.size:
        raise ValueError(f"{group}/{name}: shape {array.shape}; its axes are [{' '.join(axes)}], none of them empty")
    wanted = np.dtype(_integer(array.dtype) if known[name].dtype == "int" else known[name].dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        stored = np.asarray(array, dtype=wanted, order="C")
    if wanted.kind == "i" and (stored != array).any():
        raise ValueError(f"{group}/{name}: holds what {wanted} cannot")
    return stored


def _integer(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The signed integers that hold values of a type: -1 stands for what is missing."""
    signed = np.promote_types(dtype, np.int8)
    return signed if signed.kind == "i" else np.dtype(np.int64)
