"""Signs that the seeds of an arm are no plain sample: two groups of seeds, or a spread unlike another arm's.

Both are remarks beside a verdict and have no part in it. With few seeds only a clear case can be seen, so each is made
at a p of 0.01 and from four seeds on: plain seeds are quiet in 99 % of cases.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy.stats import t as student_t

from bwlm.stats.columns import FloatArray

FEWEST: Final = 4  # seeds
ALPHA: Final = 0.01
_DRAWS: Final = 4000


def two_groups_p(value_s: FloatArray, step: float) -> float:
    """Return the chance that normal seeds, rounded to a grid of `step`, fall into two groups as clearly as these.

    The sum of squares within groups over that of all, at the split of the sorted values that makes it smallest
    (Engelman and Hartigan 1969, J. Amer. Statist. Assoc. 64:1647-1648). Its distribution is drawn: normal values of
    the same spread, rounded alike, since equal accuracies of few items are no sign of a group. 1 with fewer than four
    seeds, or without spread.
    """
    spread = float(value_s.std(ddof=1)) if len(value_s) >= FEWEST else 0.0
    if spread <= step / 1000:  # rounding of floats
        return 1.0
    drawn_rs = np.random.default_rng(0).normal(0, spread, (_DRAWS, len(value_s)))
    as_clear = _within_share(np.round(drawn_rs / step) * step) <= _within_share(value_s[None]) + 1e-9
    return float((as_clear.sum() + 1) / (_DRAWS + 1))


def _within_share(value_rs: FloatArray) -> FloatArray:
    """Return for each row the sum of squares within its best two groups, over that around its mean."""
    ordered = np.sort(value_rs, axis=1)
    ordered = ordered - ordered.mean(axis=1, keepdims=True)
    seeds = ordered.shape[1]
    total = np.square(ordered).sum(axis=1)
    left_sum, left = ordered.cumsum(axis=1)[:, :-1], np.arange(1, seeds)
    between = (np.square(left_sum) * seeds / (left * (seeds - left))).max(axis=1)
    share: FloatArray = np.divide(total - between, total, out=np.ones_like(total), where=total > 0)
    return share


def unequal_spread_p(a_s: FloatArray, b_s: FloatArray, step: float) -> float:
    """Return p of the test that two arms, paired by seed, spread alike (Pitman 1939, Biometrika 31:9; Morgan 1939).

    With F = var a / var b and the correlation r:   t = (F - 1) sqrt(n - 2) / 2 sqrt(F (1 - r^2)),   n - 2 degrees of
    freedom. Each variance counts the rounding to a grid of `step`, step^2 / 12, else arms whose few seeds agree by
    coincidence would differ from all others. 1 with fewer than four seeds.
    """
    seeds = len(a_s)
    if seeds < FEWEST:
        return 1.0
    (var_a, shared), (_, var_b) = np.cov(a_s, b_s) + np.eye(2) * step**2 / 12
    unexplained = var_a * var_b - shared**2  # F (1 - r^2) var_b^2
    t = (var_a - var_b) * math.sqrt(seeds - 2) / (2 * math.sqrt(unexplained))
    return 2 * float(student_t.sf(abs(t), seeds - 2))
