"""Entries in a storage's cache that can be made again at any time: read whole or not at all, never an error to write.

`<storage>/cache/<kind>-<version>/<name>`. An entry begins with the SHA-256 of its content, so that a damaged one is
taken for none. It appears under its name by a rename, so that two processes may write it at once. It need not survive
a power cut, so no write waits for the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class StorageCache:
    """Entries of one kind below a storage, by name."""

    storage: Path
    kind: str
    version: int
    """Version of what the entries hold: entries of another version are not seen."""

    @property
    def folder(self) -> Path:
        """Folder of the entries."""
        return self.storage / "cache" / f"{self.kind}-{self.version}"

    def read(self, name: str) -> bytes | None:
        """Return an entry; None if there is none, or if it is damaged."""
        try:
            with open(f"{self.folder}/{name}", "rb") as file:  # noqa: PTH123 (a Path costs more than to read it)
                digest, content = file.read(_DIGEST_BYTES), file.read()
        except OSError:
            return None
        return content if hashlib.sha256(content).digest() == digest else None

    def write(self, name: str, content: bytes) -> None:
        """Write an entry, if the storage can be written to."""
        folder = str(self.folder)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        with contextlib.suppress(OSError):  # read-only, or full: it is made again the next time
            try:
                with self._created(temporary) as file:
                    file.write(hashlib.sha256(content).digest() + content)
                os.replace(temporary, f"{folder}/{name}")  # noqa: PTH105 (as above)
            except OSError:
                os.unlink(temporary)  # noqa: PTH108
                raise

    def _created(self, path: str) -> BinaryIO:
        """Return a new file in the folder, which is made in a storage that exists."""
        try:
            return open(path, "wb")  # noqa: PTH123 (as above)
        except FileNotFoundError:
            if self.storage.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            return open(path, "wb")  # noqa: PTH123
