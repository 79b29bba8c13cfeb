"""Large files of a storage in a bucket, brought here before they are read: weights, research logs, packed texts.

Small files are here since the command began (`bwlm/storage/opened.py`). For a storage that is a folder nothing is done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bwlm.errors import RunError
from bwlm.paths import read_json
from bwlm.record.checkpoint import MODEL, checkpoint_steps, step_folder
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder
from bwlm.storage.keeper import rest_words
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import all_here, all_there, fetch, in_bucket, pull, push, shared, sizes_below

_AT_ONCE = 16
"""Folders that are pushed at once."""


def fetch_weights(folder: ExperimentFolder, step: int) -> None:
    """Bring the weights of a run's checkpoint here."""
    fetch(step_folder(folder.checkpoints, step) / MODEL)


def fetch_named_weights(storage: Path, checkpoint: str) -> None:
    """Bring the weights here of the checkpoint `ID`, `ID@STEP` or `ID@best`, if there is one."""
    name = CheckpointName.parse(checkpoint)
    folder = ExperimentFolder(storage, name.run)
    if in_bucket(storage) and folder.exists() and checkpoint_steps(folder.checkpoints):
        fetch_weights(folder, name.step_in(folder))


def fetch_log(path: Path) -> None:
    """Bring a run's research log here, with its tail."""
    for name in (path.name, f"{path.name}.tail"):
        fetch(path.with_name(name))


def fetch_text(packed: Path) -> None:
    """Bring a packed text here; the rows of a mixture lie in the folders of its sources."""
    if in_bucket(packed):
        _fetch_whole(packed)
        for source in source_folders(packed):
            _fetch_whole(source)


def _fetch_whole(packed: Path) -> None:
    if not _manifest(packed).exists():  # it comes last, and a text never changes
        fetch(packed)


def _manifest(packed: Path) -> Path:
    return packed / "manifest.json"


def bring_run(folder: ExperimentFolder) -> None:
    """Bring here what a worker reads to train a run: its settings, its text, and the weights that it begins from."""
    pull(folder.path)
    fetch_text(Path(folder.config().corpus))
    if (link := folder.link()) and not checkpoint_steps(folder.checkpoints):
        parent = ExperimentFolder(folder.path.parent, link.parent)
        pull(parent.path)
        fetch_weights(parent, link.step)


def push_text(packed: Path) -> None:
    """Take a packed text to the bucket, unless it lies elsewhere or is there already."""
    if in_bucket(packed):
        for folder in (packed, *source_folders(packed)):
            fetch(folder)  # nothing, unless another machine has made the same text: then it need not be pushed
            push(folder)


def source_folders(packed: Path) -> list[Path]:
    """Return the folders besides its own that hold rows of a packed text: those of a mixture's sources."""
    if not _manifest(packed).exists() and set(sizes_below(packed)) == {_manifest(packed).name}:
        fetch(packed)  # a mixture, which has no rows of its own
    if not _manifest(packed).exists():
        return []
    splits = [split for split in read_json(_manifest(packed)).values() if isinstance(split, dict) and "shards" in split]
    files = [str(shard["file"]) for split in splits for shard in split["shards"]]
    folders = {Path(os.path.normpath(packed / "train" / file)).parents[1] for file in files if ".." in file}
    return sorted(folders)


def push_runs(folders: Iterable[Path], trained: bool = False) -> None:
    """Take to the bucket what was written in the folders of runs or grids. Raises as `push`."""
    meant = [folder for folder in folders if in_bucket(folder)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(partial(push, trained=trained), meant))


def push_rest(folders: Iterable[Path]) -> None:
    """Take to the bucket whatever was written here and is not there yet, also by trainings whose last push failed.

    Raises `RunError` with the command that does so later, if the bucket does not answer.
    """
    for path in folders:
        if folder := shared(path):
            with rest_told(folder.root):
                folder.push_rest()


@contextmanager
def rest_told(root: Path) -> Iterator[None]:
    """Add to the error of a bucket that does not answer in the block how its records get there later."""
    try:
        yield
    except BucketAway as error:
        raise RunError(f"{error}; {rest_words(root)}") from None


def push_all(root: Path) -> tuple[list[str], list[str]]:
    """Push whatever waits in a working folder; return the names of the folders, and of those that were out of date."""
    pushed: list[str] = []
    outdated: list[str] = []
    for folder in all_here(root):
        if folder.waiting():
            with rest_told(root):
                (pushed if folder.push_rest() else outdated).append(folder.name)
    return pushed, outdated


def copy_out(root: Path, target: Path) -> list[str]:
    """Copy every folder of a bucket's storage with all its files below `target`; return their names."""
    folders = all_there(root)
    for folder in folders:
        folder.fetch("*")
    folders = [folder for folder in folders if folder.path.exists()]
    for folder in folders:
        shutil.copytree(folder.path, target / folder.name, ignore=shutil.ignore_patterns(".*"))
    return [folder.name for folder in folders]
