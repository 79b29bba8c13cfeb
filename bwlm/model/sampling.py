"""The choice of the next id: penalty, temperature, filters, and a draw by each row's own random numbers.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

_LEAST_TEMPERATURE = 1e-30
_PENALTIES = (0.01, 100.0)
"""Least and greatest penalty: beyond them, penalised logits divided by a small temperature would be infinite."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of ids: the best at temperature 0, else drawn from softmax(logits / temperature).

    Applied in this order: `repetition_penalty`, `banned`, `temperature`, `top_k`, `top_p`, `min_p`. Raises `ValueError`
    for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    """Draw from this many best ids alone."""
    top_p: float = 1.0
    """Draw from the fewest best ids whose probabilities reach this sum (Holtzman et al., arXiv:1904.09751)."""
    min_p: float = 0.0
    """Draw from ids with at least this share of the best id's probability (Nguyen et al., arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of ids that the row holds are divided by it if positive, else multiplied (Keskar et al., 1909.05858)."""
    banned: frozenset[int] = field(default_factory=frozenset)
    """Ids that are never chosen."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be 0 to 1, not {self.min_p}")
        least, greatest = _PENALTIES
        if not least <= self.repetition_penalty <= greatest:
            raise ValueError(f"repetition_penalty must be {least} to {greatest:g}, not {self.repetition_penalty}")

    def check_vocabulary(self, size: int) -> None:
        """Raise `ValueError` if banned ids are not of the vocabulary, or are all of it."""
        banned = sorted(self.banned)
        if banned and not 0 <= banned[0] <= banned[-1] < size:
            raise ValueError(f"banned ids must be of the vocabulary, 0 to {size - 1}, not {banned}")
        if len(banned) == size:
            raise ValueError("banned holds every id of the vocabulary: leave one out")


def choose(
    logits: Tensor, sampling: Sampling, randoms: Sequence[Random], rows: Sequence[Collection[int]] = ()
) -> list[int]:
    """Return an id for each row of logits [B, V]. Unless greedy, it draws one number from each row's stream.

    `rows` has the ids of each row, which only `repetition_penalty` needs.
    """
    if sampling.repetition_penalty != 1:
        logits = _penalised(logits, rows, sampling.repetition_penalty)
    if sampling.banned:
        logits = logits.index_fill(1, torch.tensor(sorted(sampling.banned), device=logits.device), -torch.inf)
    if sampling.temperature == 0:
        return [int(best) for best in logits.argmax(-1).tolist()]
    kept = None
    if sampling.top_k is not None:
        logits, kept = logits.topk(min(sampling.top_k, logits.size(1)))
    # divided by a smaller temperature, logits would be infinite
    warmth = max(sampling.temperature, _LEAST_TEMPERATURE)
    probabilities = _filtered(torch.softmax(logits / warmth, -1), sampling)
    drawn = draw(probabilities, [random.random() for random in randoms])
    if kept is not None:
        drawn = kept.gather(1, drawn)
    return [int(one) for one in drawn.flatten().tolist()]


def draw(probabilities: Tensor, uniform: list[float]) -> Tensor:
    """Return [B, 1]: the index where the cumulative sum of probabilities [B, V] passes the row's number in [0, 1).

    The sums are of integers, to 2^-40: they grow at every id that has a probability, at no other id, and equally on
    every device. Sums of floats that are added in parallel do not, and could choose a banned id.
    """
    sums = (probabilities * 2**40).long().cumsum(-1)
    reached = torch.tensor(uniform, dtype=torch.float64, device=sums.device) * sums[:, -1]
    return torch.searchsorted(sums, reached.long()[:, None], right=True)


def _penalised(logits: Tensor, rows: Sequence[Collection[int]], penalty: float) -> Tensor:
    logits = logits.clone()
    for row, ids in zip(logits, rows, strict=True):
        seen = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def _filtered(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [B, V] with zeros for the ids that `top_p` and `min_p` leave out; the best id always stays.

    Ids of equal probability stay together.
    """
    if sampling.top_p < 1:
        best_first = probabilities.sort(-1, descending=True).values
        before = best_first.cumsum(-1) - best_first  # probability of all better ids
        least = best_first.masked_fill(before >= sampling.top_p, torch.inf).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.min_p > 0:
        best = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * best, 0)
    return probabilities
