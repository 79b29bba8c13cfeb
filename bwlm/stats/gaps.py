"""Gaps between directions, paired by seed: intervals, tests, noise floor and verdict.

Input is a table of losses, a row per run and document (`bwlm.stats.loss_table`), output one `Gap` per size and pair
of directions: the gap b - a in nats per token, bits per byte and percent, two intervals, a noise floor and a verdict in
words. Runs are paired by seed and losses by document.

The verdict rests on the seeds alone, by a paired t-test: documents are many, so an interval over documents is narrow
even if the next seed would turn the sign. The verdict therefore speaks about further seeds on *this* text; the crossed
bootstrap beside it lets the text vary too. Not covered here: which runs may be compared (the report audits their
fingerprints), and the choice of a learning rate (a `Gap` knows only how many seeds made that choice).

Suffixes of arrays: S paired seeds, D documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit  # those of scipy.stats, which takes half a second to import

from bwlm.directions import DIRECTIONS, is_marked, rank
from bwlm.errors import UserError, nearest
from bwlm.format import counted, listed
from bwlm.stats.columns import FloatArray, Size, plain_size
from bwlm.stats.loss_table import LossRun, LossRuns, loss_runs

Interval = tuple[float, float]
Verdict = Literal["different", "no difference seen", "too few seeds to tell", "too few seeds chose the rate"]

DIFFERENT: Final = "different"
NO_DIFFERENCE: Final = "no difference seen"
TOO_FEW_SEEDS: Final = "too few seeds to tell"
TOO_FEW_CHOSE: Final = "too few seeds chose the rate"

PER_DIRECTION: Final = ", bidirectional at equal tokens per direction"
"""Suffix of the size of pairs whose bidirectional runs read twice the tokens; all runs meet at their own size too."""
FEWEST_SEEDS: Final = 3  # paired seeds, and seeds that chose a learning rate, that a verdict needs
FEWEST_DOCUMENTS: Final = 10  # with fewer do not show `Gap.bootstrap`: from one document it has no width
CONFIDENCE: Final = 0.95  # level of every interval
QUANTILES: Final = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)  # ends of an interval from a bootstrap

_ROUNDING: Final = 1e-12  # nats per token; gaps and spreads up to this size are floating-point dust
_CHUNK: Final = 1_000_000  # documents drawn at a time by the bootstrap: about 30 MB at once


@dataclass(frozen=True, eq=False)
class Gap:
    """Gap b - a at one size; positive if a has the lower loss. Scalars are plain Python numbers.

    `gap` leaves the last three fields unfilled, since a verdict depends on the whole family of comparisons: `judge` and
    `gaps` fill them. Callers that chose the learning rates set `choosing_seeds`.
    """

    size: Size
    a: str
    b: str
    seeds: list[int]  # seeds of both directions, ascending
    dropped_seeds: dict[str, list[int]]  # direction -> its seeds that the other direction lacks
    documents: int  # documents that both directions were measured on
    per_seed: FloatArray  # nats per token, in the order of `seeds`
    gap_nats: float  # nats per token, the mean of `per_seed`
    gap_bpb: float  # bits per byte
    gap_percent: float  # percent of a's mean loss
    bootstrap: Interval  # nats per token; over documents alone with one seed
    seed_interval: Interval | None  # nats per token; None with one seed
    noise_floor: float | None  # nats per token, over `seeds`; None with one seed
    p: float | None  # paired t, two-sided, not adjusted; None with one seed
    choosing_seeds: int | None = None  # seeds that chose the rates, of the direction with fewer; None: no choice known
    p_adjusted: float | None = None  # Holm over the family; None if the pair is not tested
    verdict: Verdict | None = None
    reason: str = ""

    @property
    def pair(self) -> str:
        """Return the name of the pair, which says what is subtracted from what: the first from the second."""
        return f"{self.a} → {self.b}"


def gap(losses: pd.DataFrame, a: str, b: str, size: Size, resamples: int = 10_000, seed: int = 0) -> Gap:
    """Measure the gap between directions a and b at one size, without a verdict (which needs the family: see `gaps`).

    Per seed s, over all documents d:   g_s = sum_d (nll_b[s,d] - nll_a[s,d]) / sum_d tokens[d]
    The gap is the mean of g_s over the paired seeds. For bits per byte the sum is divided by ln 2 and by the bytes; the
    percentage is the gap over the mean of a's losses in nats per token.

    A seed that only one direction has is left out and listed in `dropped_seeds`. Raises `UserError` if the directions
    share no seed, or their runs cover different text.
    """
    _check_resamples(resamples)
    return _measure(loss_runs(losses), a, b, plain_size(size), resamples, seed)


def gaps(losses: pd.DataFrame, resamples: int = 10_000, seed: int = 0, alpha: float = 0.05) -> list[Gap]:
    """Measure every size x pair of directions and judge them as one family.

    Sizes come in ascending order (numbers before names). In a pair, a stands before b in the order forward, backward,
    bidirectional, permuted, then any others by name. Each gap bootstraps from the same `seed`, so its interval does not
    depend on what else is in the table. Raises `UserError` if a pair cannot be measured.
    """
    measured, problems = measured_pairs(losses, resamples, seed)
    if problems:
        raise UserError("; ".join(problems))
    return judge(measured, alpha)


def measured_pairs(losses: pd.DataFrame, resamples: int = 10_000, seed: int = 0) -> tuple[list[Gap], list[str]]:
    """Return the gaps of `gaps` without verdicts, and a reason for each pair that cannot be measured.

    Raises `UserError` if the table itself is wrong, or has no two directions of one size.
    """
    _check_resamples(resamples)
    runs = loss_runs(losses)
    pairs = _pairs(runs)
    if not pairs:
        raise UserError(
            f"nothing to compare: no size has runs of two directions (directions found: "
            f"{listed({direction for cells in runs.values() for direction in cells})}); add runs of a second direction"
        )
    measured, problems = [], []
    for size, a, b in pairs:
        try:
            measured.append(_measure(runs, a, b, size, resamples, seed))
        except UserError as error:
            problems.append(f"size {size}, {a} and {b}: {error}")
    return measured, problems


def judge(family: Sequence[Gap], alpha: float = 0.05) -> list[Gap]:
    """Return the gaps with p_adjusted, verdict and reason, judged as one family.

    `different` if and only if the paired t-test's p, Holm-adjusted over the family, is below alpha. A gap with fewer
    than three paired seeds gets `too few seeds to tell` whatever its p, and so does a gap whose seeds are copies of one
    run. A gap with enough seeds, but a learning rate that fewer than three seeds chose, gets `too few seeds chose the
    rate`. Such gaps are never tested, so they do not count in the family and make no other verdict stricter.
    """
    untold = [_why_not_tested(g) for g in family]
    tested = [g.p for g, why in zip(family, untold, strict=True) if g.p is not None and not why]
    adjusted = iter(holm(tested))
    return [
        replace(g, verdict=why[0], reason=f"{why[1]}{_dropped_words(g)}")
        if why
        else _with_verdict(g, next(adjusted), len(tested), alpha)
        for g, why in zip(family, untold, strict=True)
    ]


def has_seeds_enough(g: Gap) -> bool:
    """Return true if three seeds or more were paired, and as many chose each learning rate that was chosen."""
    return len(g.seeds) >= FEWEST_SEEDS and (g.choosing_seeds is None or g.choosing_seeds >= FEWEST_SEEDS)


def _why_not_tested(g: Gap) -> tuple[Verdict, str] | None:
    """Return the verdict and reason of a gap that no test can judge; None for a gap to test."""
    if len(g.seeds) < FEWEST_SEEDS:
        return TOO_FEW_SEEDS, f"{counted(len(g.seeds), 'paired seed')}, a verdict needs {FEWEST_SEEDS}"
    if g.noise_floor is not None and g.noise_floor <= _ROUNDING:
        return TOO_FEW_SEEDS, "seeds do not differ in either direction: copies of one run are one seed"
    if not has_seeds_enough(g):
        return (
            TOO_FEW_CHOSE,
            f"the rate was chosen by {counted(g.choosing_seeds or 0, 'seed')}, a verdict needs {FEWEST_SEEDS}",
        )
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted as one family, in the order given (Holm 1979, Scand. J. Statist. 6:65-70).

    With p_(1) <= .. <= p_(m):   adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j))
    Rejecting at adjusted < alpha keeps the chance of any false rejection below alpha, whatever the dependence.
    Raises `ValueError` for a p outside 0..1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():  # false for NaN too
        raise ValueError(f"p-values must lie in 0..1, got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    steps = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps * p[order]))
    return [float(value) for value in adjusted]


def paired_t(differences: FloatArray) -> tuple[float, Interval] | None:
    """Return p and 95 % interval of the two-sided paired t-test (Student 1908, Biometrika 6:1-25); None if n < 2.

    Over n differences with mean m and standard deviation s (n - 1 in its denominator):
    t = m / (s / sqrt n),   p = 2 P(T_{n-1} > |t|),   interval m -+ t_{0.975, n-1} s / sqrt n

    Differences without spread have no t: p is 1 if all of them are zero, and 0 if they share another value. Both
    are judged up to rounding (1e-12 nats per token), so that the order of a sum cannot make a difference.
    """
    n = len(differences)
    if n < 2:
        return None
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / n**0.5
    half_width = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    interval = (mean - half_width, mean + half_width)
    if np.abs(differences).max() <= _ROUNDING:
        return 1.0, interval
    if error <= _ROUNDING:
        return 0.0, interval
    return 2.0 * float(stdtr(n - 1, -abs(mean) / error)), interval


def noise_floor(losses_by_direction: Iterable[FloatArray]) -> float | None:
    """Return the noise floor: RMS gap over all pairs of seeds of one direction, directions pooled (nats per token).

    Pairs of all directions are pooled. It is the statistic of the gap, between runs that differ in the seed only. For
    two directions with the same number of seeds it equals sqrt(var_a + var_b): the gap that one run of each, with
    different seeds, would show by chance. None if no direction has two seeds.
    """
    apart = [one - other for loss_s in losses_by_direction for one, other in combinations(loss_s, 2)]
    return float(np.sqrt(np.mean(np.square(apart)))) if apart else None


def crossed_bootstrap(difference_sd: FloatArray, tokens_d: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Return gaps [R] (nats per token) of tables resampled from the given one, in both seeds and documents.

    The pigeonhole bootstrap of Owen (2007, Ann. Appl. Stat. 1:386-411) for crossed random effects: seeds and documents
    are drawn independently, with replacement, and one draw of documents, counted in weights w, serves all drawn seeds:
    mean over drawn seeds s of  sum_d w_d difference[s,d] / sum_d w_d tokens[d]
    Drawing documents anew for each seed would average away what the documents share, and make the interval too narrow.

    With many seeds and documents it overstates the variance a little. With few seeds it understates it: the spread over
    S seeds shrinks by sqrt((S - 1) / S). Hence the verdict takes the t-test.
    """
    rng = np.random.default_rng(seed)
    seeds, documents = difference_sd.shape
    drawn_seeds_rs = rng.integers(seeds, size=(resamples, seeds))
    summands = np.column_stack([difference_sd.T, tokens_d])  # the seeds' differences, then the tokens
    gap_rs = np.empty((resamples, seeds))
    chunk = max(1, _CHUNK // documents)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(documents, size=(rows, documents)) + documents * np.arange(rows)[:, None]
        weight_rd = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        sums = weight_rd.astype(np.float64) @ summands
        gap_rs[start : start + rows] = sums[:, :-1] / sums[:, -1:]
    return np.asarray(np.take_along_axis(gap_rs, drawn_seeds_rs, axis=1).mean(axis=1))


# From the runs to one gap


@dataclass(frozen=True)
class _Pair:
    """Losses of two directions over the same seeds and documents."""

    seeds: list[int]
    dropped: dict[str, list[int]]
    nll_a_sd: FloatArray
    nll_b_sd: FloatArray
    tokens_d: FloatArray
    bytes_d: FloatArray


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: the bootstrap needs at least 1, and 10000 to be smooth")


def _pairs(runs: LossRuns) -> list[tuple[Size, str, str]]:
    """Return every size with two of its directions that are compared at it."""
    return [
        (size, a, b)
        for size in sorted(runs, key=lambda size: (isinstance(size, str), size))
        for a, b in combinations(sorted(runs[size], key=rank), 2)
        if is_pair(size, b)
    ]


def is_pair(size: Size, b: str) -> bool:
    """Return whether `b`, the later direction, is compared at a size: at `PER_DIRECTION` only bidirectional is."""
    return PER_DIRECTION not in str(size) or (b in DIRECTIONS and is_marked(b))


def _measure(runs: LossRuns, a: str, b: str, size: Size, resamples: int, seed: int) -> Gap:
    pair = _paired(runs, a, b, size)
    difference_sd = pair.nll_b_sd - pair.nll_a_sd
    tokens = pair.tokens_d.sum()
    per_seed = difference_sd.sum(axis=1) / tokens
    loss_a_s, loss_b_s = pair.nll_a_sd.sum(axis=1) / tokens, pair.nll_b_sd.sum(axis=1) / tokens
    low, high = np.quantile(crossed_bootstrap(difference_sd, pair.tokens_d, resamples, seed), QUANTILES)
    p, seed_interval = paired_t(per_seed) or (None, None)
    return Gap(
        size=size,
        a=a,
        b=b,
        seeds=pair.seeds,
        dropped_seeds=pair.dropped,
        documents=len(pair.tokens_d),
        per_seed=per_seed,
        gap_nats=float(per_seed.mean()),
        gap_bpb=float(difference_sd.sum(axis=1).mean() / np.log(2) / pair.bytes_d.sum()),
        gap_percent=float(100 * per_seed.mean() / loss_a_s.mean()),
        bootstrap=(float(low), float(high)),
        seed_interval=seed_interval,
        noise_floor=noise_floor([loss_a_s, loss_b_s]),
        p=p,
    )


def _paired(runs: LossRuns, a: str, b: str, size: Size) -> _Pair:
    """Pair the runs of two directions by seed and their losses by document."""
    runs_a, runs_b = _runs_of(runs, a, size), _runs_of(runs, b, size)
    if a == b:
        raise UserError(f"cannot compare direction '{a}' with itself: name two directions")
    seeds = sorted(runs_a.keys() & runs_b.keys())
    if not seeds:
        raise UserError(
            f"{a} (seeds {listed(runs_a)}) and {b} (seeds {listed(runs_b)}) share no seed at size {size}: "
            "runs are paired by seed, so train both with the same seeds"
        )
    dropped = {
        direction: sorted(own.keys() - set(seeds))
        for direction, own in ((a, runs_a), (b, runs_b))
        if own.keys() - set(seeds)
    }
    first = runs_a[seeds[0]]
    for seed in seeds:
        _refuse_other_text(first, runs_a[seed])
        _refuse_other_text(first, runs_b[seed])
    return _Pair(
        seeds=seeds,
        dropped=dropped,
        nll_a_sd=np.stack([runs_a[seed].nll_d for seed in seeds]),
        nll_b_sd=np.stack([runs_b[seed].nll_d for seed in seeds]),
        tokens_d=first.tokens_d,
        bytes_d=first.bytes_d,
    )


def _runs_of(runs: LossRuns, direction: str, size: Size) -> dict[int, LossRun]:
    if size not in runs:
        raise UserError(f"the losses have no size {size!r}: choose from {listed(runs)}")
    if direction not in runs[size]:
        known = runs[size]
        raise UserError(
            f"the losses have no direction '{direction}' at size {size}{nearest(direction, known)}; "
            f"their directions: {listed(known)}"
        )
    return runs[size][direction]


def _refuse_other_text(one: LossRun, other: LossRun) -> None:
    """Raise `UserError` unless both runs cover the same documents, with the same tokens and bytes."""
    if (
        one.documents == other.documents
        and np.array_equal(one.tokens_d, other.tokens_d)
        and np.array_equal(one.bytes_d, other.bytes_d)
    ):
        return
    covered, covered_by_other = _coverage(one), _coverage(other)
    lacks = "lacks it"
    document = min(d for d in covered.keys() | covered_by_other.keys() if covered.get(d) != covered_by_other.get(d))
    raise UserError(
        f"document '{document}' differs: run '{one.name}' {covered.get(document, lacks)}, "
        f"run '{other.name}' {covered_by_other.get(document, lacks)}; evaluate both on the same windows"
    )


def _coverage(run: LossRun) -> dict[str, str]:
    """Return in words what a run covers of each document."""
    return {
        document: f"has {tokens:.15g} tokens and {size:.15g} bytes of it"
        for document, tokens, size in zip(run.documents, run.tokens_d, run.bytes_d, strict=True)
    }


# Words


def _with_verdict(g: Gap, p_adjusted: float, family: int, alpha: float) -> Gap:
    flat = ", no spread between the seeds" if float(np.std(g.per_seed)) <= _ROUNDING else ""
    return replace(
        g,
        p_adjusted=p_adjusted,
        verdict=DIFFERENT if p_adjusted < alpha else NO_DIFFERENCE,
        reason=f"paired t over {len(g.seeds)} seeds, p = {p_adjusted:.3g} (Holm over {family}){flat}"
        + _dropped_words(g),
    )


def _dropped_words(g: Gap) -> str:
    return "".join(
        f"; dropped {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)} (only in {direction})"
        for direction, seeds in g.dropped_seeds.items()
    )
