"""Intervals of proportions."""

from __future__ import annotations

import math


def wilson(correct: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion (Wilson 1927); `correct` may be fractional."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
