"""Rules that choose among the choices of an item, from the log-probabilities of its stem q and a choice a.

| rule | forward | backward |
| --- | --- | --- |
| conditional | log p(a given q) | log p(q given a) |
| joint | log p(q) + log p(a given q) | log p(a) + log p(q given a) |
| normalised | log p(a given q) / bytes of a | log p(q given a) / tokens of q + log p(a) |
| answer_first | log p(q given a), the choice laid out before the stem | (is its conditional) |

Of the backward rules `normalised` is P1, `joint` P2 and `conditional` P3 of arXiv 2502.18435. A forward model's joint
ranks the choices of one question as its conditional does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bwlm.directions import TEXT_READINGS

Rule = Literal["conditional", "joint", "normalised", "answer_first", "exact", "pass@1", "pass@k"]
"""Rules of choices; `exact` of continuations, `pass@1` and `pass@k` of generated outputs."""
RULES: tuple[Rule, ...] = ("conditional", "joint", "normalised", "answer_first")

FORWARD, BACKWARD = TEXT_READINGS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """Log-probabilities, in nats, of the two parts of a row: an entry for each choice of an item."""

    stem: Floats
    choice: Floats
    stem_tokens: NDArray[np.int64]
    choice_bytes: NDArray[np.int64]
    """UTF-8 bytes of the choice, without white space around it."""

    def scores(self, rule: Rule, reading: str) -> Floats:
        """Return the score of each choice. `answer_first` expects the parts of its own layout."""
        if rule == "joint":
            return self.stem + self.choice
        if rule == "answer_first":
            return self.stem
        if reading == FORWARD:
            return self.choice if rule == "conditional" else self.choice / self.choice_bytes
        return self.stem if rule == "conditional" else self.stem / np.maximum(self.stem_tokens, 1) + self.choice


@dataclass(frozen=True)
class Judged:
    """Choice of a model for one item."""

    chosen: int
    """Index of the choice with the highest score, the first of several; -1 where a score is NaN."""
    correct: float
    """1 for the right choice, 0 for a wrong one; 1/m where m choices with different texts share the highest score and
    one of them is right."""
    is_tied: bool
    is_finite: bool
    """False where a score is NaN; the item then counts as wrong."""


def judge(scores: Floats, texts: Sequence[str], answer: int) -> Judged:
    """Return what the scores choose. Choices with the same text are one choice, right if it is the answer's text."""
    if np.isnan(scores).any():
        return Judged(-1, 0.0, False, False)
    winners = np.flatnonzero(scores == scores.max()).tolist()
    chosen = {texts[winner] for winner in winners}
    return Judged(winners[0], (texts[answer] in chosen) / len(chosen), len(chosen) > 1, True)
