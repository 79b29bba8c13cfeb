"""Built-in corpora on disk: parquet shards with a column `text` beside a manifest, written whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import atomic_folder, write_atomic, write_json

MANIFEST = "manifest.json"

Shards = Sequence[Sequence[str]]
"""Texts of each shard, the last one for validation."""


def refuse_foreign(folder: Path) -> None:
    """Raise `UserError` if something lies where a built-in corpus is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds other files than the built-in corpus: remove it or name another folder")


def counts(shards: Shards) -> dict[str, Any]:
    """Return what every manifest says of the texts: shards, documents, characters and their `digest`.

    The digest is SHA-256, in hex, over the texts in the order of the shards.
    """
    texts = [text for shard in shards for text in shard]
    digest = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
    return {"shards": len(shards), "documents": len(texts), "characters": sum(map(len, texts)), "digest": digest}


def write_once(
    folder: Path,
    about: Mapping[str, Any],
    make: Callable[[], Shards],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the shards that `make` returns, and a manifest with `about` and their counts; an existing corpus stays.

    Raises `UserError` if something else lies in `folder`.
    """
    if (folder / MANIFEST).exists():
        return
    refuse_foreign(folder)
    shards = make()
    manifest = {**about, **counts(shards)}
    if progress:
        progress(f"writing {manifest['documents']} documents of builtin:{about['corpus']}")
    write_shards(folder, shards, manifest)


def write_shards(folder: Path, shards: Shards, manifest: Mapping[str, Any]) -> None:
    """Write `shard_00000.parquet`.. and `manifest.json`, or nothing."""
    with atomic_folder(folder) as temporary:
        for index, texts in enumerate(shards):
            write_atomic(temporary / f"shard_{index:05d}.parquet", parquet_of(texts))
        write_json(temporary / MANIFEST, manifest)


def parquet_of(texts: Sequence[str], column: str = "text") -> bytes:
    """Return the content of a parquet file with one column of texts, whose pages have checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())
