"""pass@k: the chance that at least one of k attempts is right, estimated from n attempts."""

from __future__ import annotations

import math


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate from `right` of n attempts (Chen et al. 2021): 1 - C(n - right, k) / C(n, k).

    Raises `ValueError` unless 0 <= right <= n and 1 <= k <= n: fewer than k attempts cannot tell.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"{right} of {n} attempts right, k = {k}: needs 0 <= right <= n and 1 <= k <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)
