"""Intervals and tests of accuracies, over items and training seeds at once.

A score is what a run earns on an item, 0..1: one for the right answer, 1/m for a tie of m answers. Seeds and items are
both samples: the interval of an accuracy, or of a difference of two, speaks about further seeds and further items. So
the variance is that of crossed random effects, and t follows the few seeds as far as they make the variance.

Suffixes of arrays: S seeds, I items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtr, chdtri, stdtr, stdtrit  # those of scipy.stats, without its overhead
from scipy.stats import nct, norm

from bwlm.stats.columns import FloatArray
from bwlm.stats.gaps import CONFIDENCE, Interval
from bwlm.stats.power import POWER

_LEAST_P: Final = 1e-100  # below it quantiles of t overflow
_QUANTILES: Final = 64  # of the estimated error: as exact as 1,024 to three digits


def wilson(correct: float, n: int, level: float = CONFIDENCE) -> Interval:
    """Return the score interval of a proportion (Wilson 1927, J. Amer. Statist. Assoc. 22:209-212).

    With p = correct / n and z = z_{(1 + level) / 2}:
    (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    `correct` may be fractional, since ties earn a share. Raises `ValueError` unless 0 <= correct <= n, n > 0 and
    0 < level < 1.
    """
    if not (0 <= correct <= n and n > 0 and 0 < level < 1):
        raise ValueError(f"needs 0 <= correct <= n, n > 0 and a level in 0..1, got {correct}, {n} and {level}")
    return _wilson(correct / n, n, float(norm.ppf((1 + level) / 2)))


def _wilson(p: float, n: float, z: float) -> Interval:
    centre, half_width = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + side * half_width) / (1 + z**2 / n) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding may pass an end by 1e-17


@dataclass(frozen=True)
class Crossed:
    """Mean of a table of seeds x items, and its variance in two parts that add up.

    Analysis of variance of a two-way layout without replication (Scheffe 1959, The Analysis of Variance, chapter 7):
    E MS_seed = I var_seed + var_rest,   E MS_item = S var_item + var_rest,   E MS_rest = var_rest
    var(mean) = var_seed / S + var_item / I + var_rest / SI = (E MS_seed + E MS_item - E MS_rest) / SI

    `by_seeds` estimates what S - 1 degrees of freedom tell, MS_seed / SI; `by_items` the rest, (MS_item - MS_rest) / SI
    or 0 where that is negative.
    """

    mean: float
    by_seeds: float
    by_items: float
    seeds: int
    items: int

    @classmethod
    def from_scores(cls, score_si: FloatArray) -> Crossed:
        """Measure a table of at least two seeds and two items.

        Seeds whose means agree exactly still vary within the grid of 1 / I on which means of whole scores lie, by
        1 / 12 I^2 (Sheppard 1898): without that, a coincidence of few seeds would be taken for certainty.
        """
        seeds, items = score_si.shape
        if seeds < 2 or items < 2:
            raise ValueError(f"needs two seeds and two items, got {seeds} and {items}")
        mean, mean_s, mean_i = score_si.mean(), score_si.mean(axis=1), score_si.mean(axis=0)
        rest_si = score_si - mean_s[:, None] - mean_i + mean
        ms_seed = max(items * float(mean_s.var(ddof=1)), 1 / (12 * items))
        ms_item = seeds * float(mean_i.var(ddof=1))
        ms_rest = float(np.square(rest_si).sum()) / ((seeds - 1) * (items - 1))
        cells = seeds * items
        return cls(float(mean), ms_seed / cells, max(0.0, ms_item - ms_rest) / cells, seeds, items)

    @property
    def error(self) -> float:
        """Return the standard error of the mean."""
        return math.sqrt(self.by_seeds + self.by_items)

    def critical(self, alpha: float = 1 - CONFIDENCE) -> float:
        """Return how many standard errors the interval of level 1 - alpha reaches to each side.

        The quantiles of t for both parts, weighted by their shares of the variance (Cochran and Cox 1950, Experimental
        Designs): (by_seeds t_{S-1} + by_items t_{I-1}) / (by_seeds + by_items). It errs on the wide side (Lee and
        Gurland 1975, J. Amer. Statist. Assoc. 70:933-941), where t with Satterthwaite's (1946) degrees of freedom
        covers as little as 92 % of the truths with three seeds.
        """
        by_few, by_many = (-float(stdtrit(n - 1, alpha / 2)) for n in (self.seeds, self.items))
        return (self.by_seeds * by_few + self.by_items * by_many) / (self.by_seeds + self.by_items)

    @property
    def interval(self) -> Interval:
        """Return the 95 % interval of the mean: mean -+ critical x error."""
        half_width = self.critical() * self.error
        return self.mean - half_width, self.mean + half_width

    def accuracy_interval(self) -> Interval:
        """Return the 95 % interval of a mean of scores in 0..1, which is itself within 0..1.

        Wilson's interval with the effective sample size n = p (1 - p) / error^2 and `critical` in place of z, as for
        clustered samples (Korn and Graubard 1998, Survey Methodology 24:193-201; Dean and Pagano 2015, J. Surv. Stat.
        Methodol. 3:484-503). The interval mean -+ critical x error covers too little near 0 and 1. Scores that are all
        0 or all 1 have none.
        """
        assert 0 < self.mean < 1, "a task that is all right or all wrong has no interval"
        return _wilson(self.mean, self.mean * (1 - self.mean) / self.error**2, self.critical())

    @property
    def p(self) -> float:
        """Return the two-sided p of a mean of zero: the alpha at which the interval just reaches zero."""
        distance = abs(self.mean) / self.error
        if distance == 0:
            return 1.0
        few, many = (2 * float(stdtr(n - 1, -distance)) for n in (self.seeds, self.items))
        low, high = max(min(few, many), _LEAST_P), max(few, many, _LEAST_P)

        # the quantile of a weighted mean lies between the two, and so does its p
        def beyond(log_p: float) -> float:
            return self.critical(math.exp(log_p)) - distance

        if beyond(math.log(low)) <= 0:
            return low
        return high if beyond(math.log(high)) >= 0 else math.exp(brentq(beyond, math.log(low), math.log(high)))

    def detectable(self, family: int = 1, alpha: float = 0.05, power: float = POWER) -> float:
        """Return the true mean that a study like this one sees with a chance of `power`: p below alpha / family.

        The distances that t sees with S - 1 and with I - 1 degrees of freedom, weighted as the quantiles of `critical`
        are. In simulations of 3, 5 and 8 seeds 76 to 85 of 100 studies see it. alpha / family is Holm's strictest
        step, so this is an upper bound for a family.
        """
        by_few, by_many = (_distance_seen(n - 1, alpha / family, power) for n in (self.seeds, self.items))
        return self.error * (self.by_seeds * by_few + self.by_items * by_many) / (self.by_seeds + self.by_items)


@lru_cache(maxsize=4096)
def _distance_seen(freedom: int, alpha: float, power: float) -> float:
    """Return the distance in estimated standard errors that a further t-test sees with a chance of `power`.

    The error is estimated with f degrees of freedom, so it is the true one times sqrt(chi2_f / f), and the chance is
    the mean over these, as for a sample size from a pilot study (Kieser and Wassmer 1996, Biometrical J. 38:941-949).
    Were the error taken for the true one, three seeds would see what is told in 62 of 100 studies.
    """
    critical = -float(stdtrit(freedom, alpha / 2))
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    share = np.sqrt(chdtri(freedom, 1 - quantiles) / freedom)

    def short_of_power(distance: float) -> float:
        return float(nct.sf(critical, freedom, distance * share).mean()) - power

    enough = critical
    while short_of_power(enough) < 0:
        enough *= 2
    return float(brentq(short_of_power, 0.0, enough))


@dataclass(frozen=True)
class OneSeed:
    """Comparison of two arms by the items of one seed: it tells nothing about further seeds."""

    mean: float
    interval: Interval
    p: float
    detectable: float


def one_seed(difference_i: FloatArray) -> OneSeed:
    """Compare two arms by their differences on the same items, from one run each.

    p is that of McNemar's exact test (McNemar 1947, Psychometrika 12:153-157): of the n items on which the arms differ,
    as many as b favour the second; b is binomial(n, 1/2) if none is better. It is the sign test where scores are
    shares. The interval is Bonett and Price's (2012, J. Educ. Behav. Stat. 37:479-488): the mean -+ 1.96 errors of the
    items and two more, on one of which each arm alone is right. `detectable` is (1.96 + 0.84) of these errors: the
    smallest true difference that the items would show with a chance of 80 %, were there no other seed.
    """
    better, worse = int((difference_i > 0).sum()), int((difference_i < 0).sum())
    p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    with_two = np.append(difference_i, (-1.0, 1.0))
    error = float(with_two.std()) / math.sqrt(len(with_two))
    centre, half_width = float(with_two.mean()), float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    interval = max(-1.0, centre - half_width), min(1.0, centre + half_width)
    return OneSeed(float(difference_i.mean()), interval, p, half_width + float(norm.ppf(POWER)) * error)
