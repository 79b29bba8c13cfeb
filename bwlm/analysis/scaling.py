"""How the loss falls with size and data, and whether the gap between two directions grows with size.

Input is a table with a row per finished run and the columns

    run, direction, seed, parameters, tokens, loss (nats per token)

`tokens` are those trained on. `parameters` are counted by `scaling_parameters`: the blocks' matrices and the output
layer, without the token embedding, as nanochat counts them. Other papers count otherwise: Hoffmann et al. all of them,
Kaplan et al. (2020) the blocks' alone. Exponents of small models depend on the choice (Pearce and Song 2024,
arXiv:2406.12907), so compare them only under the same one. A column `size`, where there is one, names the sizes as
`stats.Gap` does.

The intervals hold what another draw of seeds would change. They do not hold the error of the law itself: that is what
the prediction of the largest size, from the others, is for. Not covered here: which runs may be compared (the report
audits their fingerprints), the choice of a learning rate, compute-optimal sizes.

Suffixes of arrays: N runs, R resamples, P coordinates of a law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls
from scipy.stats import t as student_t

from bwlm.analysis.charts import scaling_chart
from bwlm.analysis.stats import (
    CONFIDENCE,
    DIRECTION_ORDER,
    FEWEST_SEEDS,
    FloatArray,
    Gap,
    Interval,
    Size,
    counted,
    holm,
)
from bwlm.errors import UserError, nearest
from bwlm.model.shape import GPTConfig, count_parameters

COLUMNS: Final = ("run", "direction", "seed", "parameters", "tokens", "loss")
DELTA: Final = 1e-3  # of the Huber loss, in log loss: beyond 0.1 % a run counts as an outlier
FEWEST_SIZES: Final = 3  # a curve E + A / N^a has three unknowns

Term = Literal["parameters", "tokens"]
Trend = Literal["grows", "shrinks", "changes sign", "cannot be told"]

_NAMES: Final[dict[Term, tuple[str, str]]] = {"parameters": ("A", "a"), "tokens": ("B", "b")}
_EXPONENTS: Final = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)  # of the starts
_LARGEST_EXPONENT: Final = 3.0
_STARTS: Final = 6  # the best of the grid; L-BFGS-B goes down from each (in simulations all led to one minimum)
_TIED: Final = 0.1  # budgets within 10 % of a smooth function of the size follow from it
_CURVE_POINTS: Final = 60
_QUANTILES: Final = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
_ROUNDING: Final = 1e-12

CONVENTION: Final = "N counts the matrices of the blocks and the output layer, without the token embedding"


def scaling_parameters(config: GPTConfig) -> int:
    """N of a model: its `matrices` and its `lm_head` as `count_parameters` counts them, without the embedding."""
    counts = count_parameters(config)
    return counts.matrices + counts.lm_head


@dataclass(frozen=True)
class Law:
    """L = E + A / N^a + B / D^b in nats per token; a term that was not fitted has the coefficient 0."""

    E: float
    A: float = 0.0
    a: float = 0.0
    B: float = 0.0
    b: float = 0.0

    def loss(self, parameters: Any, tokens: Any) -> FloatArray:
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.E + self.A * n**-self.a + self.B * d**-self.b)


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """The law of one direction."""

    direction: str
    terms: tuple[Term, ...]  # that were fitted beside E
    law: Law
    intervals: dict[str, Interval] | None  # by name of the parameter; None where no cell has two seeds
    resampled: list[Law]  # the laws of the bootstrap
    runs: pd.DataFrame  # those it was fitted to
    reason: str  # why a term is missing; empty where none is


@dataclass(frozen=True)
class HeldOut:
    """A cell of the largest size, predicted from the other sizes; losses in nats per token."""

    direction: str
    parameters: float
    tokens: float
    seeds: int
    predicted: float
    found: float  # mean over seeds
    predicted_interval: Interval | None
    miss_interval: Interval | None  # of found - predicted, both resampled


@dataclass(frozen=True)
class GapTrend:
    """How the gap b - a goes with size."""

    a: str
    b: str
    sizes: list[Size]  # ascending in N, those with enough seeds
    fitted: tuple[float, float] | None  # nats per token, at the smallest and the largest size
    slope: float | None  # nats per token for each doubling of N
    interval: Interval | None
    p: float | None  # two-sided, not adjusted
    trend: Trend
    sentence: str


def objective(law: Law, parameters: FloatArray, tokens: FloatArray, losses: FloatArray) -> float:
    """What `fit` minimises: the sum over runs of Huber(log L_predicted - log L), delta 1e-3.

    Huber(r) = r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2). Hoffmann et al. 2022, arXiv:2203.15556,
    Approach 3. It is the sum and not the mean: see `_minimise`.
    """
    residual_n = np.log(law.loss(parameters, tokens)) - np.log(losses)
    return float(DELTA**2 * _huber(residual_n / DELTA).sum())


def fit(table: pd.DataFrame, direction: str, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Fit L = E + A / N^a + B / D^b to one direction's runs, with 95 % intervals over seeds.

    Huber loss on log L (`objective`) by L-BFGS-B, from the best of a grid of exponents with E, A and B by non-negative
    least squares at each. Where all runs have one N, or one D, or D follows from N (a fixed ratio, say), the terms
    cannot be told apart: one is fitted, and `reason` says so.

    Intervals are percentiles of a bootstrap that redraws the seeds of each cell (N, D); deviations from the cell's mean
    log loss are stretched by sqrt(k / (k - 1)) for k seeds (Rao and Wu 1988, JASA 83:231-241), since k deviations from
    their own mean are too small. A cell with one seed draws from the deviations of the others. With three seeds
    the exponents' intervals cover 91 to 96 % in simulations; a loss, where three sizes hold three unknowns, 74 %.

    Raises UserError where the runs have too few sizes or budgets, and says which would do.
    """
    runs = _runs_of(_checked(table), direction)
    terms, reason = _identified(runs, direction)
    problem = _Problem.of(runs, terms)
    drawn_rn = _redraw(runs, resamples, seed)
    best_p, laws = _fit_all(problem, _log_loss(runs), drawn_rn)
    names = ["E", *(name for term in terms for name in _NAMES[term])]
    intervals = {name: _percentiles([getattr(law, name) for law in laws]) for name in names} if laws else None
    return ScalingFit(direction, terms, problem.law(best_p), intervals, laws, runs, reason)


def hold_out(table: pd.DataFrame, direction: str, resamples: int = 200, seed: int = 0) -> list[HeldOut]:
    """Fit without the largest size and predict its loss, at each of its token budgets.

    Raises UserError where the sizes left do not identify the law that all of them do.
    """
    runs = _runs_of(_checked(table), direction)
    terms, _ = _identified(runs, direction)
    largest = runs["parameters"].max()
    kept = (runs["parameters"] < largest).to_numpy()
    if "parameters" not in terms or not _same_terms(runs[kept], direction, terms):
        raise UserError(
            f"{direction}: the largest size cannot be predicted, as the others alone do not identify the law: "
            f"train {FEWEST_SIZES + 1} sizes or more, at the same budgets"
        )
    problem = _Problem.of(runs[kept], terms)
    drawn_rn, log_loss_n = _redraw(runs, resamples, seed), _log_loss(runs)
    best_p, laws = _fit_all(problem, log_loss_n[kept], None if drawn_rn is None else drawn_rn[:, kept])
    found = []
    for tokens in sorted(runs.loc[~kept, "tokens"].unique()):
        cell = ~kept & (runs["tokens"] == tokens).to_numpy()
        predicted_r = np.array([float(law.loss(largest, tokens)) for law in laws])
        miss_r = [] if drawn_rn is None else np.exp(drawn_rn[:, cell]).mean(axis=1) - predicted_r
        found.append(
            HeldOut(
                direction=direction,
                parameters=float(largest),
                tokens=float(tokens),
                seeds=int(cell.sum()),
                predicted=float(problem.law(best_p).loss(largest, tokens)),
                found=float(runs.loc[cell, "loss"].mean()),
                predicted_interval=_percentiles(predicted_r) if laws else None,
                miss_interval=_percentiles(miss_r) if laws else None,
            )
        )
    return found


def gap_by_size(
    gaps: Sequence[Gap], parameters: Mapping[Size, float] | None = None, alpha: float = 0.05
) -> list[GapTrend]:
    """Slope of the gap b - a on log2 N for each pair of directions, and whether the gap grows.

    `parameters` gives the N of each `Gap.size`; without it the sizes are taken as numbers. With gap g_i, the mean over
    n_i seeds with variance s_i^2, and x_i = log2 N_i:

        slope = sum_i c_i g_i,   c_i = n_i (x_i - x) / sum_j n_j (x_j - x)^2,   x the mean weighted by n
        variance = sum_i c_i^2 s_i^2 / n_i,   degrees of freedom by Satterthwaite (1946, Biometrics 2:110-114)

    Sizes weigh by their seeds and not by 1 / s_i^2, which from three seeds is too noisy to weigh by. A trend is told
    only if its p, Holm-adjusted over the pairs, is below alpha. Sizes with under three seeds are left out.
    """
    pairs = list(dict.fromkeys((one.a, one.b) for one in gaps))
    slopes = [_slope([one for one in gaps if (one.a, one.b) == pair], parameters) for pair in pairs]
    adjusted = iter(holm([slope.p for slope in slopes if slope is not None]))
    return [
        _too_few_for_a_trend(*pair) if slope is None else _told(*pair, slope, next(adjusted) < alpha)
        for pair, slope in zip(pairs, slopes, strict=True)
    ]


def analyse(
    table: pd.DataFrame, gaps: Sequence[Gap], resamples: int = 200, seed: int = 0
) -> tuple[list[str], pd.DataFrame, Any]:
    """Findings in sentences, the fitted parameters with their intervals, and a chart.

    The frame has the columns direction, parameter, value, low, high, runs. A direction that cannot be fitted gets a
    sentence that says why; UserError where none can be.
    """
    runs = _checked(table)
    fits, held, problems = _fit_directions(runs, resamples, seed)
    if not fits:
        raise UserError("; ".join(problems))
    trends = gap_by_size(gaps, _parameters_by_size(table))
    sentences = [_fit_words(one) for one in fits] + [_held_out_words(one) for one in held] + problems
    sentences += [trend.sentence for trend in trends]
    return [*sentences, f"{CONVENTION}."], _fit_frame(fits), _chart(fits, held)


# From the table to one direction's runs


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """The columns needed, with plain types, positive finite numbers and one run a cell and seed."""
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise UserError(
            f"the runs lack column '{missing[0]}'{nearest(missing[0], map(str, table.columns))}; "
            f"needed: {', '.join(COLUMNS)}"
        )
    if table.empty:
        raise UserError("there are no runs to fit: give a row for each finished run")
    runs = table[list(COLUMNS)].assign(run=table["run"].astype(str), direction=table["direction"].astype(str))
    for name in ("parameters", "tokens", "loss"):
        runs[name] = pd.to_numeric(runs[name], errors="coerce").astype(np.float64)
        wrong = ~(np.isfinite(runs[name]) & (runs[name] > 0)).to_numpy()
        if wrong.any():
            row = table.iloc[int(wrong.argmax())]
            raise UserError(f"{name} of run '{row['run']}' is {row[name]}, not a positive number: leave that run out")
    cell = ["direction", "parameters", "tokens", "seed"]
    twice = runs[runs.duplicated(cell, keep=False)]
    if not twice.empty:
        same = twice[(twice[cell] == twice.iloc[0][cell]).all(axis=1)]
        raise UserError(
            f"runs {', '.join(same['run'])} have one direction, size, budget and seed: keep one of them, "
            "that of the best learning rate"
        )
    return runs.sort_values(cell, ignore_index=True)


def _runs_of(runs: pd.DataFrame, direction: str) -> pd.DataFrame:
    known = list(dict.fromkeys(runs["direction"]))
    if direction not in known:
        raise UserError(
            f"there are no runs of direction '{direction}'{nearest(direction, known)}; directions: {', '.join(known)}"
        )
    return runs[runs["direction"] == direction].reset_index(drop=True)


def _log_loss(runs: pd.DataFrame) -> FloatArray:
    return np.asarray(np.log(runs["loss"].to_numpy(dtype=np.float64)))


def _identified(runs: pd.DataFrame, direction: str) -> tuple[tuple[Term, ...], str]:
    """Which terms the design of the runs tells apart, and why not both; UserError where it tells none."""
    sizes, budgets = runs["parameters"].nunique(), runs["tokens"].nunique()
    found = f"{direction} has {counted(sizes, 'size')} and {counted(budgets, 'token budget')}"
    if budgets == 1 and sizes >= FEWEST_SIZES:
        return ("parameters",), "all runs have one token budget, so B and b cannot be told from E"
    if sizes == 1 and budgets >= FEWEST_SIZES:
        return ("tokens",), "all runs have one size, so A and a cannot be told from E"
    if sizes >= FEWEST_SIZES and _tied(runs):
        return ("parameters",), (
            "the token budget follows from the size, so B and b cannot be told from A and a: "
            "a is the exponent of growing both"
        )
    if min(sizes, budgets) >= FEWEST_SIZES and _full_rank(runs):
        return ("parameters", "tokens"), ""
    if sizes < FEWEST_SIZES:
        raise UserError(
            f"{found}: too few for a law in size; train {FEWEST_SIZES} sizes or more, such as depth: [2, 4, 8], "
            "at one token budget, or three budgets each"
        )
    raise UserError(
        f"{found}, in too few combinations to tell size from data; train {FEWEST_SIZES} sizes or more, "
        f"each at the same {FEWEST_SIZES} budgets, or all at one"
    )


def _tied(runs: pd.DataFrame) -> bool:
    """Whether log D is, to within 10 %, a parabola in log N: budgets rounded to whole steps count as tied too."""
    log_n, log_d = np.log(runs["parameters"].to_numpy()), np.log(runs["tokens"].to_numpy())
    x_n = (log_n - log_n.mean()) / log_n.std()
    residual_n = log_d - np.polyval(np.polyfit(x_n, log_d, 2), x_n)
    return bool(np.sqrt(np.mean(residual_n**2)) < _TIED)


def _full_rank(runs: pd.DataFrame) -> bool:
    """Whether the five derivatives of the law differ on these cells, at exponents as good as any (0.4 and 0.3)."""
    n, d = runs["parameters"].to_numpy(), runs["tokens"].to_numpy()
    x, y = np.log(n / n.min()), np.log(d / d.min())
    columns = [np.ones_like(x), np.exp(-0.4 * x), x * np.exp(-0.4 * x), np.exp(-0.3 * y), y * np.exp(-0.3 * y)]
    jacobian = np.column_stack([column / np.linalg.norm(column) for column in columns])
    return bool(np.linalg.matrix_rank(jacobian, tol=1e-6) == len(columns))


def _same_terms(runs: pd.DataFrame, direction: str, terms: tuple[Term, ...]) -> bool:
    try:
        return _identified(runs, direction)[0] == terms
    except UserError:
        return False


def _redraw(runs: pd.DataFrame, resamples: int, seed: int) -> FloatArray | None:
    """Log losses (R x N) with the seeds of each cell drawn anew; None where no cell has two.

    The draws follow the order of the table alone, so directions with the same cells and seeds share them.
    """
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: the bootstrap needs at least 1, and 200 to be of use")
    rng = np.random.default_rng(seed)
    log_loss_n = _log_loss(runs)
    cells = list(runs.groupby(["parameters", "tokens"]).indices.values())
    deviations = [_deviations(log_loss_n[cell]) for cell in cells]
    if not any(len(own) for own in deviations):
        return None
    pooled = np.concatenate(deviations)
    drawn_rn = np.empty((resamples, len(runs)))
    for cell, own in zip(cells, deviations, strict=True):
        drawn = rng.choice(own if len(own) else pooled, size=(resamples, len(cell)))
        drawn_rn[:, cell] = log_loss_n[cell].mean() + drawn
    return drawn_rn


def _deviations(log_loss_k: FloatArray) -> FloatArray:
    k = len(log_loss_k)
    return (log_loss_k - log_loss_k.mean()) * np.sqrt(k / (k - 1)) if k > 1 else np.empty(0)


def _percentiles(values: Any) -> Interval:
    low, high = np.quantile(np.asarray(values), _QUANTILES)
    return float(low), float(high)


# The fit


@dataclass(frozen=True)
class _Problem:
    """The inputs of one fit in coordinates that L-BFGS-B gets down quickly.

    A coordinate vector holds log E, then for each term the log of its share at the geometric mean of its variable and
    its exponent times the variable's spread. A and a themselves are strongly correlated: A is the share at N = 1.
    """

    terms: tuple[Term, ...]
    log_mean: list[float]
    spread: list[float]
    u_tn: FloatArray  # standardised log of each term's variable

    @classmethod
    def of(cls, runs: pd.DataFrame, terms: tuple[Term, ...]) -> _Problem:
        logs = np.log(runs[list(terms)].to_numpy(dtype=np.float64).T)
        mean, spread = logs.mean(axis=1), logs.std(axis=1)
        return cls(terms, mean.tolist(), spread.tolist(), (logs - mean[:, None]) / spread[:, None])

    def law(self, point_p: FloatArray) -> Law:
        values = {"E": float(np.exp(point_p[0]))}
        for term, share, scaled, mean, spread in zip(
            self.terms, point_p[1::2], point_p[2::2], self.log_mean, self.spread, strict=True
        ):
            coefficient, exponent = _NAMES[term]
            values[exponent] = float(scaled / spread)
            values[coefficient] = float(np.exp(share + scaled / spread * mean))
        return Law(**values)

    def log_parts(self, point_p: FloatArray) -> FloatArray:
        """Log of E and of each term (rows) at every run (columns)."""
        constant = np.full((1, self.u_tn.shape[1]), point_p[0])
        return np.concatenate([constant, point_p[1::2, None] - point_p[2::2, None] * self.u_tn])

    def value_and_gradient(self, point_p: FloatArray, log_loss_n: FloatArray) -> tuple[float, FloatArray]:
        """The objective over delta^2, and its derivatives."""
        parts = self.log_parts(point_p)
        predicted_n = np.logaddexp.reduce(parts, axis=0)
        z_n = (predicted_n - log_loss_n) / DELTA
        pull = np.exp(parts - predicted_n) * (np.clip(z_n, -1.0, 1.0) / DELTA)  # d objective / d log of each part
        gradient_p = np.empty_like(point_p)
        gradient_p[0] = pull[0].sum()
        gradient_p[1::2] = pull[1:].sum(axis=1)
        gradient_p[2::2] = -(pull[1:] * self.u_tn).sum(axis=1)
        return float(_huber(z_n).sum()), gradient_p

    def bounds(self, log_loss_n: FloatArray) -> list[tuple[float, float]]:
        share = (float(log_loss_n.min()) - 15.0, float(log_loss_n.max()) + 1.0)
        return [share, *(bound for spread in self.spread for bound in (share, (0.0, _LARGEST_EXPONENT * spread)))]


def _huber(z_n: FloatArray) -> FloatArray:
    """Huber's loss with delta 1."""
    size_n = np.abs(z_n)
    return np.where(size_n <= 1.0, 0.5 * z_n**2, size_n - 0.5)


def _fit_all(problem: _Problem, log_loss_n: FloatArray, drawn_rn: FloatArray | None) -> tuple[FloatArray, list[Law]]:
    """The best point from many starts, and the laws of the resamples, each started from that point."""
    found = [_minimise(problem, start, log_loss_n) for start in _starts(problem, log_loss_n)]
    best_p = min(found, key=lambda one: one[0])[1]
    if drawn_rn is None:
        return best_p, []
    return best_p, [problem.law(_minimise(problem, best_p, log_loss)[1]) for log_loss in drawn_rn]


def _minimise(problem: _Problem, start_p: FloatArray, log_loss_n: FloatArray) -> tuple[float, FloatArray]:
    """L-BFGS-B from one start.

    Its tolerances are absolute for values under 1, so an objective of 1e-6 (let alone its mean over runs) ends it at
    the start: what Besiroglu et al. 2024, arXiv:2404.10102, found in published fits. Hence the sum, over delta^2.
    """
    result = minimize(
        problem.value_and_gradient,
        start_p,
        args=(log_loss_n,),
        jac=True,
        method="L-BFGS-B",
        bounds=problem.bounds(log_loss_n),
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7, "maxcor": 20},
    )
    return float(result.fun), np.asarray(result.x)


def _starts(problem: _Problem, log_loss_n: FloatArray) -> list[FloatArray]:
    """The best points of the grid of exponents, E, A and B by least squares of relative errors."""
    starts = []
    for exponents in product(_EXPONENTS, repeat=len(problem.terms)):
        scaled = np.array(exponents) * problem.spread
        columns = np.concatenate([np.ones((1, len(log_loss_n))), np.exp(-scaled[:, None] * problem.u_tn)])
        shares, _ = nnls((columns / np.exp(log_loss_n)).T, np.ones(len(log_loss_n)))
        start_p = np.empty(1 + 2 * len(scaled))
        shares = np.log(np.maximum(shares, 1e-3 * np.exp(log_loss_n.mean())))  # a share of 0 has no way back
        start_p[0], start_p[1::2], start_p[2::2] = shares[0], shares[1:], scaled
        starts.append(start_p)
    return sorted(starts, key=lambda start_p: problem.value_and_gradient(start_p, log_loss_n)[0])[:_STARTS]


# The gap by size


@dataclass(frozen=True)
class _Slope:
    sizes: list[Size]
    fitted: tuple[float, float]
    slope: float
    interval: Interval
    p: float


def _slope(gaps: Sequence[Gap], parameters: Mapping[Size, float] | None) -> _Slope | None:
    """None with under two sizes that have three seeds."""
    pairs = sorted(
        ((_size_in_parameters(one, parameters), one) for one in gaps if len(one.seeds) >= FEWEST_SEEDS),
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
    slope, mean = float(c @ gap), float(np.average(gap, weights=seeds))
    parts = c**2 * np.array([one.per_seed.var(ddof=1) for one in used]) / seeds
    interval, p = _t_interval(slope, parts, seeds - 1)
    low, high = mean + slope * centred[0], mean + slope * centred[-1]
    return _Slope([one.size for one in used], (float(low), float(high)), slope, interval, p)


def _t_interval(estimate: float, parts: FloatArray, degrees: FloatArray) -> tuple[Interval, float]:
    """Interval and p of an estimate whose variance is a sum of parts, by Satterthwaite's degrees of freedom."""
    error = float(np.sqrt(parts.sum()))
    if error <= _ROUNDING:
        return (estimate, estimate), 1.0 if abs(estimate) <= _ROUNDING else 0.0
    freedom = parts.sum() ** 2 / (parts**2 / degrees).sum()
    half_width = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return (estimate - half_width, estimate + half_width), 2.0 * float(student_t.sf(abs(estimate) / error, freedom))


def _size_in_parameters(one: Gap, parameters: Mapping[Size, float] | None) -> float:
    n: Any = one.size if parameters is None else parameters.get(one.size)
    if not isinstance(n, int | float | np.number) or not n > 0:
        raise UserError(
            f"the parameters of size '{one.size}' are not known: name the size of each run in a column 'size'"
        )
    return float(n)


def _told(a: str, b: str, found: _Slope, sure: bool) -> GapTrend:
    trend = _trend(found.fitted, sure)
    low, high = found.interval
    words = {
        "grows": "grows with size",
        "shrinks": "shrinks with size",
        "changes sign": f"changes sign: {a if found.fitted[1] > 0 else b} is ahead at the largest size",
        "cannot be told": "may grow or shrink with size, that cannot be told",
    }[trend]
    sentence = (
        f"The gap {b} - {a} {words}: {found.slope:+.4f} nats per token for each doubling of the parameters "
        f"(95 % {low:+.4f} .. {high:+.4f}, {counted(len(found.sizes), 'size')}), on the line from "
        f"{found.fitted[0]:+.4f} at {found.sizes[0]} to {found.fitted[1]:+.4f} at {found.sizes[-1]}."
    )
    return GapTrend(a, b, found.sizes, found.fitted, found.slope, found.interval, found.p, trend, sentence)


def _trend(fitted: tuple[float, float], sure: bool) -> Trend:
    if not sure:
        return "cannot be told"
    if fitted[0] * fitted[1] < 0:
        return "changes sign"
    return "grows" if abs(fitted[1]) > abs(fitted[0]) else "shrinks"


def _too_few_for_a_trend(a: str, b: str) -> GapTrend:
    sentence = (
        f"Whether the gap {b} - {a} grows with size cannot be told: it needs two sizes or more with "
        f"{FEWEST_SEEDS} paired seeds each."
    )
    return GapTrend(a, b, [], None, None, None, None, "cannot be told", sentence)


# Words, table and chart


def _fit_directions(runs: pd.DataFrame, resamples: int, seed: int) -> tuple[list[ScalingFit], list[HeldOut], list[str]]:
    fits: list[ScalingFit] = []
    held: list[HeldOut] = []
    problems = []
    present = set(runs["direction"])
    known = [name for name in DIRECTION_ORDER if name in present]
    for direction in [*known, *sorted(present - set(known))]:
        try:
            fits.append(fit(runs, direction, resamples, seed))
            held += hold_out(runs, direction, resamples, seed)
        except UserError as error:
            problems.append(f"{error}.")
    return fits, held, problems


def _parameters_by_size(table: pd.DataFrame) -> dict[Size, float] | None:
    if "size" not in table.columns:
        return None
    several = table.groupby("size")["parameters"].nunique()
    if (several > 1).any():
        raise UserError(f"size '{several.index[several > 1][0]}' has runs of several parameter counts: one N a size")
    return dict(zip(table["size"], table["parameters"].astype(float), strict=True))


def _fit_words(one: ScalingFit) -> str:
    law, runs = one.law, one.runs
    terms = [f"{law.A:.3g} / N^{law.a:.3f}"] if "parameters" in one.terms else []
    terms += [f"{law.B:.3g} / D^{law.b:.3f}"] if "tokens" in one.terms else []
    shown = ["E", *(_NAMES[term][1] for term in one.terms)]
    if one.intervals is None:
        sure = "no intervals, as no cell has two seeds"
    else:
        sure = "95 % over seeds: " + ", ".join(
            f"{name} {one.intervals[name][0]:.3f} .. {one.intervals[name][1]:.3f}" for name in shown
        )
    unknowns = 1 + 2 * len(one.terms)
    cells = len(runs.drop_duplicates(["parameters", "tokens"]))
    exact = f"; {unknowns} unknowns on {cells} cells, so the fit does not test the law" if cells <= unknowns else ""
    return (
        f"{one.direction}: L = {' + '.join([f'{law.E:.3f}', *terms])} nats per token ({sure}; "
        f"{counted(len(runs), 'run')}, {counted(runs['parameters'].nunique(), 'size')}, "
        f"{counted(runs['tokens'].nunique(), 'token budget')}{exact})" + (f"; {one.reason}." if one.reason else ".")
    )


def _held_out_words(one: HeldOut) -> str:
    where = f"{one.direction}, largest size left out (N = {_short(one.parameters)}, D = {_short(one.tokens)})"
    found = f"found {one.found:.4f} over {counted(one.seeds, 'seed')}, {one.found - one.predicted:+.4f}"
    if one.predicted_interval is None or one.miss_interval is None:
        return f"{where}: predicted {one.predicted:.4f} nats per token, {found}."
    (low, high), (short, far) = one.predicted_interval, one.miss_interval
    verdict = "as predicted" if short <= 0 <= far else "worse than predicted" if short > 0 else "better than predicted"
    return (
        f"{where}: predicted {one.predicted:.4f} nats per token (95 % {low:.4f} .. {high:.4f}), {found} "
        f"(95 % {short:+.4f} .. {far:+.4f}): {verdict}."
    )


def _short(number: float) -> str:
    """1.23k, 4.5M, 6G: as the chart's axes have it."""
    unit, factor = next((u, f) for u, f in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 0.0)) if number >= f)
    return f"{number / (factor or 1.0):.3g}{unit}"


def _fit_frame(fits: Sequence[ScalingFit]) -> pd.DataFrame:
    rows = [
        (one.direction, name, getattr(one.law, name), *(one.intervals or {}).get(name, (np.nan, np.nan)), len(one.runs))
        for one in fits
        for name in ["E", *(name for term in one.terms for name in _NAMES[term])]
    ]
    return pd.DataFrame(rows, columns=["direction", "parameter", "value", "low", "high", "runs"])


@dataclass(frozen=True)
class _Axis:
    """What the chart's x axis is, and the budget that both-term laws are shown at."""

    variable: Term
    tokens: float  # the largest budget

    @classmethod
    def of(cls, fits: Sequence[ScalingFit]) -> _Axis:
        variable: Term = "parameters" if any("parameters" in one.terms for one in fits) else "tokens"
        return cls(variable, max(float(one.runs["tokens"].max()) for one in fits))

    def law_at(self, law: Law, x: Any) -> FloatArray:
        return law.loss(x, self.tokens) if self.variable == "parameters" else law.loss(1.0, x)

    def moved(self, one: ScalingFit, parameters: Any, tokens: Any, losses: Any) -> Any:
        """Losses at the largest budget: multiplied by the law's own ratio, so that each keeps its distance from it."""
        if len(one.terms) < 2:
            return losses
        return losses * one.law.loss(parameters, self.tokens) / one.law.loss(parameters, tokens)


def _chart(fits: Sequence[ScalingFit], held: Sequence[HeldOut]) -> Any:
    axis = _Axis.of(fits)
    points = pd.concat([_points(one, axis) for one in fits], ignore_index=True)
    curves = pd.concat([_curve(one, axis) for one in fits if axis.variable in one.terms], ignore_index=True)
    moved = any(len(one.terms) == 2 and one.runs["tokens"].nunique() > 1 for one in fits)
    note = f"points moved along the law to {_short(axis.tokens)} tokens" if moved else ""
    x_title = "parameters (blocks and output layer)" if axis.variable == "parameters" else "training tokens"
    return scaling_chart(points, curves, _predictions(fits, held, axis), x_title, f"loss over {axis.variable}", note)


def _points(one: ScalingFit, axis: _Axis) -> pd.DataFrame:
    runs = one.runs
    loss = axis.moved(one, runs["parameters"], runs["tokens"], runs["loss"])
    return pd.DataFrame({"direction": one.direction, "run": runs["run"], "x": runs[axis.variable], "loss": loss})


def _curve(one: ScalingFit, axis: _Axis) -> pd.DataFrame:
    x = np.geomspace(one.runs[axis.variable].min(), one.runs[axis.variable].max(), _CURVE_POINTS)
    curve = pd.DataFrame({"direction": one.direction, "x": x, "loss": axis.law_at(one.law, x)})
    if not one.resampled:
        return curve.assign(low=np.nan, high=np.nan)
    low, high = np.quantile([axis.law_at(law, x) for law in one.resampled], _QUANTILES, axis=0)
    return curve.assign(low=low, high=high)


def _predictions(fits: Sequence[ScalingFit], held: Sequence[HeldOut], axis: _Axis) -> pd.DataFrame:
    """Of each direction's largest size at its largest budget."""
    rows = []
    for one in fits:
        own = [guess for guess in held if guess.direction == one.direction]
        if own:
            last = max(own, key=lambda guess: guess.tokens)
            losses = np.array([last.predicted, *(last.predicted_interval or (np.nan, np.nan))])
            rows.append((one.direction, last.parameters, *axis.moved(one, last.parameters, last.tokens, losses)))
    return pd.DataFrame(rows, columns=["direction", "x", "loss", "low", "high"])
