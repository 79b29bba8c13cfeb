"""Safe names, whole files, and where things lie.

An experiment id is one path segment; every id from a person passes `check_id` before it touches a disk. Every file
that somebody may read while we write it goes through `write_atomic`: it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bwlm.errors import UserError

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_RESERVED = frozenset({".", "..", "cache", "grids", "mlruns", "mlartifacts"})


def check_id(name: str, field: str = "id") -> str:
    """Returns `name` if it is one safe path segment, else raises `UserError`."""
    if not _ID.fullmatch(name):
        raise UserError(f"{field}: {name!r} is not a valid id: use 1 to 128 of the characters A-Z a-z 0-9 . _ -")
    if name in _RESERVED or name.startswith("."):
        raise UserError(f"{field}: {name!r} is reserved: choose another name")
    return name


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Atomic, indented, with sorted keys; refuses NaN, which JSON does not know."""
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises `UserError` that names the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `target` that takes its name when the block ends well, and goes when it does not.

    If somebody else made `target` meanwhile, theirs stays: what we write here is named by its content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():
                raise
        sync_folder(target.parent)
    finally:
        _remove_tree(temporary)
        prune_empty(target.parent)


def _remove_tree(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def prune_empty(folder: Path) -> None:
    """Removes a folder of ours that a failed run left empty, and its empty parents named `cache`."""
    for candidate in (folder, folder.parent, folder.parent.parent):
        try:
            candidate.rmdir()
        except OSError:
            return


def storage_root(storage: str | None) -> Path:
    """The folder that holds experiments: the argument, `BWLM_STORAGE`, else `runs/` here.

    Inside a Ray job the working folder is a temporary copy, so the default there is `~/bwlm-runs`.
    """
    chosen = storage or os.environ.get("BWLM_STORAGE")
    if chosen is None:
        chosen = "~/bwlm-runs" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "runs"
    if "://" in chosen and not chosen.startswith("file://"):
        raise UserError(f"storage: {chosen!r} is not a folder: give a local or shared (NFS) path")
    return Path(chosen.removeprefix("file://")).expanduser().absolute()


def check_writable(root: Path) -> None:
    """Raises `UserError` unless files can be made in `root`; leaves nothing behind."""
    existing = root
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"storage: {root} is not writable: choose another folder with --storage or BWLM_STORAGE")
    probe = existing / f".bwlm-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage: {root} is not writable ({error.strerror}): choose another folder") from None
