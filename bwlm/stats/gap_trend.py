"""Trend of the gap over model size: its slope on log2 of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from scipy.stats import t as student_t

from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.stats.columns import FloatArray, Size
from bwlm.stats.gaps import CONFIDENCE, FEWEST_SEEDS, Gap, Interval, has_seeds_enough, holm

Trend = Literal["grows", "shrinks", "changes sign", "moves", "cannot be told"]

_ROUNDING: Final = 1e-12  # nats per token; slopes and errors up to this size are floating-point dust


@dataclass(frozen=True)
class GapTrend:
    """Trend of the gap b - a over size."""

    a: str
    b: str
    sizes: list[Size]  # sizes with enough seeds, ascending in N
    fitted: tuple[float, float] | None  # the line at the smallest and the largest size, nats per token
    slope: float | None  # nats per token for each doubling of N
    interval: Interval | None
    p: float | None  # two-sided, not adjusted
    trend: Trend
    sentence: str


_ALPHA = 1 - CONFIDENCE


def gap_by_size(gaps: Sequence[Gap], parameters: Mapping[Size, float] | None = None) -> list[GapTrend]:
    """Return the slope of the gap b - a on log2 N for each pair of directions, and whether the gap grows.

    `parameters` maps each `Gap.size` to its N; without it each size must be its N. Raises `UserError` if an N is
    unknown. With gap g_i, the mean over n_i seeds with variance s_i^2, and x_i = log2 N_i:

        slope = sum_i c_i g_i,   c_i = n_i (x_i - x) / sum_j n_j (x_j - x)^2,   x the mean weighted by n
        variance = sum_i c_i^2 s_i^2 / n_i,   degrees of freedom by Satterthwaite (1946, Biometrics 2:110-114)

    Sizes are weighted by their seeds and not by 1 / s_i^2, which is too noisy from three seeds. A trend is named only
    if its p, Holm-adjusted over the pairs, is below 0.05; a change of sign only if the line's interval excludes zero at
    both ends. Sizes with under three seeds, or with a learning rate that under three seeds chose, are left out.
    """
    pairs = list(dict.fromkeys((one.a, one.b) for one in gaps))
    slopes = [_slope([one for one in gaps if (one.a, one.b) == pair], parameters) for pair in pairs]
    adjusted = iter(holm([slope.p for slope in slopes if slope is not None]))
    return [
        _too_few_for_a_trend(*pair) if slope is None else _told(*pair, slope, next(adjusted) < _ALPHA)
        for pair, slope in zip(pairs, slopes, strict=True)
    ]


@dataclass(frozen=True)
class _Slope:
    sizes: list[Size]
    fitted: tuple[float, float]
    sure_ends: bool  # neither end's interval holds zero
    slope: float
    interval: Interval
    p: float


def _slope(gaps: Sequence[Gap], parameters: Mapping[Size, float] | None) -> _Slope | None:
    """Fit the line through the gaps; None with under two sizes that have seeds enough."""
    pairs = sorted(
        ((_size_in_parameters(one, parameters), one) for one in gaps if has_seeds_enough(one)),
        key=lambda pair: pair[0],
    )
    x = np.log2([n for n, _ in pairs])
    if len(set(x)) < 2:
        return None
    used = [one for _, one in pairs]
    seeds = np.array([len(one.seeds) for one in used], dtype=np.float64)
    gap = np.array([one.gap_nats for one in used])
    centred = x - np.average(x, weights=seeds)
    c = seeds * centred / (seeds * centred**2).sum()
    of_mean = np.array([one.per_seed.var(ddof=1) for one in used]) / seeds
    slope = float(c @ gap)
    interval, p = _t_interval(slope, c**2 * of_mean, seeds - 1)
    ends = [seeds / seeds.sum() + centred[at] * c for at in (0, -1)]  # the gaps' weights in the line's value there
    fitted = (float(ends[0] @ gap), float(ends[1] @ gap))
    intervals = [_t_interval(at, end**2 * of_mean, seeds - 1)[0] for at, end in zip(fitted, ends, strict=True)]
    sure_ends = all(low * high > 0 for low, high in intervals)
    return _Slope([one.size for one in used], fitted, sure_ends, slope, interval, p)


def _t_interval(estimate: float, parts: FloatArray, degrees: FloatArray) -> tuple[Interval, float]:
    """Return interval and p of an estimate whose variance is a sum of parts, by Satterthwaite's degrees of freedom."""
    error = float(np.sqrt(parts.sum()))
    if error <= _ROUNDING:
        return (estimate, estimate), 1.0 if abs(estimate) <= _ROUNDING else 0.0
    freedom = parts.sum() ** 2 / (parts**2 / degrees).sum()
    half_width = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return (estimate - half_width, estimate + half_width), 2.0 * float(student_t.sf(abs(estimate) / error, freedom))


def _size_in_parameters(one: Gap, parameters: Mapping[Size, float] | None) -> float:
    n: Any = one.size if parameters is None else parameters.get(one.size)
    if not isinstance(n, int | float | np.number) or not n > 0:
        raise UserError(f"size '{one.size}' has no number of parameters: name the size of each run in a column 'size'")
    return float(n)


# Words


def _told(a: str, b: str, fit: _Slope, sure: bool) -> GapTrend:
    trend = _trend(fit, sure)
    low, high = fit.interval
    words = {
        "grows": "grows with size",
        "shrinks": "shrinks with size",
        "moves": f"moves with size in favour of {a if fit.slope > 0 else b}",
        "changes sign": f"changes sign: {a if fit.fitted[1] > 0 else b} is ahead at the largest size",
        "cannot be told": "may grow or shrink with size, that cannot be told",
    }[trend]
    sentence = (
        f"The gap {a} → {b} {words}: {fit.slope:+.4f} nats per token for each doubling of the parameters "
        f"(95 % {low:+.4f} .. {high:+.4f}, {counted(len(fit.sizes), 'size')}), on the line from "
        f"{fit.fitted[0]:+.4f} at {fit.sizes[0]} to {fit.fitted[1]:+.4f} at {fit.sizes[-1]}."
    )
    return GapTrend(a, b, fit.sizes, fit.fitted, fit.slope, fit.interval, fit.p, trend, sentence)


def _trend(fit: _Slope, sure: bool) -> Trend:
    if not sure:
        return "cannot be told"
    first, last = fit.fitted
    if first * last < 0:
        return "changes sign" if fit.sure_ends else "moves"
    return "grows" if abs(last) > abs(first) else "shrinks"


def _too_few_for_a_trend(a: str, b: str) -> GapTrend:
    sentence = (
        f"Whether the gap {a} → {b} grows with size cannot be told: it needs two sizes or more with "
        f"{FEWEST_SEEDS} paired seeds each, and learning rates that {FEWEST_SEEDS} seeds chose."
    )
    return GapTrend(a, b, [], None, None, None, None, "cannot be told", sentence)
