"""Deletion of a run or a grid: of each run all of it or nothing, even if the process that deletes it is killed.

A folder is not emptied file by file where it lies: with its config gone but its checkpoints left it would be no
experiment, and still the next run of that id would resume from them. It is renamed first, in one step, to a name
under which nothing looks for a run. The next deletion removes what a kill leaves of it then. The run in MLflow stays.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Collection, Iterable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import is_id, sync
from bwlm.progress import track
from bwlm.record.disk import grid_of
from bwlm.record.experiment import LAUNCH, LEASE, ExperimentFolder, list_experiments, parents_in
from bwlm.record.grids import cells_of, grid_folder, grid_names
from bwlm.record.launches import living_launches
from bwlm.record.lease import Holder, Lease, take_at_once
from bwlm.record.lineage import Lineage
from bwlm.storage.opened import exclusive, in_bucket, refresh, remove

_NAMED = 3
"""Number of children that an error names."""


def check_deletable(folder: ExperimentFolder, besides: Collection[str] = (), lineage: Lineage | None = None) -> None:
    """Raise `UserError` if runs begin from this one, if a process trains it, or if its folder is a symbolic link.

    `besides` are runs that are deleted before this one. The `lineage` of the storage is read if it is not given.
    """
    if folder.path.is_symlink():
        raise UserError(f"{folder.path}: a symbolic link to {folder.path.readlink()}: delete link and folder by hand")
    lineage = lineage or lineage_of(folder.path.parent)
    if children := [child for child in lineage.children(folder.id) if child not in besides]:
        more = f" and {len(children) - _NAMED} more" if len(children) > _NAMED else ""
        begin = "begins from it: delete that" if len(children) == 1 else "begin from it: delete those"
        raise UserError(f"{folder.id}: {', '.join(children[:_NAMED])}{more} {begin} first")
    if holder := folder.busy_with():
        raise _is_busy(folder, holder)


def lineage_of(storage: Path) -> Lineage:
    """Return the lineage of all runs of a storage."""
    return Lineage(parents_in(storage))


def children_first(folders: Iterable[ExperimentFolder], lineage: Lineage) -> list[ExperimentFolder]:
    """Return the runs in an order in which they can be deleted."""
    chosen = {folder.id: folder for folder in folders}
    ordered: dict[str, ExperimentFolder] = {}

    def add(folder: ExperimentFolder) -> None:
        for child in lineage.children(folder.id):
            if child in chosen and child not in ordered:
                add(chosen[child])
        ordered.setdefault(folder.id, folder)

    for folder in chosen.values():
        add(folder)
    return list(ordered.values())


def delete(folder: ExperimentFolder, besides: Collection[str] = (), lineage: Lineage | None = None) -> None:
    """Delete a run's folder. Raises `UserError` as `check_deletable`, or if the disk refuses."""
    check_deletable(folder, besides, lineage)
    gone = folder.path.with_name(f".{folder.id}.{uuid.uuid4().hex[:8]}.deleted")
    try:
        with ExitStack() as leases:
            # so that nobody begins to train it, or finds it half gone
            lease, _ = (_hold(folder, name, leases) for name in (LEASE, LAUNCH))
            _rename_deleted(folder.path, gone, lease.claim.number if lease.claim else None)
        sync(gone.parent)  # else a power cut might bring the name back without all of the run's files
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be deleted ({error.strerror}): make it and {folder.path.parent} writable, then "
            "delete it again"
        ) from None
    discard_deleted(folder.path.parent)
    if gone.exists():
        raise UserError(f"{folder.id} is deleted, but not all of it could be: remove {gone} by hand")


def _hold(folder: ExperimentFolder, name: str, leases: ExitStack) -> Lease:
    taken = take_at_once(folder.path / name)
    if isinstance(taken, Holder):
        raise _is_busy(folder, taken)
    leases.callback(taken.release)
    return taken


def _rename_deleted(path: Path, gone: Path, attempt: int | None = None) -> None:
    """Delete a folder in a bucket, and rename it here; a bucket's may have gone here already, as another pulled it."""
    remove(path, attempt)
    with suppress(FileNotFoundError) if in_bucket(path) else nullcontext():
        path.rename(gone)


def runs_of_grid(storage: Path, name: str) -> list[ExperimentFolder]:
    """Return the runs of a grid: the cells of its last launch, and those that earlier launches made."""
    listed = set(cells_of(storage, name)) if name in grid_names(storage) else set()
    return [folder for folder in list_experiments(storage) if folder.id in listed or grid_of(folder.path) == name]


def check_grid_deletable(storage: Path, name: str, folders: list[ExperimentFolder], lineage: Lineage) -> None:
    """Raise `UserError` if a launch of the grid runs, or one of its runs cannot be deleted with the others."""
    for launch in living_launches(grid_folder(storage, name)):
        assert launch.holder is not None
        raise UserError(f"{name}: {launch.holder} runs it {launch.holder.since_words}: bwlm grid stop {name} first")
    ids = {folder.id for folder in folders}
    for folder in folders:
        check_deletable(folder, ids, lineage)


def delete_grid(storage: Path, name: str) -> None:
    """Delete the runs of a grid, children first, then its folder: so that a deletion that is cut off can go on.

    They are looked up here, so that runs that have begun from them since the caller looked are seen. Raises `UserError`
    as `check_grid_deletable`, or if the disk refuses.
    """
    home = grid_folder(storage, name)
    with exclusive(home / "lock"):  # so that no launch makes its cells meanwhile
        refresh(storage)
        folders, lineage = runs_of_grid(storage, name), lineage_of(storage)
        check_grid_deletable(storage, name, folders, lineage)
        ids = {folder.id for folder in folders}
        for folder in track(children_first(folders, lineage), f"deleting {name}", "runs"):
            delete(folder, ids, lineage)
        gone = home.with_name(f".{name}.{uuid.uuid4().hex[:8]}.deleted")
        _rename_deleted(home, gone)
        sync(gone.parent)
    shutil.rmtree(gone, ignore_errors=True)


def unfinished_deletions(storage: Path, experiment_id: str = "*") -> list[Path]:
    """Return the folders that killed processes left of runs that they deleted, or of grids."""
    name = f".{experiment_id}.{'[0-9a-f]' * 8}.deleted"
    return sorted([*storage.glob(name), *storage.glob(f"grids/{name}")])


def is_unfinished(storage: Path, experiment_id: str) -> bool:
    """Return whether a run is gone, but files of it are left by a deletion that was cut off."""
    return (
        is_id(experiment_id)
        and not (storage / experiment_id).exists()
        and bool(unfinished_deletions(storage, experiment_id))
    )


def discard_deleted(storage: Path) -> None:
    """Delete the files of deleted runs; another process may be deleting them too."""
    for path in unfinished_deletions(storage):
        shutil.rmtree(path, ignore_errors=True)


def _is_busy(folder: ExperimentFolder, holder: Holder) -> UserError:
    return UserError(f"{folder.id}: {holder} trains it {holder.since_words}: wait for it, or end that process first")
