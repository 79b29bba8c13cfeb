"""Documents that stand in both splits: exact duplicates, counted.

While a shard is packed, 8 bytes of a hash of each document's tokens are saved in a file beside its rows. Counting
holds the hashes of the whole validation text in memory, and of one training shard at a time: 16 MB for two million
documents. With a billion training documents and a million validation documents, one corpus in 18,000 is expected to
have a false match.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ENDING = ".documents.npy"
"""Replaces a packed file's own ending."""


@dataclass
class DocumentHashes:
    """Hashes of a shard's documents, in order, without documents that have no tokens."""

    _values: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, tokens: NDArray[np.uint32]) -> None:
        """Add the hash of a document, unless it has no tokens."""
        if len(tokens):
            digest = hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=8).digest()
            self._values.append(int.from_bytes(digest, "little"))

    def save(self, packed: Path) -> None:
        """Write the hashes beside the packed file that they belong to."""
        np.save(_beside(packed), np.array(self._values, dtype=np.uint64))


@dataclass(frozen=True)
class Overlap:
    """Numbers of documents that stand in both splits, counted in each; empty documents are left out."""

    train: int
    validation: int
    of_validation: int
    """All documents of the validation split."""

    def words(self, noun: str = "document") -> str:
        """Return a warning, or '' where the splits share no document."""
        if not self.validation:
            return ""
        sentence = (
            f"{self.validation:,} of {self.of_validation:,} validation {noun}s stand in the training text too "
            f"({self.train:,} {noun}{'s' if self.train > 1 else ''} there)"
        )
        if self.validation < self.of_validation:
            return sentence
        return f"{sentence}: all of them, so a validation loss measures what a model remembers"


def count_overlap(train: Iterable[Path], validation: Iterable[Path]) -> Overlap:
    """Return how many documents the packed files of two splits share."""
    held_out = np.concatenate([np.zeros(0, np.uint64), *(np.load(_beside(path)) for path in validation)])
    known, counts = np.unique(held_out, return_counts=True)
    seen, shared = np.zeros(len(known), dtype=bool), 0
    for path in train:
        hashes = np.load(_beside(path))
        shared += int(np.isin(hashes, known).sum())
        seen |= np.isin(known, hashes)
    return Overlap(shared, int(counts[seen].sum()), len(held_out))


def _beside(packed: Path) -> Path:
    return packed.with_suffix(ENDING)
