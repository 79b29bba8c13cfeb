"""The order of rows: a pure function of (seed, step), the same for every direction and any number of workers.

Each epoch visits every row once, in an order given by a keyed permutation that is computed, not stored, so that a plan
over a billion rows needs no memory and can start at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_FEISTEL_ROUNDS = 6


def splitmix64(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words that mixes well."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def counter_hash(*counters: int | NDArray[np.int64] | U64) -> U64:
    """A 64-bit hash of a tuple of counters, elementwise; no state, so any element can be asked for alone."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(c) for c in counters)), dtype=np.uint64)
    for counter in counters:
        state = splitmix64(state ^ splitmix64(np.asarray(counter).astype(np.uint64)))
    return state


def permute(index: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Position -> element of a permutation of 0..size-1 chosen by `key`.

    A balanced Feistel network over the next even number of bits, walked until it lands inside the range
    (Black and Rogaway, CT-RSA 2002, "Ciphers with arbitrary finite domains").
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
    """Which packed rows make the batch of a step."""

    rows: int
    rows_per_step: int
    seed: int

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(row index, epoch) of each row that `rank` of `world` reads at `step`, in the order of the whole batch."""
        assert self.rows_per_step % world == 0
        share = self.rows_per_step // world
        place = step * self.rows_per_step + rank * share + np.arange(share, dtype=np.int64)
        epochs, positions = place // self.rows, place % self.rows
        chosen = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(positions[here], self.rows, self.seed, int(epoch))
        return chosen, epochs
