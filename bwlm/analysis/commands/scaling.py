"""`bwlm analyze scaling`: the loss over size and data, and the gap between two directions over size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from bwlm.analysis.charts.scaling import gap_trend_chart, law_chart, scaling_chart
from bwlm.analysis.commands.result import OVER_SEEDS, Analysis
from bwlm.analysis.runs.document_losses import document_losses, gap_table
from bwlm.analysis.runs.findings import Findings, find
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.rates import best_on_test
from bwlm.directions import rank
from bwlm.errors import UserError
from bwlm.format import counted, short_number
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.labels import varying_settings
from bwlm.stats.columns import FloatArray, Size
from bwlm.stats.gap_trend import GapTrend, gap_by_size
from bwlm.stats.gaps import PER_DIRECTION, QUANTILES, Gap
from bwlm.stats.scaling_fit import HeldOut, ScalingFit, checked_runs, fit, hold_out
from bwlm.stats.scaling_law import (
    COEFFICIENT_AND_EXPONENT,
    CONVENTION,
    Law,
    Term,
    unknowns,
)

_CURVE_POINTS: Final = 60


def scaling(folders: list[ExperimentFolder]) -> Analysis:
    """Fit a law for each direction, predict the largest size, and test the trend of the gap over size.

    Raises `UserError` if no run has finished, or sizes are too few.
    """
    findings = find(folders)
    runs = losses_by_size(folders, findings)
    at_own_size = [gap for gap in findings.gaps if PER_DIRECTION not in str(gap.size)]
    return analyse(runs, at_own_size, findings.skipped)


def losses_by_size(folders: list[ExperimentFolder], findings: Findings) -> pd.DataFrame:
    """Return run, direction, seed, size, parameters, tokens, loss of the finished runs at the best rates.

    Losses are in nats per token, on the test half of the windows. Raises `UserError` if no run has finished, or if the
    runs differ in more than their sizes.
    """
    losses = document_losses([folder for folder in folders if folder.status().state == "finished"])
    if not losses.folders or not findings.best:
        raise UserError("analyze scaling: no run has finished: finish them, or name finished runs")
    configs = {folder.id: folder.config() for folder in losses.folders}
    _refuse_other_than_sizes({run: config.compared for run, config in configs.items()})
    rows = best_on_test(gap_table(losses, sizes(folders)), findings.best)
    summed = rows.groupby(["run", "direction", "seed", "size"], as_index=False)[["nll", "tokens"]].sum()
    return pd.DataFrame(
        {
            **{name: summed[name] for name in ("run", "direction", "seed", "size")},
            "parameters": [configs[run].parameters.scaling for run in summed["run"]],
            "tokens": [configs[run].steps * configs[run].experiment.budget.batch_tokens for run in summed["run"]],
            "loss": summed["nll"] / summed["tokens"],
        }
    )


def _refuse_other_than_sizes(identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `UserError` if runs differ in more than model size and steps: other settings would bend the law."""
    text = [name for name in ("data", "tokenizer") if len({str(of.get(name)) for of in identities.values()}) > 1]
    others = [*text, *(name for name in varying_settings(identities) if name != "steps")]
    if others:
        raise UserError(
            f"analyze scaling: the runs differ in {', '.join(others)}, not in size alone: name runs that agree there"
        )


def analyse(
    table: pd.DataFrame, gaps: Sequence[Gap], notes: Sequence[str] = (), resamples: int = 200, seed: int = 0
) -> Analysis:
    """Return findings in sentences, the fitted parameters, predictions and gaps with their intervals, and a chart.

    The main table has the columns direction, parameter, value, low, high, runs. A direction that cannot be fitted gets
    a sentence with the reason. Raises `UserError` if no direction can be fitted.
    """
    runs = checked_runs(table)
    fits, held, problems = _fit_directions(runs, resamples, seed)
    if not fits:
        raise UserError("; ".join(problems))
    parameters = _parameters_by_size(table)
    trends = gap_by_size(gaps, parameters)
    over_size = _gap_frame(gaps, parameters)
    sentences = [_fit_words(one) for one in fits] + [_held_out_words(one) for one in held] + problems
    sentences += [trend.sentence for trend in trends]
    further = {"largest size left out": _held_out_frame(held), "gap over size": over_size}
    return Analysis(
        "scaling",
        title := "Loss over size and data",
        [*sentences, f"{CONVENTION}."],
        _fit_frame(fits),
        scaling_chart(_law_chart(fits, held), _gap_chart(over_size, trends, parameters), title),
        list(notes),
        more={name: frame for name, frame in further.items() if len(frame)},
        bounds=OVER_SEEDS,
    )


def _fit_directions(runs: pd.DataFrame, resamples: int, seed: int) -> tuple[list[ScalingFit], list[HeldOut], list[str]]:
    fits: list[ScalingFit] = []
    held: list[HeldOut] = []
    problems = []
    for direction in sorted(set(runs["direction"]), key=rank):
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
        raise UserError(
            f"size '{several.index[several > 1][0]}' has runs with different numbers of parameters: name them as "
            "different sizes"
        )
    return dict(zip(table["size"], table["parameters"].astype(float), strict=True))


# Words and table


def _fit_words(one: ScalingFit) -> str:
    law, runs = one.law, one.runs
    terms = [f"{law.A:.3g} / N^{law.a:.3f}"] if "parameters" in one.terms else []
    terms += [f"{law.B:.3g} / D^{law.b:.3f}"] if "tokens" in one.terms else []
    shown = ["E", *(COEFFICIENT_AND_EXPONENT[term][1] for term in one.terms)]
    if one.intervals is None:
        sure = "no intervals, as no cell has two seeds"
    else:
        sure = "95 % over seeds: " + ", ".join(
            f"{name} {one.intervals[name][0]:.3f} .. {one.intervals[name][1]:.3f}" for name in shown
        )
    free, cells = len(unknowns(one.terms)), len(runs.drop_duplicates(["parameters", "tokens"]))
    exact = f"; {free} unknowns on {cells} cells, so the fit does not test the law" if cells <= free else ""
    return (
        f"{one.direction}: L = {' + '.join([f'{law.E:.3f}', *terms])} nats per token ({sure}; "
        f"{counted(len(runs), 'run')}, {counted(runs['parameters'].nunique(), 'size')}, "
        f"{counted(runs['tokens'].nunique(), 'token budget')}{exact})" + (f"; {one.reason}." if one.reason else ".")
    )


def _held_out_words(one: HeldOut) -> str:
    size = f"N = {short_number(one.parameters)}, D = {short_number(one.tokens)}"
    where = f"{one.direction}, largest size left out ({size})"
    measured = f"found {one.found:.4f} over {counted(one.seeds, 'seed')}, {one.found - one.predicted:+.4f}"
    if one.predicted_interval is None or one.miss_interval is None:
        return f"{where}: predicted {one.predicted:.4f} nats per token, {measured}."
    (low, high), (short, far) = one.predicted_interval, one.miss_interval
    verdict = "as predicted" if short <= 0 <= far else "worse than predicted" if short > 0 else "better than predicted"
    if one.exact:
        verdict = "the law goes through each of the other sizes, so these intervals are too narrow to judge it by"
    return (
        f"{where}: predicted {one.predicted:.4f} nats per token (95 % {low:.4f} .. {high:.4f}), {measured} "
        f"(95 % {short:+.4f} .. {far:+.4f}): {verdict}."
    )


def _fit_frame(fits: Sequence[ScalingFit]) -> pd.DataFrame:
    rows = [
        (one.direction, name, getattr(one.law, name), *(one.intervals or {}).get(name, (np.nan, np.nan)), len(one.runs))
        for one in fits
        for name in unknowns(one.terms)
    ]
    return pd.DataFrame(rows, columns=["direction", "parameter", "value", "low", "high", "runs"])


def _held_out_frame(held: Sequence[HeldOut]) -> pd.DataFrame:
    """Return losses in nats per token, with the intervals of predicted (`low`, `high`) and of `miss`."""
    missing = (np.nan, np.nan)
    rows = [
        (
            *(one.direction, one.parameters, one.tokens, one.seeds),
            *(one.predicted, *(one.predicted_interval or missing)),
            *(one.found, one.found - one.predicted, *(one.miss_interval or missing)),
        )
        for one in held
    ]
    names = "direction parameters tokens seeds predicted low high found miss miss_low miss_high"
    return pd.DataFrame(rows, columns=names.split())


def _gap_frame(gaps: Sequence[Gap], parameters: Mapping[Size, float] | None) -> pd.DataFrame:
    """Return each pair's gap at each size, in nats per token."""
    rows = [
        (one.pair, one.size, float((parameters or {}).get(one.size, np.nan)), len(one.seeds), one.gap_nats)
        + (one.seed_interval or (np.nan, np.nan))
        for one in gaps
    ]
    return pd.DataFrame(rows, columns=["gap", "size", "parameters", "seeds", "nats", "low", "high"])


# Chart


@dataclass(frozen=True)
class _Axis:
    """X axis of the chart, and the budget at which laws with both terms are drawn."""

    variable: Term
    tokens: float  # the largest budget

    @classmethod
    def from_fits(cls, fits: Sequence[ScalingFit]) -> _Axis:
        variable: Term = "parameters" if any("parameters" in one.terms for one in fits) else "tokens"
        return cls(variable, max(float(one.runs["tokens"].max()) for one in fits))

    def law_at(self, law: Law, x: Any) -> FloatArray:
        return law.loss(x, self.tokens) if self.variable == "parameters" else law.loss(1.0, x)

    def moved(self, one: ScalingFit, parameters: Any, tokens: Any, losses: Any) -> Any:
        """Return losses moved to the largest budget by the law's own ratio: each keeps its distance from the law."""
        if len(one.terms) < 2:
            return losses
        return losses * one.law.loss(parameters, self.tokens) / one.law.loss(parameters, tokens)


def _law_chart(fits: Sequence[ScalingFit], held: Sequence[HeldOut]) -> Any:
    axis = _Axis.from_fits(fits)
    points = pd.concat([_points(one, axis) for one in fits], ignore_index=True)
    curves = pd.concat([_curve(one, axis) for one in fits if axis.variable in one.terms], ignore_index=True)
    moved = any(len(one.terms) == 2 and one.runs["tokens"].nunique() > 1 for one in fits)
    note = f"points moved along the law to {short_number(axis.tokens)} tokens" if moved else ""
    x_title = "parameters (blocks and output layer)" if axis.variable == "parameters" else "training tokens"
    return law_chart(points, curves, _predictions(fits, held, axis), x_title, note)


def _gap_chart(
    over_size: pd.DataFrame, trends: Sequence[GapTrend], parameters: Mapping[Size, float] | None
) -> Any | None:
    """Draw the gaps over size; None if no pair has a line over sizes."""
    ends = [
        (f"{one.a} → {one.b}", parameters[size], nats)
        for one in trends
        if one.fitted and parameters
        for size, nats in zip((one.sizes[0], one.sizes[-1]), one.fitted, strict=True)
    ]
    return gap_trend_chart(over_size, pd.DataFrame(ends, columns=["gap", "parameters", "nats"])) if ends else None


def _points(one: ScalingFit, axis: _Axis) -> pd.DataFrame:
    runs = one.runs
    loss = axis.moved(one, runs["parameters"], runs["tokens"], runs["loss"])
    return pd.DataFrame({"direction": one.direction, "run": runs["run"], "x": runs[axis.variable], "loss": loss})


def _curve(one: ScalingFit, axis: _Axis) -> pd.DataFrame:
    x = np.geomspace(one.runs[axis.variable].min(), one.runs[axis.variable].max(), _CURVE_POINTS)
    curve = pd.DataFrame({"direction": one.direction, "x": x, "loss": axis.law_at(one.law, x)})
    if not one.resampled:
        return curve.assign(low=np.nan, high=np.nan)
    low, high = np.quantile([axis.law_at(law, x) for law in one.resampled], QUANTILES, axis=0)
    return curve.assign(low=low, high=high)


def _predictions(fits: Sequence[ScalingFit], held: Sequence[HeldOut], axis: _Axis) -> pd.DataFrame:
    """Return the predicted and the measured loss of each direction's largest size at its largest budget."""
    rows = []
    for one in fits:
        own = [guess for guess in held if guess.direction == one.direction]
        if own:
            last = max(own, key=lambda guess: guess.tokens)
            losses = np.array([last.predicted, *(last.predicted_interval or (np.nan, np.nan))])
            rows.append((one.direction, last.parameters, *axis.moved(one, last.parameters, last.tokens, losses)))
    return pd.DataFrame(rows, columns=["direction", "x", "loss", "low", "high"])
