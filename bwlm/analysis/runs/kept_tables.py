"""Tables that follow from files of a run alone, kept in the storage's cache under the SHA-256 of these files.

A file that is edited, or put back, has another digest and so a table of its own: no kept table can be out of date.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from bwlm.paths import file_state
from bwlm.record.known_files import sha256_by_state
from bwlm.record.storage_cache import StorageCache


def name_of(files: list[Path], *besides: str) -> str:
    """Return the name of what follows from files, and from words `besides`. Raises `OSError` if one is gone."""
    digests = [sha256_by_state(file_state(file)) for file in files]
    return hashlib.sha256(" ".join([*digests, *besides]).encode()).hexdigest()


def read_table(cache: StorageCache, name: str) -> pa.Table | None:
    """Return a kept table; None if there is none."""
    content = cache.read(name)
    return None if content is None else pa.ipc.open_stream(content).read_all()


def keep_table(cache: StorageCache, name: str, table: pa.Table) -> None:
    """Keep a table, if the storage can be written to."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    cache.write(name, sink.getvalue().to_pybytes())
