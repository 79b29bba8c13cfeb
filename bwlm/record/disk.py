"""Bytes that a storage takes on disk, by kind of file and by grid."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bwlm.paths import is_id
from bwlm.storage.inventory import Inventory
from bwlm.storage.objects import Listed
from bwlm.storage.opened import in_bucket, size_of, sizes_below

KINDS = (
    *("weights", "optimizer states", "research logs", "evaluations", "other files of runs"),
    *("packed texts", "other caches", "grids and analyses", "MLflow", "leftovers", "heads and leases", "other files"),
)
_CACHE = {"packed": "packed texts"}
_TOP = {"grids": "grids and analyses", "analyses": "grids and analyses", "mlartifacts": "MLflow", "mlruns": "MLflow"}


@dataclass
class DiskUsage:
    """Bytes in a storage."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Bytes by kind, one of `KINDS`."""
    grids: Counter[str] = field(default_factory=Counter)
    """Bytes of runs by the name of their grid; '' for runs outside of grids."""
    runs: Counter[str] = field(default_factory=Counter)
    """Number of runs by the name of their grid."""


class StoredFiles:
    """Files of a storage, their sizes and ages: of a folder as they lie there, of a bucket by one listing of it."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.there = Inventory(storage) if in_bucket(storage) else None
        """Objects of the bucket; None for a folder."""

    def sizes(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Yield the parts of each file's path below the storage, and its bytes."""
        if self.there is not None:
            yield from ((tuple(path.split("/")), one.size) for path, one in self.there.files.items())
        else:
            for top in _scan(self.storage):
                yield from ((Path(path).relative_to(self.storage).parts, size) for path, size in _files(top))

    def size(self, path: Path) -> int:
        """Return the bytes of a file, or of all files below a folder."""
        size = None if path.is_dir() else size_of(path)
        return bytes_in(path) if size is None else size

    def age(self, path: Path) -> float:
        """Return the seconds since the newest change in a file or folder."""
        if self.there is not None and (times := [one.seconds for _, one in self._below(path)]):
            return time.time() + self.there.clock_ahead - max(times)
        return time.time() - newest_change(path)

    def entries(self, folder: Path) -> list[Path]:
        """Return the files and folders in a folder but for hidden ones, also those in the bucket only, sorted."""
        found = {path.name for path in folder.glob("*")} | {inner.partition("/")[0] for inner, _ in self._below(folder)}
        return sorted(folder / name for name in found if not name.startswith("."))

    def _below(self, path: Path) -> list[tuple[str, Listed]]:
        """Return the bucket's file that is `path`, as '', or its files that lie below it, by their path there."""
        return self.there.below(path.relative_to(self.storage).as_posix()) if self.there is not None else []


def disk_usage(files: StoredFiles) -> DiskUsage:
    """Return the bytes of all files of a storage. Files that go meanwhile do not count."""
    usage, tops = DiskUsage(), Counter[str]()
    for parts, size in files.sizes():
        usage.kinds[_kind(parts)] += size
        tops[parts[0]] += size
    for top, size in tops.items():
        if is_id(top) and (grid := grid_of(files.storage / top)) is not None:
            usage.grids[grid] += size
            usage.runs[grid] += 1
    if files.there is not None:
        usage.kinds["heads and leases"] += files.there.own_bytes
        usage.kinds["leftovers"] += sum(waste.size for waste in files.there.waste)
    return usage


def _kind(parts: tuple[str, ...]) -> str:
    """Return the kind of a file by its path below the storage."""
    top, name = parts[0], parts[-1]
    if any(part.startswith(".") and part.endswith((".tmp", ".deleted")) for part in parts):
        return "leftovers"
    if top.startswith("mlflow.db"):
        return "MLflow"
    if top == "cache":
        return _CACHE.get(parts[1], "other caches")
    if top in _TOP or len(parts) == 1:
        return _TOP.get(top, "other files")
    if parts[1] == "checkpoints":
        return "optimizer states" if name == "optimizer.safetensors" else "weights"
    if name.endswith((".h5", ".h5.tail")):
        return "research logs"
    return "evaluations" if parts[1] == "evaluations" else "other files of runs"


def grid_of(folder: Path) -> str | None:
    """Return the grid of a run by its config alone, '' for a run outside of grids; None for a folder that is no run."""
    try:
        return str(json.loads((folder / "config.json").read_bytes()).get("grid") or "")
    except (OSError, ValueError, AttributeError):
        return None


def _scan(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        yield from entries


def _files(entry: os.DirEntry[str]) -> Iterator[tuple[str, int]]:
    """Yield each file of a folder, or the file itself, with its size; links are not followed."""
    with contextlib.suppress(OSError):
        if entry.is_dir(follow_symlinks=False):
            for inner in _scan(entry.path):
                yield from _files(inner)
        elif entry.is_file(follow_symlinks=False):
            yield entry.path, entry.stat(follow_symlinks=False).st_size


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files below a folder, also of files that lie in a bucket only."""
    return sum(sizes_below(folder).values())


def newest_change(path: Path) -> float:
    """Return the time of the newest change in a file or folder, in seconds since the epoch; 0 for what has gone."""
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = path.lstat().st_mtime
    for entry in _scan(path) if path.is_dir() and not path.is_symlink() else ():
        newest = max(newest, newest_change(Path(entry.path)))
    return newest
