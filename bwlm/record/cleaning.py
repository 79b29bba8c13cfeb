"""Files of a storage that nothing needs any more: found first, then removed, each so that a kill leaves no half.

Never touched: a run whose lease a process holds, a checkpoint that a child began from, any file of a run that has not
finished. A run that has finished does not resume, so only its newest checkpoint, its best one if that is asked
for, and those at multiples of `checkpoint.keep_every` are kept; of these the newest alone keeps its optimizer state.

In a bucket an item is taken out of its folder's head first, then its objects are deleted. Objects that no head names go
too, once they are so old that no push can be about to name them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from pathlib import Path

from bwlm.errors import BwlmError, UserError
from bwlm.paths import is_id, sync
from bwlm.record.bucket import source_folders
from bwlm.record.checkpoint import OPTIMIZER, KeepPolicy, checkpoint_steps, read_meta, step_folder, steps_to_keep
from bwlm.record.disk import StoredFiles
from bwlm.record.experiment import LEASE, ExperimentFolder, list_experiments, list_starting, parents_in
from bwlm.record.launches import living_launches
from bwlm.record.lease import Holder, take_at_once
from bwlm.record.removal import unfinished_deletions
from bwlm.record.run_config import RunConfig
from bwlm.storage.opened import delete_objects, living_leases, push, refresh, size_of
from bwlm.storage.opened import remove as remove_there

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|deleted)")
"""Names of files and folders that a process was about to rename, or to delete."""
CHECKPOINT, LOG = "checkpoint", "research log"
_TEXTS = ("corpora", "tokenizers", "packed")
_PLACES = ("*/*", "*/checkpoints/*", "*/samples/*", "*/evaluations/*/*/*", "grids/*/*", "grids/*/*/*", "cache/*/*")
"""Patterns of places in a storage where temporary files may lie."""
_LEAST_AGE = 3600.0
"""Seconds for which a temporary file may have a writer that holds no lease, such as a text that is being packed."""
_LEAST_PUSH_AGE = 86_400.0
"""Seconds for which objects that no head names may be of a push that goes on: it uploads one of them at least."""


@dataclass(frozen=True)
class Item:
    """File or folder that can go, and why."""

    kind: str
    path: Path
    reason: str
    folder: ExperimentFolder | None = None
    """Run that it belongs to, whose lease is held while it is removed."""
    bytes: int = 0
    keys: tuple[str, ...] = ()
    """Keys of objects in a bucket, if it is those that can go, and no file."""


@dataclass
class Unneeded:
    """Items that can go, and what was passed over although it might go."""

    items: list[Item] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of all items."""
        return sum(item.bytes for item in self.items)


def find_unneeded(files: StoredFiles, older: float, logs: bool) -> Unneeded:
    """Return what can go of what has not changed for `older` seconds; with `logs` also research logs of ended runs."""
    storage = files.storage
    found, runs = Unneeded(), list_experiments(storage)
    needed, corpora = _checkpoints_of_children(storage), set[Path]()
    busy = [str(entry.holder) for home in (storage / "grids").glob("*") for entry in living_launches(home)]
    busy += [f"the launch of {run}" for run in list_starting(storage)]
    busy += [f"{seen.holder.get('host')}:{seen.holder.get('pid')}" for _, seen in living_leases(storage)]
    held = set[str]()
    for folder in runs:
        try:
            config, holder = folder.config(), folder.busy_with()
        except UserError as error:
            found.passed_over.append(f"{folder.id}: {error}")
            busy.append(f"the text of {folder.id}, which is not known")
            continue
        corpora.add(Path(config.corpus))
        if holder is not None:
            held.add(folder.id)
            busy.append(str(holder))
            found.passed_over.append(f"{folder.id}: {holder} trains it")
        elif files.age(folder.path / "status.json") >= older:
            found.items += _sized(files, _of_run(files, folder, config, needed.get(folder.id, ()), logs))
    found.items += _sized(files, _leftovers(files, max(older, _LEAST_AGE)))
    found.items += _waste(files, max(older, _LEAST_PUSH_AGE), held)
    if busy:
        found.passed_over.append(f"cache: {busy[0]} may read it")
    else:
        used = {text.name for corpus in corpora for text in (corpus, *source_folders(corpus))}
        found.items += _sized(files, _of_cache(files, used, older))
    return found


def _sized(files: StoredFiles, items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        yield replace(item, bytes=files.size(item.path))


def _checkpoints_of_children(storage: Path) -> dict[str, set[int]]:
    """Return the steps that children of each run began from; all steps where a child's link cannot be read."""
    steps: dict[str, set[int]] = {}
    for child, parent in parents_in(storage).items():
        if parent is not None:
            steps.setdefault(parent, set()).update(_steps_begun_from(ExperimentFolder(storage, child), parent))
    return steps


def _steps_begun_from(child: ExperimentFolder, parent: str) -> list[int]:
    with contextlib.suppress(UserError):
        if link := child.link():
            return [link.step]
    return checkpoint_steps(child.path.with_name(parent) / "checkpoints")


# ---- what can go ----


def _of_run(
    files: StoredFiles, folder: ExperimentFolder, config: RunConfig, needed: Iterable[int], logs: bool
) -> Iterator[Item]:
    if folder.status().state != "finished":
        return
    yield from _checkpoints(files, folder, config, set(needed))
    if logs:
        for path in files.entries(folder.path):
            if path.name.endswith((".h5", ".h5.tail")):
                yield Item(LOG, path, "of a finished run", folder)


def _checkpoints(files: StoredFiles, folder: ExperimentFolder, config: RunConfig, needed: set[int]) -> Iterator[Item]:
    steps = checkpoint_steps(folder.checkpoints)
    settings = config.experiment.checkpoint
    try:
        metrics = {step: read_meta(folder.checkpoints, step).get("metric") for step in steps}
    except BwlmError:
        return  # a damaged checkpoint: a person decides
    kept = steps_to_keep(metrics, KeepPolicy(1, settings.keep_best, settings.keep_every)) | needed
    for step in steps[:-1]:
        path = step_folder(folder.checkpoints, step)
        if step not in kept:
            yield Item(CHECKPOINT, path, "of a finished run; kept to resume from", folder)
        elif size_of(path / OPTIMIZER) is not None:
            yield Item("optimizer state", path / OPTIMIZER, "of an earlier checkpoint of a finished run", folder)


def _leftovers(files: StoredFiles, older: float) -> Iterator[Item]:
    """Yield what killed processes left: runs that were about to be deleted, files that were about to be renamed."""
    storage = files.storage
    for path in unfinished_deletions(storage):
        yield Item("leftover", path, "of a deletion that was cut off")
    for path in sorted(path for place in _PLACES for path in storage.glob(place)):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not path.relative_to(storage).parts[0].startswith(".") and files.age(path) >= older:
            yield Item("leftover", path, "of a process that was killed", _run_of(storage, path))


def _waste(files: StoredFiles, older: float, held: set[str]) -> Iterator[Item]:
    """Yield the objects of a bucket that no head names, but of runs that a process holds."""
    if files.there is None:
        return
    now = time.time() + files.there.clock_ahead
    for waste in files.there.waste:
        folder = ExperimentFolder(files.storage, waste.folder) if is_id(waste.folder) else None
        if waste.folder in held or not (waste.is_dropped or now - waste.seconds >= older):
            continue
        reason = "replaced or deleted since" if waste.is_dropped else "of a push that was cut off"
        yield Item("leftover", files.storage / waste.prefix, reason, folder, waste.size, waste.keys)


def _run_of(storage: Path, path: Path) -> ExperimentFolder | None:
    name = path.relative_to(storage).parts[0]
    return None if name in ("grids", "cache") else ExperimentFolder(storage, name)


def _of_cache(files: StoredFiles, used: set[str], older: float) -> Iterator[Item]:
    """Yield texts that no run was trained on, and what can be computed again at once."""
    cache = files.storage / "cache"
    packed = files.entries(cache / "packed")
    old = [path for path in packed if path.name not in used and files.age(path) >= older]
    for path in old:
        yield Item("packed text", path, "no run was trained on it")
    if set(old) == set(packed):  # no packed text is left that was made from them
        for path in (path for kind in ("corpora", "tokenizers") for path in files.entries(cache / kind)):
            if files.age(path) >= older:
                yield Item("source of packed text", path, "no packed text is left")
    for kind in files.entries(cache):
        if kind.name not in _TEXTS:
            old = [path for path in files.entries(kind) if files.age(path) >= older]
            yield from (Item("cache", path, "computed again when needed") for path in old)


# ---- removing ----


def remove(item: Item) -> str:
    """Remove an item; return why it was left instead, '' if it is gone."""
    [(_, fault)] = remove_all([item])
    return fault


def remove_all(items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
    """Remove items, and yield each with the reason why it was left, '' if it is gone.

    Items of a run that follow each other are removed under one lease.
    """
    for folder, some in groupby(items, key=lambda item: item.folder):
        with contextlib.ExitStack() as until_removed:
            fault = ""
            if folder is not None and folder.exists():
                taken = take_at_once(folder.path / LEASE)
                if isinstance(taken, Holder):
                    fault = f"{taken} trains {folder.id} now"
                else:
                    until_removed.callback(taken.release)
            begun_from = cache(_begun_from)  # read anew for each run, as others begin meanwhile
            for item in some:
                is_needed = not fault and item.kind == CHECKPOINT and item.path in begun_from(item.path.parent)
                yield item, fault or ("a run begins from it now" if is_needed else _removed(item))


def _begun_from(checkpoints: Path) -> set[Path]:
    """Return those of a run's checkpoints from which others begin now, on whatever machine."""
    run = checkpoints.parent
    refresh(run.parent)
    return {step_folder(checkpoints, step) for step in _checkpoints_of_children(run.parent).get(run.name, ())}


def _removed(item: Item) -> str:
    try:
        (_remove_log if item.kind == LOG else _remove)(item)
    except FileNotFoundError:
        return ""  # another process removed it; or it lay in the bucket only
    except OSError as error:
        return f"cannot be removed ({error.strerror}): make {item.path.parent} writable"
    return ""


def _remove(item: Item) -> None:
    """Delete a file, or rename a folder in one step to a name under which nobody looks for it, then empty it."""
    if item.keys:
        delete_objects(item.path, item.keys)
        return
    if not _TEMPORARY.fullmatch(item.path.name):
        remove_there(item.path)
    if not item.path.is_dir() or item.path.is_symlink():
        item.path.unlink()
        return
    gone = item.path
    if not _TEMPORARY.fullmatch(item.path.name):
        gone = item.path.with_name(f".{item.path.name}.{uuid.uuid4().hex[:8]}.deleted")
        item.path.rename(gone)
        sync(gone.parent)
    shutil.rmtree(gone)


def _remove_log(item: Item) -> None:
    """Delete a research log once its run no longer says that it left one: a run without it is not damaged."""
    assert item.folder is not None
    item.folder.forget_record(item.path.name)
    push(item.folder.path, trained=True)
    remove_there(item.path)
    item.path.unlink()
