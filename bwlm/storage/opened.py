"""Storage of a command: a folder, or the working folder of a bucket, which is brought up to date first.

What a path of the working folder stands for in the bucket is asked here by the path alone. For a path of any other
storage every function does nothing.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from bwlm import paths
from bwlm.paths import storage_root, write_text
from bwlm.remote import address_of, working_root
from bwlm.storage.claim import Board, Seen, take
from bwlm.storage.folder import SharedFolder, bucket_at, is_trained
from bwlm.storage.head import HEADS, is_inside
from bwlm.storage.index import PLACE, IndexFile, indexed

_PARTS = {"cache": 3, "grids": 2, "analyses": 2}
"""Parts of the path of a folder that is shared as a whole, where it is not a run's."""
_TEXTS = "cache/packed/"
"""Folders of packed texts. They are here whole or not at all, so only `fetch` brings them."""
_AT_ONCE = 16
"""Folders that are pulled at once."""
_LOCK_SECONDS = 60.0
"""Seconds without a sign of life after which `exclusive` takes a lock of the bucket over."""
_WAIT_SECONDS = 0.5
"""Seconds between tries to take it."""


def open_storage(storage: str | None) -> Path:
    """Return the folder that holds experiments, as `storage_root`; that of a bucket with its small files up to date.

    Raises `UserError` for a bucket that is not there or denies access, and `BucketAway` for one that does not answer.
    """
    root = storage_root(storage)
    refresh(root)
    return root


def check_bucket(root: Path) -> None:
    """Raise `UserError` unless the bucket of a storage can be written, and its server keeps launches apart."""
    if in_bucket(root):
        bucket_at(address_of(root)).check()


def refresh(root: Path) -> list[str]:
    """Bring the small files of every folder up to date that has changed in the bucket; return their names.

    Of texts nothing is brought; those that were deleted in the bucket are deleted here.
    """
    changed = [SharedFolder(root, name) for name, etag in _heads(root).items() if _is_behind(root, name, etag)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(_bring, changed))
    return [folder.name for folder in changed]


def _is_behind(root: Path, name: str, etag: str) -> bool:
    if not name.startswith(_TEXTS):
        return SharedFolder(root, name).is_behind(etag)
    tag = IndexFile(root, name).read().tag
    return tag is None or tag[0] != etag


def _bring(folder: SharedFolder) -> None:
    folder.fetch() if folder.name.startswith(_TEXTS) else folder.pull()


def _heads(root: Path) -> dict[str, str]:
    """Return the ETag of the head of each folder in the bucket, by its name."""
    if not in_bucket(root):
        return {}
    listed = {one.key: one.etag for one in bucket_at(address_of(root)).list(f"{HEADS}/")}
    named = {key.removeprefix(f"{HEADS}/").removesuffix(".json"): etag for key, etag in listed.items()}
    return {name: etag for name, etag in named.items() if is_inside(name)}


def all_there(root: Path) -> list[SharedFolder]:
    """Return the folders of a bucket's storage, deleted ones among them."""
    return [SharedFolder(root, name) for name in _heads(root)]


def all_here(root: Path) -> list[SharedFolder]:
    """Return the folders of a bucket's storage that this machine knows."""
    return [SharedFolder(root, name) for name in indexed(root)]


def shared(path: Path) -> SharedFolder | None:
    """Return the shared folder that a path is, or lies in; None if its storage is not in a bucket."""
    if (root := working_root(path)) is None or path == root:
        return None
    return SharedFolder(root, folder_name(path.relative_to(root).as_posix()))


def folder_name(path: str) -> str:
    """Return the name of the shared folder that a path below a storage is, or lies in."""
    parts = path.split("/")
    return "/".join(parts[: _PARTS.get(parts[0], 1)])


def pull(path: Path) -> None:
    """Bring the small files of a run, a grid or a text up to date."""
    if folder := shared(path):
        folder.pull()


def fetch(path: Path) -> None:
    """Bring a file or a folder here with all that it holds, unless it is here already."""
    if folder := shared(path):
        inner = path.relative_to(folder.path).as_posix()
        folder.fetch(*(["*"] if inner == "." else [inner, f"{inner}/*"]))


def push(path: Path, trained: bool = False) -> None:
    """Take to the bucket what was written in a run's or a grid's folder; with `trained`, also what trainings write.

    Of a path inside of it, that alone. Raises as `SharedFolder.push`.
    """
    if folder := shared(path):
        is_below = _below(folder, path)
        folder.push(lambda inner: is_below(inner) and (trained or not is_trained(inner)))


def remove(path: Path, attempt: int | None = None) -> None:
    """Delete a file or a folder in the bucket; a run's or a grid's whole folder the caller then deletes here.

    A run is deleted with the number of its lease as `attempt`: raises `LateWriter` if a newer one has begun.
    """
    if folder := shared(path):
        folder.delete(attempt) if path == folder.path else folder.remove(_below(folder, path))


def delete_objects(path: Path, keys: Iterable[str]) -> None:
    """Delete objects of the bucket that a path belongs to. No head may name them."""
    bucket_at(address_of(path)).delete(keys)


def finish_deletions(root: Path) -> list[str]:
    """Delete what deletions that were cut off left in the bucket; return the names of their folders."""
    halves = [folder for folder in all_here(root) if folder.head().is_half_deleted]
    for folder in halves:
        folder.finish_deletion()
    return [folder.name for folder in halves]


def _below(folder: SharedFolder, path: Path) -> Callable[[str], bool]:
    """Return the choice of the files of a folder that are `path`, or lie below it."""
    inner = path.relative_to(folder.path).as_posix()
    return lambda one: inner in (".", one) or one.startswith(f"{inner}/")


def living_leases(path: Path) -> list[tuple[str, Seen]]:
    """Return name and lease of each that is held in a bucket: of a run or a grid, or of a whole storage."""
    if (root := working_root(path)) is None:
        return []
    folder = shared(path)
    return list(board_of(address_of(root)).all_living(folder.name if folder else None))


def size_of(path: Path) -> int | None:
    """Return the bytes of a file, also if it lies in the bucket only; None if there is no such file."""
    if path.exists():
        return path.stat().st_size
    folder = shared(path)
    return folder.size_of(path.relative_to(folder.path).as_posix()) if folder else None


def sizes_below(path: Path) -> dict[str, int]:
    """Return the bytes of each file below a folder, by its path there; also of files that lie in the bucket only."""
    sizes = {}
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # it has gone meanwhile
            if file.is_file():
                sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    if folder := shared(path):
        below = path.relative_to(folder.path).as_posix()
        sizes = folder.sizes("" if below == "." else f"{below}/") | sizes
    return sizes


def in_bucket(path: Path) -> bool:
    """Return whether a path belongs to a storage in a bucket."""
    return working_root(path) is not None


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs, as `bwlm.paths.exclusive`; in a bucket against all machines.

    The folder is pulled when the block begins and pushed when it ends, so that the block sees what others did in it.
    """
    with paths.exclusive(path):
        folder = shared(path)
        if folder is None:
            yield
            return
        claim, _ = take(
            folder.bucket, folder.name, path.name.strip("."), _holder(folder.root), _WAIT_SECONDS, lambda: False
        )
        try:
            folder.pull()
            try:
                yield
            finally:
                folder.push(lambda inner: not is_trained(inner))
        finally:
            claim.release()


def _holder(root: Path) -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "seconds": _LOCK_SECONDS, **here(root)}


def here(root: Path) -> Mapping[str, Any]:
    """Return what a lease in the bucket says of this machine's working folder: a name, different for each."""
    place = root / PLACE / "place"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with paths.exclusive(place.with_suffix(".lock")):
            if not place.exists():
                write_text(place, uuid.uuid4().hex)
    return {"place": f"{socket.gethostname()}:{place.read_text('utf-8')}"}


@cache
def board_of(address: str) -> Board:
    """Return the leases of a bucket; one for each address in a process."""
    return Board(bucket_at(address))
