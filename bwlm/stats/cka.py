"""CKA: similarity of two models' states on the same tokens.

Axes: Q tokens, C width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST_TOKENS = 4
"""Fewest tokens that the unbiased estimator is defined for."""


def linear_cka(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return the linear CKA of states [Q, C] and [Q, C'] of the same tokens: at most 1, unbiased for few tokens.

    HSIC(x x', y y') / sqrt(HSIC(x x', x x') HSIC(y y', y y')) with the unbiased estimator of Song et al. (2012, JMLR
    13:1393-1434), as in Nguyen et al. (2021, arXiv:2010.15327). The biased estimator of Kornblith et al. (2019,
    arXiv:1905.00414) is near 1 for any states if tokens hardly outnumber features.
    """
    return cka(Kernel.from_states(x), Kernel.from_states(y))


@dataclass(frozen=True)
class Kernel:
    """Linear kernel x x' of centred states x [Q, C], without its diagonal.

    The kernel itself is never built: [Q, Q] is larger than [Q, C].
    """

    x: NDArray[np.float64]
    diagonal: NDArray[np.float64]
    sums: NDArray[np.float64]
    """Sums of the kernel's rows [Q]."""

    @classmethod
    def from_states(cls, states: NDArray[Any]) -> Kernel:
        """Return the kernel of states [Q, C]; all NaN if a state is not finite."""
        values = states.astype(np.float64)
        if not np.isfinite(values).all():
            values = np.full_like(values, np.nan)  # their kernel would be NaN too, with a warning for each infinity
        x = values - values.mean(0)
        diagonal = np.square(x).sum(1)
        return cls(x, diagonal, x @ x.sum(0) - diagonal)

    @cached_property
    def own(self) -> float:
        """The kernel's HSIC with itself."""
        return hsic(self, self)


def hsic(k: Kernel, m: Kernel) -> float:
    """Return the unbiased HSIC of Song et al. (2012) of two kernels without their diagonals; NaN for too few tokens."""
    n = len(k.x)
    if n < FEWEST_TOKENS:
        return math.nan
    products = np.square(k.x.T @ m.x).sum() - k.diagonal @ m.diagonal
    total = products + k.sums.sum() * m.sums.sum() / ((n - 1) * (n - 2)) - 2 * (k.sums @ m.sums) / (n - 2)
    return float(total / (n * (n - 3)))


def cka(k: Kernel, m: Kernel) -> float:
    """Return the CKA of two kernels, at most 1; NaN if either has no variance or states that are not finite.

    It is NaN too for fewer than `FEWEST_TOKENS` tokens.
    """
    return hsic(k, m) / math.sqrt(k.own * m.own) if k.own > 0 and m.own > 0 else math.nan
