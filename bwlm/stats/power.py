"""Power of the paired t-test behind verdicts, for a planned number of seeds.

Gaps are given in standard deviations of the paired per-seed difference g_s (`stats.gap`): how far the gap of one seed
lies, typically, from that of another. With d such deviations between the directions and n seeds, the test's statistic
follows Student's t with n - 1 degrees of freedom and noncentrality d sqrt n (Johnson, Kotz and Balakrishnan 1995,
Continuous Univariate Distributions 2, chapter 31), so its power is exact if the differences are normal.

Not covered here: how noisy the seeds are. A pilot of a few seeds, or the noise floor of a report, tells that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student_t

from bwlm.stats.gaps import FEWEST_SEEDS

POWER: Final = 0.8  # usual target of studies: the chance of seeing a gap that is there
TABLE_SEEDS: Final = tuple(range(2, 11))
TABLE_GAPS: Final = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # standard deviations of the paired difference


def t_test_power(seeds: int, gap: float, family: int = 1, alpha: float = 0.05) -> float:
    """Return the chance that the two-sided paired t-test over `seeds` differences gives p < alpha / family.

    `gap` is the true gap, in standard deviations of the paired difference. alpha / family is Holm's strictest step, so
    with a family of several tests this is a lower bound: Holm gets milder with each other gap that is seen.

    With d = |gap|, n seeds, m tests and c = t_{1 - alpha / 2m, n - 1}:   P(|T| > c), T noncentral t_{n - 1}(d sqrt n)

    The power is given for two seeds too, though no verdict is (`stats.FEWEST_SEEDS`).
    Raises `ValueError` for fewer than two seeds, an empty family, or an alpha outside 0..1.
    """
    if seeds < 2 or family < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs 2 seeds, 1 test and alpha in 0..1, got {seeds}, {family} and {alpha}")
    freedom, centre = seeds - 1, abs(gap) * seeds**0.5
    critical = student_t.isf(alpha / family / 2, freedom)
    other_tail = nct.cdf(-critical, freedom, centre)  # scipy may give NaN for it below 1e-13
    return min(1.0, float(nct.sf(critical, freedom, centre) + (0.0 if math.isnan(other_tail) else other_tail)))


def detectable_gap(
    seeds: int, sd: float = 1.0, power: float = POWER, family: int = 1, alpha: float = 0.05
) -> float | None:
    """Return the smallest true gap that is called `different` with a chance of at least `power`, in the unit of `sd`.

    `sd` is the standard deviation of the paired per-seed difference, for example in nats per token; with 1 the gap is
    in such deviations. None with under three seeds, which never give a verdict. Raises `ValueError` unless
    alpha < power < 1 and sd is not negative.
    """
    if not (alpha < power < 1 and sd >= 0):
        raise ValueError(f"needs power in {alpha}..1 and sd of at least 0, got {power} and {sd}")
    if seeds < FEWEST_SEEDS:
        return None
    enough = 1.0
    while t_test_power(seeds, enough, family, alpha) < power:
        enough *= 2
    return sd * float(brentq(lambda gap: t_test_power(seeds, gap, family, alpha) - power, 0.0, enough))


def power_table(
    seeds: Iterable[int] = TABLE_SEEDS, gaps: Iterable[float] = TABLE_GAPS, family: int = 1
) -> dict[int, dict[float, float]]:
    """Return `t_test_power` by number of seeds and by gap in standard deviations of the paired difference."""
    gaps = tuple(gaps)
    return {n: {gap: t_test_power(n, gap, family) for gap in gaps} for n in seeds}
