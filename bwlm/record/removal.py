"""Deletion of a run: all of it or nothing, even if the process that deletes it is killed.

A folder is not emptied file by file where it lies: with its config gone but its checkpoints left it would be no
experiment, and still the next run of that id would resume from them. It is renamed first, in one step, to a name
under which nothing looks for a run. The next deletion removes what a kill leaves of it then. The run in MLflow stays.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import is_id, sync
from bwlm.record.experiment import LAUNCH, LEASE, ExperimentFolder, parents_in
from bwlm.record.lease import Holder, take_at_once
from bwlm.record.lineage import Lineage
from bwlm.storage.opened import shared

_NAMED = 3
"""Number of children that an error names."""


def check_deletable(folder: ExperimentFolder, besides: Collection[str] = ()) -> None:
    """Raise `UserError` if runs begin from this one, if a process trains it, or if its folder is a symbolic link.

    `besides` are runs that are deleted before this one.
    """
    if folder.path.is_symlink():
        raise UserError(f"{folder.path}: a symbolic link to {folder.path.readlink()}: delete link and folder by hand")
    if children := [c for c in Lineage(parents_in(folder.path.parent)).children(folder.id) if c not in besides]:
        more = f" and {len(children) - _NAMED} more" if len(children) > _NAMED else ""
        begin = "begins from it: delete that" if len(children) == 1 else "begin from it: delete those"
        raise UserError(f"{folder.id}: {', '.join(children[:_NAMED])}{more} {begin} first")
    if holder := folder.busy_with():
        raise _is_busy(folder, holder)


def children_first(folders: Iterable[ExperimentFolder]) -> list[ExperimentFolder]:
    """Return the runs in an order in which they can be deleted."""
    chosen = {folder.id: folder for folder in folders}
    ordered: dict[str, ExperimentFolder] = {}

    def add(folder: ExperimentFolder) -> None:
        for child in Lineage(parents_in(folder.path.parent)).children(folder.id):
            if child in chosen and child not in ordered:
                add(chosen[child])
        ordered.setdefault(folder.id, folder)

    for folder in chosen.values():
        add(folder)
    return list(ordered.values())


def delete(folder: ExperimentFolder) -> None:
    """Delete a run's folder. Raises `UserError` as `check_deletable`, or if the disk refuses."""
    check_deletable(folder)
    gone = folder.path.with_name(f".{folder.id}.{uuid.uuid4().hex[:8]}.deleted")
    try:
        with ExitStack() as leases:
            for name in (LEASE, LAUNCH):  # so that nobody begins to train it, or finds it half gone
                taken = take_at_once(folder.path / name)
                if isinstance(taken, Holder):
                    raise _is_busy(folder, taken)
                leases.callback(taken.release)
            if in_bucket := shared(folder.path):
                in_bucket.delete()
            folder.path.rename(gone)
        sync(gone.parent)  # else a power cut might bring the name back without all of the run's files
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be deleted ({error.strerror}): make it and {folder.path.parent} writable, then "
            "delete it again"
        ) from None
    discard_deleted(folder.path.parent)
    if gone.exists():
        raise UserError(f"{folder.id} is deleted, but not all of it could be: remove {gone} by hand")


def unfinished_deletions(storage: Path, experiment_id: str = "*") -> list[Path]:
    """Return the folders that killed processes left of runs that they deleted."""
    return sorted(storage.glob(f".{experiment_id}.{'[0-9a-f]' * 8}.deleted"))


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
