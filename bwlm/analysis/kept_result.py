"""Result of an analysis that was made before of the same files, by the same code: it is told again, not made again.

A result holds as long as every file that it was made from is in the same state (size, times, inode), and every file
that it wrote has the same content. Runs that have not ended, and files that changed in the last seconds, leave none.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bwlm.paths import FileState, file_state, sha256_of
from bwlm.record.config_file import CONFIG
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import NAME
from bwlm.record.known_files import SETTLED_SECONDS
from bwlm.record.lineage import LINK
from bwlm.record.storage_cache import StorageCache

_VERSION = 1
_LIBRARIES = ("numpy", "pandas", "pyarrow", "scipy", "altair", "vl-convert-python")
_OF_A_RUN = (CONFIG, "status.json", LINK, NAME)
_OF_AN_EVALUATION = ("validation.json", "validation.parquet")
_OF_AN_ANCESTOR = (CONFIG, LINK)
"""Files from which labels take the settings of ancestors."""


@dataclass(frozen=True)
class KeptResult:
    """Result of a command that reads configs, journals and losses of runs, and writes charts and tables."""

    storage: Path
    command: Sequence[str]
    """Words that name the result: of one name the newest is kept."""
    folders: Sequence[ExperimentFolder]
    notes: Sequence[str]
    """Notes on the choice of runs, which can change while the files of the others stay."""

    def find(self) -> dict[str, Any] | None:
        """Return what was kept; None if there is none or a file has changed. To call before they are read."""
        made_from = self._made_from
        if (content := self._cache.read(self._name)) is None:
            return None
        kept: dict[str, Any] = json.loads(content)
        if kept["made_from"] != made_from or not all(map(_stands, kept["files"].items())):
            return None
        return dict(kept["content"])

    def keep(self, content: dict[str, Any], files: Sequence[Path]) -> None:
        """Keep the content, JSON, of a result that has written `files`."""
        if not self._made_from:
            return
        written = {str(path): sha256_of(path) for path in files}
        kept = {"made_from": self._made_from, "files": written, "content": content}
        self._cache.write(self._name, json.dumps(kept).encode())

    @property
    def _cache(self) -> StorageCache:
        return StorageCache(self.storage, "results", _VERSION)

    @property
    def _name(self) -> str:
        return _digest(list(self.command))

    @cached_property
    def _made_from(self) -> str:
        """Digest of all that the result follows from, as it was at first; '' if some of it has just changed."""
        states = [state for folder in self.folders for state in _states(folder)]
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        if any(max(state.changed, state.modified) > settled for state in states):
            return ""
        statuses = [asdict(status) for folder in self.folders if not (status := folder.status()).ended]
        places = [(state.path.removeprefix(f"{self.storage}/"), *state[1:]) for state in states]
        return _digest([_code(), [folder.id for folder in self.folders], places, statuses, list(self.notes)])


def _states(folder: ExperimentFolder) -> Iterator[FileState]:
    """Yield the states of the files of a run, and of its ancestors, that are there."""
    home = str(folder.path)
    paths = [f"{home}/{name}" for name in _OF_A_RUN]
    evaluations = f"{home}/evaluations/{folder.config().experiment.phase}"
    if os.path.isdir(evaluations):  # noqa: PTH112 (as `file_state`)
        readings = sorted(os.listdir(evaluations))  # noqa: PTH208
        paths += [f"{evaluations}/{reading}/{name}" for reading in readings for name in _OF_AN_EVALUATION]
    link = folder.link()
    paths += [f"{folder.path.parent}/{run}/{name}" for run in (link.chain if link else ()) for name in _OF_AN_ANCESTOR]
    for path in paths:
        try:
            yield file_state(path)
        except OSError:
            continue


def _stands(written: tuple[str, str]) -> bool:
    """Return whether a file has the content that was written."""
    path, digest = written
    return Path(path).is_file() and sha256_of(Path(path)) == digest


@cache
def _code() -> str:
    """Return a digest of bwlm's code and of the versions of the libraries that compute and draw."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256(" ".join([platform.python_version(), *map(version, _LIBRARIES)]).encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
