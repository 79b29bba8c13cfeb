"""Tallies of what workers have read: files beside the packed ones, so that the driver can count on any file system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

Batch = TypeVar("Batch", bound=Sized)

ENDING = ".read"
"""Replaces a packed file's own ending."""


def tallied(batches: Iterable[Batch], packed: Path) -> Iterator[Batch]:
    """Yield the batches, and note in the tally of a packed file how many items of them are done: one byte each."""
    with packed.with_suffix(ENDING).open("wb", buffering=0) as tally:
        for batch in batches:
            yield batch
            tally.write(b"." * len(batch))


def items_done(folder: Path) -> int:
    """Return the number of items in the tallies of all splits of a folder that is being packed."""
    return sum(path.stat().st_size for path in _tallies(folder))


def discard_tallies(folder: Path) -> None:
    """Delete the tallies of a folder that is packed."""
    for path in _tallies(folder):
        path.unlink()


def _tallies(folder: Path) -> list[Path]:
    return list(folder.glob(f"*/*{ENDING}"))
