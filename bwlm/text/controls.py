"""The control corpora `builtin:null` and `builtin:products`: no gap may be found on null, one must on products.

`null` is exactly reversible: both directions of it have one distribution, so a gap found on it comes from the method
itself. `products` is easy to learn forward and hard backward, so a method that finds no gap on it is blind.
docs/controls.md gives the reasons. Both texts follow from this file alone. They are controls only where each symbol
is one token (`tokenizer.vocab_size: 264`, no merges).
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bwlm.text.direction import Rows
from bwlm.text.plan import counter_hash
from bwlm.text.shards import write_once

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FORMAT_VERSION = 1
"""Version of the texts: raise it whenever a control would become another text."""

SHARDS = 5
SHARD_DOCUMENTS = 160
SHORTEST, LONGEST = 2048, 4095
"""Characters of a document. No document is a segment of its own in rows of 2048 tokens or fewer: a trained end would
take probability from the symbols, and the floor would not be `null_floor`."""

NULL_ALPHABET = string.ascii_letters + string.digits + "+/"
"""Symbols of `null`."""

FACTORS = 6
"""Factors in a line of `products`."""
PRIME = 7
"""Modulus of the products."""
_LIKELY = np.array([1, 1, 1, 2, 3, 4, 5, 6])
"""Factors, drawn from this list with equal chances. If 1 to 6 were equally likely, a product would tell nothing about
either factor alone, and small models would learn neither for hundreds of steps."""
LINE = 2 * FACTORS + 3
"""Characters of a line of `products`, including its newline."""

_SEED = 20260
_WEIGHTS, _LENGTHS, _SYMBOLS = range(3)
_LARGEST_POWER = 5


@dataclass(frozen=True)
class ReversibleChain:
    """Stationary Markov chain over K symbols, given by positive integer weights W [K, K] with W_ij = W_ji.

    With r_i = sum_j W_ij, P_ij = W_ij / r_i and pi_i = r_i / sum r, pi_i P_ij = W_ij / sum W is symmetric: detailed
    balance (Kelly 1979, Reversibility and Stochastic Networks, 1.2). So x1..xn and xn..x1 are equally likely.
    """

    weights: Ints

    @cached_property
    def stationary(self) -> Floats:
        """[K] stationary distribution pi"""
        return np.asarray(self.weights.sum(axis=1) / self.weights.sum())

    @cached_property
    def transition(self) -> Floats:
        """[K, K] transition matrix P; its rows sum to 1"""
        return np.asarray(self.weights / self.weights.sum(axis=1, keepdims=True))

    @property
    def entropy(self) -> float:
        """Entropy H(pi) = -sum pi_i log pi_i, in nats: the cost of a segment's first symbol."""
        return -float(np.sum(self.stationary * np.log(self.stationary)))

    @property
    def entropy_rate(self) -> float:
        """Entropy rate h = -sum pi_i P_ij log P_ij, in nats: the cost of each further symbol."""
        return -float(np.sum(self.stationary[:, None] * self.transition * np.log(self.transition)))

    def floor(self, lengths: Ints) -> float:
        """Return the least expected loss, in nats per symbol, over segments of these lengths.

        It is sum (H(pi) + (n-1) h) / sum n. A segment of 0 symbols costs nothing. Raises `ValueError` if there is no
        symbol at all.
        """
        lengths = np.asarray(lengths)
        if not lengths.sum():
            raise ValueError("a floor needs at least one symbol")
        first = int(np.count_nonzero(lengths))
        return (first * self.entropy + (int(lengths.sum()) - first) * self.entropy_rate) / int(lengths.sum())

    def nll(self, symbols: Ints) -> float:
        """Return the best predictor's cost of a segment in nats, the same in either direction.

        It is -log pi(x1) - sum log P(x_k, x_k+1).
        """
        first = np.log(self.stationary[symbols[:1]]).sum()
        return -float(first + np.log(self.transition[symbols[:-1], symbols[1:]]).sum())

    def sample(self, documents: Ints, length: int, seed: int) -> Ints:
        """Return [D, length]: a sequence for each document number, a function of (seed, number, position) alone.

        Draws are integers below r_i, the remainder of a 64-bit hash: exact to 2^-48 if r_i < 2^16.
        """
        draws = counter_hash(seed, documents[:, None], np.arange(length)[None, :])
        totals = self.weights.sum(axis=1)
        stride = int(totals.max())
        # one sorted list of all rows' cumulative weights: a single search draws the next symbol of every document
        edges = (np.cumsum(self.weights, axis=1) + stride * np.arange(len(totals))[:, None]).ravel()
        symbols = np.empty(draws.shape, dtype=np.int64)
        symbols[:, 0] = np.searchsorted(np.cumsum(totals), _below(draws[:, 0], totals.sum()), side="right")
        for place in range(1, length):
            now = symbols[:, place - 1]
            indexes = np.searchsorted(edges, stride * now + _below(draws[:, place], totals[now]), side="right")
            symbols[:, place] = indexes - len(totals) * now
        return symbols


def _below(draws: NDArray[np.uint64], bound: Ints | np.int64) -> Ints:
    return (draws % bound.astype(np.uint64)).astype(np.int64)


@cache
def null_chain() -> ReversibleChain:
    """Return the chain of `builtin:null`: H(pi) = 4.04 and h = 2.02 nats.

    W_ij is 4^k, where k is the number of trailing zeros of a hash of the pair, at most 5: few strong ties, many weak.
    """
    first, second = np.indices((len(NULL_ALPHABET), len(NULL_ALPHABET)))
    pairs = counter_hash(_SEED, _WEIGHTS, np.minimum(first, second), np.maximum(first, second))
    powers = sum((pairs % np.uint64(2**bits) == 0).astype(np.int64) for bits in range(1, _LARGEST_POWER + 1))
    return ReversibleChain(4 ** np.asarray(powers))


def null_floor(lengths: Ints) -> float:
    """Return the least expected loss of any model on `builtin:null`, in nats per token, over segments of these lengths.

    `lengths` are in tokens. The floor is the same in every direction. A symbol is one token and one byte: divide by
    log 2 for bits per byte. Raises `ValueError` if there is no token at all.
    """
    return null_chain().floor(lengths)


def null_nll(text: str) -> float:
    """Return the true chain's cost in nats of a segment of `builtin:null`, in either direction; 0 for an empty segment.

    `null_floor` is its expectation over all texts, per token. Compare a model's loss on some windows with this cost
    on the same windows rather than with the floor: the chance content of the windows is then in both. Raises
    `ValueError` for a character that is not in the alphabet.
    """
    return null_chain().nll(np.array([NULL_ALPHABET.index(symbol) for symbol in text], dtype=np.int64))


def null_nll_of_rows(rows: Rows) -> float:
    """Return the same in nats per token over all segments of packed rows of the tokenizer without merges."""
    segments = np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])
    return sum(null_nll(bytes(segment.tolist()).decode()) for segment in segments) / len(rows.tokens)


def _null_documents(documents: Ints) -> list[str]:
    alphabet = np.frombuffer(NULL_ALPHABET.encode(), dtype=np.uint8)
    texts = alphabet[null_chain().sample(documents, LONGEST, _SEED + _SYMBOLS)]
    return [bytes(text[:length]).decode() for text, length in zip(texts, _lengths(documents), strict=True)]


def _product_documents(documents: Ints) -> list[str]:
    counts_of_lines = _lengths(documents) // LINE + 1
    return [
        _product_lines(document, count) for document, count in zip(documents.tolist(), counts_of_lines, strict=True)
    ]


def _product_lines(document: int, count: int) -> str:
    """Return lines `x1..xn=y1..y(n+1)` with y_k = x_(k-1) x_k modulo 7, where x_0 = x_(n+1) = 1."""
    draws = counter_hash(_SEED, _SYMBOLS, document, np.arange(count)[:, None], np.arange(FACTORS)[None, :])
    chosen = _LIKELY[_below(draws, np.int64(len(_LIKELY)))]
    factors = np.pad(chosen, ((0, 0), (1, 1)), constant_values=1)
    products = factors[:, :-1] * factors[:, 1:] % PRIME
    lines = np.empty((count, LINE), dtype=np.uint8)
    lines[:, :FACTORS] = factors[:, 1:-1] + ord("0")
    lines[:, FACTORS] = ord("=")
    lines[:, FACTORS + 1 : -1] = products + ord("0")
    lines[:, -1] = ord("\n")
    return lines.tobytes().decode()


def _lengths(documents: Ints) -> Ints:
    return SHORTEST + _below(counter_hash(_SEED, _LENGTHS, documents), np.int64(LONGEST - SHORTEST + 1))


CONTROLS: dict[str, Callable[[Ints], list[str]]] = {"null": _null_documents, "products": _product_documents}
"""Function that writes the documents of each control, given their numbers."""


def control_key(name: str) -> str:
    """Return a short hash of everything that determines a control: it names its folder without building it."""
    recipe = [FORMAT_VERSION, name, _SEED, SHARDS, SHARD_DOCUMENTS, SHORTEST, LONGEST, FACTORS, PRIME]
    recipe += _LIKELY.tolist()
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def write_control(name: str, folder: Path, progress: Callable[[str], None] | None = None) -> None:
    """Write parquet shards (a column `text`; the last shard is validation) and `manifest.json`, or nothing.

    An existing corpus in `folder` stays. Raises `UserError` if something else lies there.
    """
    starts = range(0, SHARDS * SHARD_DOCUMENTS, SHARD_DOCUMENTS)
    about = {"format": FORMAT_VERSION, "corpus": name}
    write_once(
        folder, about, lambda: [CONTROLS[name](start + np.arange(SHARD_DOCUMENTS)) for start in starts], progress
    )
