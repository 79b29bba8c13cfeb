"""Bytes that a storage takes on disk, by kind of file and by grid."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bwlm.paths import is_id
from bwlm.storage.opened import sizes_below

KINDS = (
    *("weights", "optimizer states", "research logs", "evaluations", "other files of runs"),
    *("packed texts", "other caches", "grids and analyses", "MLflow", "leftovers", "other files"),
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


def disk_usage(storage: Path) -> DiskUsage:
    """Return the bytes of all files below a storage. Files that go meanwhile do not count."""
    usage = DiskUsage()
    for top in _scan(storage):
        size = Counter[str]()
        for path, of_file in _files(top):
            size[_kind(Path(path).relative_to(storage).parts)] += of_file
        usage.kinds.update(size)
        if is_id(top.name) and (grid := grid_of(Path(top.path))) is not None:
            usage.grids[grid] += size.total()
            usage.runs[grid] += 1
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
