"""Research log `<phase>.h5`: the loss of every token, and statistics from inside the model, step by step.

An HDF5 file that is written in place does not survive the death of its writer. So entries are appended to a tail
beside it (`researchlog_tail.py`), and from time to time the tail is merged into a copy that is renamed to the file. A
reader, beside a running training or after a kill, sees whole entries from the first to the last merge; later entries
are in the tail, and the next writer merges them.

Every group is a table: its datasets have one entry a logged step along their first axis, and one of them is `step`.
Datasets that hold for the whole run (`fixed`) have no such axis. `researchlog_schema.py` describes them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bwlm.errors import UserError
from bwlm.paths import Check, sync, unchecked
from bwlm.record.lease import Lease
from bwlm.record.researchlog_schema import GROUPS, VERSION, Column
from bwlm.record.researchlog_tail import Entry, Tail, entries_of, has_entries

log = logging.getLogger(__name__)

Array = NDArray[Any]
_CHUNK = 2**18
"""Bytes of an HDF5 chunk, at most, if an entry is smaller."""
_ROOM = 2**16
"""Bytes that HDF5 may need for its own accounts in a merge, besides each dataset's last chunk."""
_COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""Compression that every build of HDF5 reads."""
_SPACE: dict[str, Any] = {"fs_strategy": "fsm", "fs_persist": True}
"""Strategy for free space: the file remembers it, since each merge rewrites every dataset's last chunk elsewhere."""
_SHARE = 0.003
"""Share of the writer's time that merging may take, at most."""


class ResearchLog:
    """Writer of a research log, which has one at a time.

        with ResearchLog(Path("base.h5")) as log:
            log.write("train", step=1, loss=3.2, grad_norm=0.7)

    Raises `UserError` naming the other writer if there is one, `OSError` if the disk does not take an entry,
    `LeaseLost` if the run's lease was lost before something is renamed or deleted.
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
        """Open the log, or make it.

        `about` are attributes of a new file and `fixed` its datasets that hold for the whole run, by `group/name`. An
        existing file is continued; entries of later steps than `resume_step` are dropped, since a run that resumes
        there will write them again. A `reader` merges what a dead writer left, and other writers wait for it. The
        holder of the run's `lease` takes the tail from a writer that lost the lease and is frozen.
        """
        self.path = path
        self._check = lease.check if lease else unchecked
        self._tail = Tail(path, reader, lease)
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
        """Add one step to a group; columns that are left out read as missing (NaN, or -1 among integers).

        Raises `ValueError` if the columns are not the group's, or hold no numbers, or change their shape or type, or
        if the step is not later than the group's last; `OSError` if the disk does not take it. Nothing of the entry
        is kept then.
        """
        entry = {"step": _checked_step(group, step, self._steps.get(group))}
        entry |= {name: _checked(group, name, values) for name, values in columns.items()}
        kinds = {f"{group}/{name}": Kind(values.dtype, values.shape) for name, values in entry.items()}
        for name, kind in kinds.items():
            if (before := self._kinds.get(name, kind)) != kind:
                raise ValueError(f"{name}: {kind} at step {step}, {before} before")
        self._tail.append(group, entry)
        self._steps[group] = step
        self._kinds |= kinds

    def sync(self) -> None:
        """Make the written entries durable; any thread may call it."""
        self._tail.sync()

    def merge(self, now: bool = True) -> None:
        """Move the tail into the file: `now`, or only if a merge would take little of the time by now."""
        if now or time.monotonic() - self._merged >= self._merge_seconds / _SHARE:
            began = time.monotonic()
            self._merge(None)
            self._merged, self._merge_seconds = time.monotonic(), time.monotonic() - began

    def close(self) -> None:
        """Merge everything into the file, and let others write."""
        try:
            self._merge(None)
            self._check()
            self._tail.delete()
        finally:
            self._tail.close()

    def __enter__(self) -> ResearchLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _goes_on(self, resume_step: int | None) -> bool:
        """Continue an existing file, and return whether there is one.

        A damaged file is renamed, with a warning, and counts as missing.
        """
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
            log.warning("%s is damaged (%s): kept as %s; a new research log begins", self.path, error, aside.name)
            return False
        return True

    def _begin(self, resume_step: int | None) -> None:
        self._steps, self._kinds = _state(self.path)
        self._merge(resume_step)

    def _merge(self, last: int | None) -> None:
        """Move the tail into the file; drop entries of steps later than `last`, from both."""
        if self._tail.size or any(last is not None and step > last for step in self._steps.values()):
            rewritten = sum(_chunk_rows(kind) * kind.nbytes for kind in self._kinds.values())
            room = self.path.stat().st_size + self._tail.size + rewritten + _ROOM
            with _replacing(self.path, room, self._check) as copy, h5py.File(copy, "r+") as file:
                if last is not None:
                    _forget_after(file, last)
                for entries in entries_of(self.path, last):
                    for group, rows in entries.items():
                        _append(file, group, rows)
            self._steps, self._kinds = _state(self.path)
        self._tail.clear()


def open_log(path: Path) -> h5py.File:
    """Return a research log open for reading, with the entries that a dead writer left in its tail.

    Raises `UserError` naming the file if it is missing or damaged.
    """
    try:
        h5py.File(path, "r").close()  # first: a damaged file raises here, and a reader does not rename it
        with contextlib.suppress(UserError, OSError):  # a writer is at work, or the storage is not ours to write
            if has_entries(path):
                ResearchLog(path, reader=True).close()
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: this run has no research log: name another run") from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, not readable as HDF5 ({reason}): put the file back") from None


def fault_of_log(path: Path, due: int) -> list[str]:
    """Return the fault of an ended run's log, if any; `due` is the last step of group `train`, or 0 if unknown."""
    try:
        with h5py.File(path, "r") as file:
            steps = [int(step) for step in file["train/step"][-1:]] if "train/step" in file else []
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # whatever h5py calls what it cannot decode
        return [f"{path.name}: damaged ({' '.join(str(error).split())})"]
    return [f"{path.name}: ends at step {step:,} instead of {due:,}" for step in steps if due and step != due]


# ---- the file ----


@dataclass(frozen=True)
class Kind:
    """Type and shape that every entry of a column has."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of an entry."""
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
    """Return the last step of each group, and the kind of each column."""
    steps, kinds = {}, {}
    with h5py.File(path, "r") as file:
        for group in GROUPS:
            for name, dataset in _columns(file[group]).items():
                kinds[f"{group}/{name}"] = Kind(dataset.dtype, dataset.shape[1:])
            if "step" in file[group] and len(file[group]["step"]):
                steps[group] = int(file[group]["step"][-1])
    return steps, kinds


def _columns(group: Any) -> dict[str, Any]:
    """Return the datasets of a group that have an entry a step."""
    fixed = GROUPS[group.name.strip("/")].fixed
    return {name: dataset for name, dataset in group.items() if name not in fixed}


def _forget_after(file: Any, last: int) -> None:
    for name in GROUPS:
        if "step" in file[name]:
            kept = int(np.searchsorted(file[name]["step"][:], last, side="right"))
            for dataset in _columns(file[name]).values():
                dataset.resize(kept, axis=0)


def _append(file: Any, name: str, rows: Sequence[Entry]) -> None:
    """Add entries to a group, except entries that an interrupted merge had added already."""
    group = file[name]
    there = len(group["step"]) if "step" in group else 0
    newest = int(group["step"][-1]) if there else -1
    rows = [row for row in rows if row["step"] > newest]
    known = {column for row in rows for column in row} | (set(_columns(group)) if rows else set())
    for column in sorted(known):
        present = [index for index, row in enumerate(rows) if column in row]
        if column not in group:
            _make(group, column, rows[present[0]][column])
        dataset = group[column]
        dataset.resize(there + len(rows), axis=0)  # what a step lacks is the fill value, which reads as missing
        if len(present) == len(rows):
            dataset[there:] = np.stack([row[column] for row in rows])
        else:
            for index in present:
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
    """Yield a copy of a file (empty if there is none), which is renamed to it if the block succeeds and `check` passes.

    Raises `OSError` before the block if the disk has no room for `room` bytes: HDF5 cannot close a file that it
    cannot write.
    """
    left = list(path.parent.glob(f".{path.name}.????????.tmp"))  # of writers that died in this block
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
    """Return a step as an array. Raises `ValueError` for an unknown group, or a step that is no count or not later."""
    if group not in GROUPS:
        raise ValueError(f"{group}: not a group of the research log; those are: {', '.join(GROUPS)}")
    if not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"{group}: step {step!r} is not a whole number from 0")
    if last is not None and step <= last:
        raise ValueError(f"{group}: step {step} is not after step {last}, the last that was logged")
    return np.asarray(step, np.int64)


def _checked(group: str, name: str, values: ArrayLike) -> Array:
    """Return values in the column's type. Raises `ValueError` for an unknown column, or values that do not fit it."""
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
    """Return the signed integer type that holds values of a type, and -1 for a missing one."""
    signed = np.promote_types(dtype, np.int8)
    return signed if signed.kind == "i" else np.dtype(np.int64)
