"""The order of rows: a pure function of (seed, step), the same for every direction and any number of workers.

Each epoch visits every row once, in an order given by a keyed permutation that is computed, not stored. So a plan
over a billion rows needs no memory and can start at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_FEISTEL_ROUNDS = 6


def splitmix64(x: U64) -> U64:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a well-mixing bijection on 64 bits."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def counter_hash(*counters: int | NDArray[np.int64] | U64) -> U64:
    """Return a 64-bit hash of a tuple of counters, elementwise; no state, so any element can be computed alone."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(c) for c in counters)), dtype=np.uint64)
    for counter in counters:
        state = splitmix64(state ^ splitmix64(np.asarray(counter).astype(np.uint64)))
    return state


def permute(index: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Return the elements at positions `index` of a permutation of 0..size-1 chosen by `key`.

    A balanced Feistel network over the next even number of bits, walked until it lands inside the range (Black and
    Rogaway, CT-RSA 2002, "Ciphers with arbitrary finite domains").
    """
    assert size >= 1
    assert ((index >= 0) & (index < size)).all(), "an index outside of the range would walk for ever"
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [counter_hash(*key, round_) for round_ in range(_FEISTEL_ROUNDS)]

    def encrypt(x: U64) -> U64:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
        return (left << half) | right

    result = encrypt(np.asarray(index).astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = encrypt(result[outside])
    return result.astype(np.int64)


@dataclass(frozen=True)
class RowPlan:
    """Packed rows of each step's batch."""

    rows: int
    rows_per_step: int
    seed: int

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (row index, epoch) of each row that `rank` of `world` reads at `step`, in the batch's order."""
        return _draw(_places(step, self.rows_per_step, rank, world), self.rows, self.seed)


def rows_drawn(weight: float, rows: int) -> int:
    """Return how many of a source's `rows` an epoch of a mixture takes, at least one."""
    return max(1, round(weight * rows))


@dataclass(frozen=True)
class MixturePlan:
    """Packed rows of each step's batch, from several sources whose rows are numbered one source after the other.

    Each epoch takes `drawn` rows of each source, in a new order, and continues in the source where the epoch before
    ended: a source of weight 0.5 is read every two epochs, a source of weight 3 three times in each.
    """

    rows: tuple[int, ...]
    drawn: tuple[int, ...]
    rows_per_step: int
    seed: int

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the same as `RowPlan.at`.

        A row's epoch is that of its source, so that it differs each time the row comes.
        """
        mixed, epochs = _draw(_places(step, self.rows_per_step, rank, world), sum(self.drawn), self.seed)
        drawn = np.array(self.drawn)
        starts = np.cumsum(drawn) - drawn
        sources = np.searchsorted(starts, mixed, side="right") - 1
        chosen, of_source = np.empty_like(mixed), np.empty_like(epochs)
        for source in np.unique(sources):
            here = sources == source
            places = epochs[here] * drawn[source] + mixed[here] - starts[source]
            index, of_source[here] = _draw(places, self.rows[source], self.seed, int(source) + 1)
            chosen[here] = sum(self.rows[:source]) + index
        return chosen, of_source


def _places(step: int, rows_per_step: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return the places of a rank's share in the endless sequence of rows."""
    assert rows_per_step % world == 0
    share = rows_per_step // world
    return step * rows_per_step + rank * share + np.arange(share, dtype=np.int64)


def _draw(places: NDArray[np.int64], rows: int, *key: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (row, epoch) at places of the endless sequence of rows.

    It visits each row once an epoch, in orders given by `key`.
    """
    epochs, positions = places // rows, places % rows
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permute(positions[here], rows, *key, int(epoch))
    return chosen, epochs
