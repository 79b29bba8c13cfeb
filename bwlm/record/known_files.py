"""Findings on files, such as their SHA-256, known again by the files' states: a file that stays is read once.

Below a storage the findings are kept between processes, in its cache. A finding holds for one state of a file: its
size, times and inode. An edit that keeps the size and sets the time of its last change back has another state
still, so it is noticed. A file that changed in the last seconds is read again by the next process: within a tick of
the file system's clock it could change twice.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bwlm.paths import FileState, sha256_of
from bwlm.record.storage_cache import StorageCache

_VERSION = 1
_ENTRY = "findings"
SHA256 = "sha256"
SETTLED_SECONDS = 2.0
"""Seconds since its last change after which a file's state stands for its content: FAT's clock has the longest tick."""

_known: dict[tuple[FileState, str], str] = {}
"""Findings of this process by the file's state and the name of the finding."""


def finding(state: FileState, name: str, find: Callable[[Path], str]) -> str:
    """Return what `find` says of a file in this state; it is called if nobody has asked before.

    A finding is the SHA-256 of a file, or the faults that were looked for: '' if there are none.
    """
    key = (state, name)
    if key not in _known:
        _known[key] = find(Path(state.path))
    return _known[key]


def sha256_by_state(state: FileState) -> str:
    """Return the SHA-256 of a file in this state, in hex."""
    return finding(state, SHA256, sha256_of)


@contextlib.contextmanager
def kept_findings(storage: Path) -> Iterator[None]:
    """Know what other processes found of the files of a storage, and keep what is found while the block runs."""
    cache = StorageCache(storage, "files", _VERSION)
    kept = _read(cache)
    for path, (state, found) in kept.items():
        for name, value in found.items():
            _known.setdefault((FileState(f"{storage}/{path}", *state), name), value)
    before = set(_known)
    yield
    if new := _known.keys() - before:
        _merge(kept, new, storage)
        there = {path.name for path in storage.iterdir()} if storage.is_dir() else set()
        kept = {path: entry for path, entry in kept.items() if path.partition("/")[0] in there}
        cache.write(_ENTRY, json.dumps(kept).encode())


_Kept = dict[str, tuple[list[int], dict[str, str]]]
"""State of each file without its path, and what was found of it, by its path below the storage."""


def _read(cache: StorageCache) -> _Kept:
    content = cache.read(_ENTRY)
    return dict(json.loads(content)) if content else {}


def _merge(kept: _Kept, new: set[tuple[FileState, str]], storage: Path) -> None:
    """Add the new findings on files below the storage that have not changed in the last seconds."""
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    for state, name in new:
        below = state.path.removeprefix(f"{storage}/")
        is_fault = name != SHA256 and _known[state, name]  # the disk may read the file tomorrow
        if below == state.path or is_fault or max(state.changed, state.modified) > settled:
            continue
        own = list(state[1:])
        found = kept[below][1] if below in kept and kept[below][0] == own else {}
        kept[below] = own, found | {name: _known[state, name]}
