"""Scaling law of one direction's runs: its intervals over seeds, and the largest size predicted from the others.

Input is a table with a row per finished run and the columns

    run, direction, seed, parameters, tokens, loss (nats per token)

`tokens` are training tokens; `parameters` are `ParameterCounts.scaling`.

The intervals cover what another draw of seeds would change. They do not cover the error of the law itself: the
prediction of the largest size tests that. Not covered here: which runs may be compared (the report audits their
fingerprints), the choice of a learning rate, compute-optimal sizes.

Suffixes of arrays: N runs, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from bwlm.errors import UserError, nearest
from bwlm.format import counted
from bwlm.stats.columns import FloatArray, require_columns
from bwlm.stats.gaps import QUANTILES, Interval
from bwlm.stats.scaling_law import Law, Term, fit_law, unknowns

COLUMNS: Final = ("run", "direction", "seed", "parameters", "tokens", "loss")
FEWEST_SIZES: Final = 3  # a curve E + A / N^a has three unknowns

_TIED: Final = 0.1  # budgets within 10 % of a smooth function of the size follow from it


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """Fitted law of one direction, with its bootstrap over seeds."""

    direction: str
    terms: tuple[Term, ...]  # terms that were fitted beside E
    law: Law
    intervals: dict[str, Interval] | None  # by name of the unknown; None if no cell has two seeds
    resampled: list[Law]  # laws of the bootstrap
    runs: pd.DataFrame  # runs that it was fitted to
    reason: str  # why a term is missing; empty if none is


@dataclass(frozen=True)
class HeldOut:
    """Cell of the largest size, predicted from the other sizes; losses in nats per token."""

    direction: str
    parameters: float
    tokens: float
    seeds: int
    predicted: float
    found: float  # mean over seeds
    predicted_interval: Interval | None
    miss_interval: Interval | None  # interval of found - predicted, both resampled
    exact: bool  # the law goes through every remaining cell: the intervals are too narrow


def fit(table: pd.DataFrame, direction: str, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Fit L = E + A / N^a + B / D^b to one direction's runs, with 95 % intervals over seeds.

    Huber loss on log L (`objective`) by L-BFGS-B, from the best of a grid of exponents with E, A and B by non-negative
    least squares at each. If all runs have one N, or one D, or D follows from N (by a fixed ratio, say), the terms
    cannot be told apart: one term is fitted, and `reason` says so.

    Intervals are percentiles of a bootstrap that redraws the seeds of each cell (N, D); deviations from the cell's mean
    log loss are stretched by sqrt(k / (k - 1)) for k seeds (Rao and Wu 1988, JASA 83:231-241), since k deviations from
    their own mean are too small. A cell with one seed draws from the deviations of the others. In simulations with
    three seeds the intervals of exponents cover 91 to 96 %; that of a loss 74 %, if three sizes fix three unknowns.

    Raises `UserError` if the runs have too few sizes or budgets, and says which would do.
    """
    runs = _runs_of(checked_runs(table), direction)
    terms, reason = _identified(runs, direction)
    law, laws = fit_law(runs, terms, _redraw(runs, resamples, seed))
    intervals = {name: _percentiles([getattr(one, name) for one in laws]) for name in unknowns(terms)} if laws else None
    return ScalingFit(direction, terms, law, intervals, laws, runs, reason)


def hold_out(table: pd.DataFrame, direction: str, resamples: int = 200, seed: int = 0) -> list[HeldOut]:
    """Fit without the largest size and predict its loss, at each of its token budgets.

    Raises `UserError` if the remaining sizes do not identify the law that all sizes do.
    """
    runs = _runs_of(checked_runs(table), direction)
    terms, _ = _identified(runs, direction)
    largest = runs["parameters"].max()
    kept = (runs["parameters"] < largest).to_numpy()
    if "parameters" not in terms or not _same_terms(runs[kept], direction, terms):
        raise UserError(
            f"{direction}: the largest size cannot be predicted, as the others alone do not identify the law: "
            f"train {FEWEST_SIZES + 1} sizes or more, at the same budgets"
        )
    exact = len(runs[kept].drop_duplicates(["parameters", "tokens"])) <= len(unknowns(terms))
    drawn_rn = _redraw(runs, resamples, seed)
    law, laws = fit_law(runs[kept], terms, None if drawn_rn is None else drawn_rn[:, kept])
    predictions = []
    for tokens in sorted(runs.loc[~kept, "tokens"].unique()):
        cell = ~kept & (runs["tokens"] == tokens).to_numpy()
        predicted_r = np.array([float(one.loss(largest, tokens)) for one in laws])
        miss_r = [] if drawn_rn is None else np.exp(drawn_rn[:, cell]).mean(axis=1) - predicted_r
        predictions.append(
            HeldOut(
                direction=direction,
                parameters=float(largest),
                tokens=float(tokens),
                seeds=int(cell.sum()),
                predicted=float(law.loss(largest, tokens)),
                found=float(runs.loc[cell, "loss"].mean()),
                predicted_interval=_percentiles(predicted_r) if laws else None,
                miss_interval=_percentiles(miss_r) if laws else None,
                exact=exact,
            )
        )
    return predictions


def checked_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the needed columns with plain types, sorted by cell and seed.

    Raises `UserError` for an empty table, a missing name, a number that is not positive and finite, or two runs of one
    cell and seed.
    """
    require_columns(table, COLUMNS, "the runs")
    if table.empty:
        raise UserError("there are no runs to fit: give a row for each finished run")
    for name in ("run", "direction", "seed"):
        blank = table[name].isna().to_numpy()
        if blank.any():
            raise UserError(f"the runs' row {int(blank.argmax()) + 1} has no {name}: fill it in or leave the row out")
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


# From the table to one direction's runs


def _runs_of(runs: pd.DataFrame, direction: str) -> pd.DataFrame:
    known = list(dict.fromkeys(runs["direction"]))
    if direction not in known:
        raise UserError(
            f"there are no runs of direction '{direction}'{nearest(direction, known)}; directions: {', '.join(known)}"
        )
    return runs[runs["direction"] == direction].reset_index(drop=True)


def _identified(runs: pd.DataFrame, direction: str) -> tuple[tuple[Term, ...], str]:
    """Return the terms that the runs can tell apart, and why not both. Raises `UserError` if there is none."""
    sizes, budgets = runs["parameters"].nunique(), runs["tokens"].nunique()
    counts = f"{direction} has {counted(sizes, 'size')} and {counted(budgets, 'token budget')}"
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
            f"{counts}: too few for a law in size; train {FEWEST_SIZES} sizes or more, such as depth: [2, 4, 8], "
            "at one token budget, or three budgets each"
        )
    raise UserError(
        f"{counts}, in too few combinations to tell size from data; train {FEWEST_SIZES} sizes or more, "
        f"each at the same {FEWEST_SIZES} budgets, or all at one"
    )


def _tied(runs: pd.DataFrame) -> bool:
    """Return whether log D is, to within 10 %, a parabola in log N; budgets rounded to whole steps count too."""
    log_n, log_d = np.log(runs["parameters"].to_numpy()), np.log(runs["tokens"].to_numpy())
    x_n = (log_n - log_n.mean()) / log_n.std()
    residual_n = log_d - np.polyval(np.polyfit(x_n, log_d, 2), x_n)
    return bool(np.sqrt(np.mean(residual_n**2)) < _TIED)


def _full_rank(runs: pd.DataFrame) -> bool:
    """Return whether the five derivatives of the law differ on these cells, at typical exponents (0.4 and 0.3)."""
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


# The bootstrap over seeds


def _redraw(runs: pd.DataFrame, resamples: int, seed: int) -> FloatArray | None:
    """Return log losses [R, N] with the seeds of each cell redrawn; None if no cell has two seeds.

    The draws follow the order of the table alone, so directions with the same cells and seeds share them.
    """
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: the bootstrap needs at least 1, and 200 to be of use")
    rng = np.random.default_rng(seed)
    log_loss_n = np.log(runs["loss"].to_numpy(dtype=np.float64))
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
    low, high = np.quantile(np.asarray(values), QUANTILES)
    return float(low), float(high)
