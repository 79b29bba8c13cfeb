"""Safe ids, atomic writes, and the folder of the storage.

An experiment id is one path segment; every id from a person passes `check_id` before it touches a disk. A file that
somebody may read while we write it goes through `write_atomic`: it appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from bwlm.credentials import refuse_secret
from bwlm.errors import UserError
from bwlm.remote import SCHEMES, is_bucket, working_folder

LONGEST_ID = 128
_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{LONGEST_ID}}}")
_FILE_URI = re.compile(r"(?:file|local):(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
_RESERVED = frozenset({".", "..", "analyses", "cache", "grids", "mlflow.db", "mlruns", "mlartifacts"})


def check_id(name: str, field: str = "id") -> str:
    """Return `name` if it is one safe path segment that bwlm does not use itself. Raises `UserError` otherwise."""
    if not _ID.fullmatch(name):
        allowed = f"1 to {LONGEST_ID} of the characters A-Z a-z 0-9 . _ -"
        raise UserError(f"{field}: {name!r} is not a valid id: use {allowed}")
    if not is_id(name):
        raise UserError(f"{field}: {name!r} is reserved: choose another name")
    return name


def is_id(name: str) -> bool:
    """Return whether `name` is one safe path segment that bwlm does not use itself."""
    return bool(_ID.fullmatch(name)) and name not in _RESERVED and not name.startswith(".")


Check = Callable[[], None]
"""Function that raises if this process may not write any more.

It is called after a file is written under a temporary name, and before the file is renamed.
"""


def unchecked() -> None:
    """Do nothing: the check of a file that has no other writer."""


def write_atomic(path: Path, data: bytes, check: Check = unchecked) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str, check: Check = unchecked) -> None:
    """Write text as `write_atomic` does, in UTF-8 whatever the locale."""
    write_atomic(path, readable(text).encode(), check)


def readable(text: str) -> str:
    """Return a text that UTF-8 can encode, with the characters of file names that the locale could not decode.

    Python holds their bytes as lone surrogates, which no encoding takes. Bytes that are not UTF-8 become U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


def relative(text: str) -> str:
    """Return a text for a person, in which the paths below the working folder begin there, also in SQLite's URIs."""
    try:
        here = re.escape(str(Path.cwd()).rstrip("/"))
    except OSError:  # the folder was deleted
        return text
    begins = r"(?:(?<=sqlite:///)|(?<![^\s'\"(=,;]))"
    return re.sub(rf"{begins}{here}/(?=[^\s/])", "", text) if here else text


def sync(path: Path) -> None:
    """Make a file's content durable, or the names inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any] | list[Any], check: Check = unchecked) -> None:
    """Write JSON atomically, indented and with sorted keys. Raises `ValueError` for NaN, which JSON does not know."""
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(), check)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises `UserError` that names the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


class FileState(NamedTuple):
    """State of a file by which a cache knows it: with another content it has another one.

    An edit that keeps the size and sets the time back still changes `changed`, and a file in its place has its own
    inode. Two edits within a tick of the file system's clock, some milliseconds, share a state if the size stays.
    """

    path: str
    size: int
    modified: int
    """Nanoseconds since the epoch, as is the next."""
    changed: int
    inode: int


def file_state(path: Path | str) -> FileState:
    """Return the state of a file. Raises `OSError` if there is none."""
    stat = os.stat(path)  # noqa: PTH116 (a thousand runs have ten thousand files, and a Path costs more than the call)
    return FileState(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, which is renamed to it if the block succeeds and deleted if it fails.

    If another process made `target` meanwhile, that folder stays: folders that are written here are named by their
    content. A block that fails leaves none of the parents that were made for it.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():
                raise
        for folder in (target, *made):
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: somebody needs it
                folder.rmdir()


def discard_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Delete files and folders that are still under a temporary name, by patterns such as `checkpoints/step_*`.

    A process that still writes one of them cannot give it its name any more.
    """
    for name in names:
        for path in folder.glob(str(Path(name).with_name(f".{Path(name).name}.????????.tmp"))):
            gone = path.with_name(f"{path.name[:-12]}{uuid.uuid4().hex[:8]}.tmp")
            with contextlib.suppress(FileNotFoundError):  # its writer renamed it at this moment
                path.rename(gone)  # one step, while a folder is deleted file by file
                shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs; wait while another process holds it. The kernel frees it on death."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def storage_root(storage: str | None) -> Path:
    """Return the folder that holds experiments: the argument, else `BWLM_STORAGE`, else `runs/` here.

    The working folder of a Ray job is a temporary copy, so the default there is `~/bwlm-runs`. The folder of a bucket
    is the one that stands for it here (`bwlm/remote.py`); `open_storage` brings it up to date as well. Raises
    `UserError` if the address holds a secret, or names neither.
    """
    chosen = storage or os.environ.get("BWLM_STORAGE") or None
    if chosen is None:
        chosen = "~/bwlm-runs" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "runs"
    refuse_secret(chosen, "storage")
    if is_bucket(chosen):
        return working_folder(chosen)
    if (folder := local_path(chosen)) is None:
        others = " or ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
        raise UserError(f"storage: {chosen!r} is neither a folder nor a bucket: give a path, or {others}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"storage: {chosen!r} is a file: give the folder that holds the runs")
    return folder.absolute()


def local_path(address: str) -> Path | None:
    """Return the local path that an address names, with `~` expanded; None for a URI of another machine.

    A `file:` URI may hold percent signs as they are, or encode them. The path as it is written is used, unless only
    the decoded path exists.
    """
    uri = _FILE_URI.match(address)
    if uri is None:
        return None if "://" in address else Path(address).expanduser()
    path = Path(address[uri.end() :]).expanduser()
    decoded = Path(unquote(str(path)))
    return decoded if decoded.exists() and not path.exists() else path


def check_writable(root: Path) -> None:
    """Raise `UserError` unless files can be made in `root`. Leaves nothing behind."""
    advice = "choose another folder with --storage or BWLM_STORAGE"
    try:
        existing = next(folder for folder in (root, *root.parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"storage: {root} is not writable: {advice}")
        probe = existing / f".bwlm-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage: {root} is not writable ({error.strerror}): {advice}") from None
