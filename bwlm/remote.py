"""Storages in a bucket: their addresses, and the working folder that stands for such a storage on this machine.

Everything that bwlm reads or writes is a file of the working folder. `bwlm/storage/` copies it to the bucket and back.
The folder's name is the address itself, percent-encoded, so that any path below it tells which bucket it belongs to.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from bwlm.errors import UserError

SCHEMES = ("s3", "gs")
"""Schemes of addresses that a storage may have, besides folders."""
_ADDRESS = re.compile(rf"(?:{'|'.join(SCHEMES)})://[^/\s]+(?:/.*)?")
_LONGEST_NAME = 255
"""Bytes of a folder's name, at most, on the usual file systems."""


def is_bucket(address: str) -> bool:
    """Return whether an address names a bucket, or a prefix in one."""
    return _ADDRESS.fullmatch(address) is not None


def working_folder(address: str) -> Path:
    """Return the folder that stands for a bucket's address on this machine: below `BWLM_SCRATCH`, else ~/.cache.

    Raises `UserError` for an address that is too long, or that no object can have.
    """
    plain = address.rstrip("/")
    if any(part in ("", ".", "..") for part in plain.partition("://")[2].split("/")):
        raise UserError(f"storage: {address}: an empty part, . or .. in it: write s3://bucket/prefix")
    if len(name := quote(plain, safe="")) > _LONGEST_NAME:
        raise UserError(f"storage: {address}: longer than {_LONGEST_NAME} characters: choose a shorter prefix")
    return _scratch() / name


def _scratch() -> Path:
    chosen = os.environ.get("BWLM_SCRATCH")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "bwlm" / "storage"


def working_root(path: Path) -> Path | None:
    """Return the working folder that holds a path, or is it; None for a path of another storage."""
    for folder in (path, *path.parents):
        if "%3A%2F%2F" in folder.name and is_bucket(unquote(folder.name)):
            return folder
    return None


def address_of(path: Path) -> str:
    """Return the address of the bucket's storage that a path belongs to; of any other path, the path itself."""
    root = working_root(path)
    return str(path) if root is None else unquote(root.name)


def shown(path: Path) -> str:
    """Return the address of a path of a bucket's storage, as people know it; of any other path, the path itself."""
    root = working_root(path)
    return str(path) if root is None else "/".join([address_of(root), *path.relative_to(root).parts])
