"""Learning curves of several runs over steps, tokens, FLOPs and time, and the tokens needed to reach a loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.analysis.charts.losses import comparison_curves
from bwlm.analysis.commands.result import OVER_SEEDS, Analysis
from bwlm.analysis.runs.findings import best_rates
from bwlm.analysis.runs.learning_curves import smoothed_curves
from bwlm.analysis.runs.rates import of_groups
from bwlm.directions import DIRECTIONS
from bwlm.errors import UserError
from bwlm.format import counted, short_number
from bwlm.phases import PHASES
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.gaps import FEWEST_SEEDS, paired_t

AXES = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}
_GROUP = ["size", "direction", "lr"]
_POINTS = 120
"""Points of a curve in the chart of several runs."""
_LEVELS = 3
_EFFICIENCY = [
    *("size", "loss", "direction", "seeds", "tokens", "flops"),
    *("against", "ratio", "ratio_low", "ratio_high", "averaged"),
]
_DIFFERENCE = ["tokens", "difference", "low", "high", "size", "direction", "against", "seeds"]
_OF_ONE_RUN = 200
"""Points of a single run's curve."""


def compare(folders: list[ExperimentFolder]) -> Analysis:
    """Return curves with bands over seeds, and the tokens and FLOPs to reach a loss (learning efficiency).

    Directions are compared in base and mid alone: in SFT each learns to write its own part of a conversation.

    Raises `UserError` if no run has logged a step, or if all are of RL.
    """
    learning = without_rl(folders)
    if not learning:
        raise UserError("analyze compare: in RL the loss does not show learning: use `bwlm analyze rewards`")
    curves = smoothed_curves(learning)
    if curves.empty:
        raise UserError("analyze compare: no run has logged a step yet: wait for the first one")
    several = curves["direction"].nunique() > 1
    same_text = {folder.id for folder in learning if PHASES[folder.config().experiment.phase].compared}
    held = curves[curves["run"].isin(same_text)] if several else curves
    chosen = at_best_rates(held, {(rate.size, rate.direction): rate.lr for rate in best_rates(learning)})
    table, apart = efficiency(chosen), differences(chosen)
    title = "Learning curves"
    without = sorted({folder.id for folder in learning if folder.status().step} - set(curves["run"]))
    notes = [f"{run}: its metrics.jsonl holds no step, so it is left out" for run in without]
    if others := len(folders) - len(learning):
        notes.append(f"left out: {counted(others, 'run')} of RL, whose rewards `bwlm analyze rewards` shows")
    if apart_from := curves["run"].nunique() - held["run"].nunique():
        notes.append(f"{counted(apart_from, 'run')} of SFT: curves only, as each direction writes its own text there")
    findings = [*_sentences(table), *_difference_sentences(apart)]
    return Analysis(
        "compare", title, findings, table, comparison_curves(bands(curves), apart, title), notes, bounds=OVER_SEEDS
    )


def without_rl(folders: list[ExperimentFolder]) -> list[ExperimentFolder]:
    """Return all runs but those of RL: the loss of a policy gradient goes nowhere while rewards rise."""
    return [folder for folder in folders if not PHASES[folder.config().experiment.phase].has_reward]


def single_curves(folders: list[ExperimentFolder]) -> pd.DataFrame:
    """Return the input of `charts.losses.learning_curves`: few enough steps to draw, with all validations."""
    curves = smoothed_curves(without_rl(folders))
    if curves.empty:
        return curves
    place = curves.groupby("run").cumcount()
    steps = curves.groupby("run")["step"].transform("size")
    stride = (steps // _OF_ONE_RUN).clip(lower=1)
    return curves[(place % stride == 0) | (place == steps - 1) | curves["val_loss"].notna()]


def curves_of_groups(folders: list[ExperimentFolder]) -> pd.DataFrame:
    """Return the input of `charts.losses.group_curves`: the curves of many runs, each direction and rate by its seeds.

    Rows with `loss`, `low` and `high` are training losses, rows with `val_loss` the mean over seeds of a validation.
    """
    curves = smoothed_curves(without_rl(folders))
    if curves.empty:
        return curves
    means = curves.dropna(subset="val_loss").groupby([*_GROUP, "tokens"])["val_loss"].mean().reset_index()
    lines = bands(curves)
    of_tokens = lines[lines["axis"] == AXES["tokens"]].rename(columns={"x": "tokens"})
    return pd.concat([of_tokens, means], ignore_index=True)


def bands(curves: pd.DataFrame) -> pd.DataFrame:
    """Return mean, lowest and highest loss over seeds on a grid of each axis: axis, x, loss, low, high, seeds."""
    parts = []
    for key, group in curves.groupby(_GROUP):
        named: dict[str, Any] = dict(zip(_GROUP, key, strict=True))
        runs = [_columns(run, [*AXES, "loss"]) for _, run in group.groupby("run")]
        for axis, label in AXES.items():
            end = min(run[axis][-1] for run in runs)
            start = max(run[axis][0] for run in runs)
            x = np.linspace(start, end, min(_POINTS, min(len(run[axis]) for run in runs)))
            loss = np.stack([np.interp(x, run[axis], run["loss"]) for run in runs])
            parts.append(
                pd.DataFrame(
                    {"axis": label, "x": x, "loss": loss.mean(0), "low": loss.min(0), "high": loss.max(0)}
                ).assign(seeds=len(runs), **named)
            )
    return pd.concat(parts, ignore_index=True)


def _columns(rows: pd.DataFrame, names: list[str]) -> dict[str, NDArray[Any]]:
    """Return columns as arrays: pandas takes longer to find one of a thousand runs than numpy to use it."""
    return {name: rows[name].to_numpy() for name in names}


def differences(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the smoothed training loss of each direction minus that of the first direction of its size.

    `curves` has one learning rate per size and direction. Columns: size, direction, against, seeds, tokens, difference
    (nats per token, mean over the seeds that both have), low, high (95 % t-interval over three seeds or more, for each
    point by itself). At a step all directions of one seed read the same text, so the difficulty of the text cancels.
    """
    parts = []
    for size, of_size in curves.groupby("size"):
        names = [name for name in DIRECTIONS if name in set(of_size["direction"])]
        for name in names[1:]:
            apart = _losses_by_seed(of_size, name) - _losses_by_seed(of_size, names[0])
            apart = apart.dropna(axis="columns", how="all").dropna()
            if not apart.empty:
                parts.append(_spread(apart).assign(size=size, direction=name, against=names[0]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_DIFFERENCE)


def _losses_by_seed(curves: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Return the losses of a direction: a row per step, by its tokens; a column per seed."""
    return curves[curves["direction"] == direction].pivot_table(index="tokens", columns="seed", values="loss")


def _spread(apart: pd.DataFrame) -> pd.DataFrame:
    """Return mean and interval over the columns, at few enough rows to draw."""
    chosen = apart.iloc[np.unique(np.linspace(0, len(apart) - 1, _POINTS).astype(int))]
    tested = [paired_t(row) if len(row) >= FEWEST_SEEDS else None for row in chosen.to_numpy()]
    low, high = zip(*[interval[1] if interval else (math.nan, math.nan) for interval in tested], strict=True)
    return pd.DataFrame(
        {
            "tokens": chosen.index,
            "difference": chosen.mean(axis="columns").to_numpy(),
            "low": low,
            "high": high,
            "seeds": chosen.shape[1],
        }
    )


def _difference_sentences(apart: pd.DataFrame) -> list[str]:
    """Return a sentence for each size and direction, with the differences at the quarters of the training."""
    sentences = []
    for (size, name, first), part in apart.groupby(["size", "direction", "against"], sort=False):
        end = part["tokens"].max()
        at = [part.iloc[(part["tokens"] - end * share).abs().argmin()]["difference"] for share in (0.25, 0.5, 0.75, 1)]
        quarters = ", ".join(f"{value:+.4f}" for value in at)
        seeds = counted(int(part["seeds"].iloc[0]), "seed")
        sentences.append(
            f"{size}: training loss of {name} minus that of {first} on the same text, in nats per token, after each "
            f"quarter of the training: {quarters} ({seeds})"
        )
    return sentences


def efficiency(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the tokens that each direction needs to reach a loss, against the first direction of its size.

    The losses lie between the highest first loss of a size's runs and the lowest loss that all of them reach. `ratio`
    is the geometric mean over seeds of tokens over the first direction's, with its 95 % t-interval over seeds of the
    logarithm; all figures of a row are over the seeds that both directions have. FLOPs per token are equal within a
    size, so the ratio holds for FLOPs too. `averaged` is the number of tokens that a loss is averaged over: tokens are
    known no more finely.
    """
    rows = []
    for size, of_size in curves.groupby("size"):
        reachable = max(run["loss"].min() for _, run in of_size.groupby("run"))
        start = max(run["loss"].iloc[0] for _, run in of_size.groupby("run"))
        levels = np.linspace(start, reachable, _LEVELS + 1)[1:]
        names = [name for name in DIRECTIONS if name in set(of_size["direction"])]
        by_seed = {name: _by_seed(of_size[of_size["direction"] == name]) for name in names}
        for level in levels:
            needed = {name: _needed(of_name, float(level)) for name, of_name in by_seed.items()}
            rows += [
                _row(str(size), float(level), name, needed, names[0]) | {"averaged": of_size["averaged"].max()}
                for name in names
            ]
    return pd.DataFrame(rows, columns=_EFFICIENCY)


def at_best_rates(curves: pd.DataFrame, best: dict[tuple[str, str], float]) -> pd.DataFrame:
    """Return the runs of each size and direction at the learning rate that verdicts use.

    A direction without such a rate gets the one with the lowest mean training loss at the end.
    """
    ends = curves.groupby([*_GROUP, "run"])["loss"].last().groupby(_GROUP).mean()
    chosen = {(size, direction): lr for size, direction, lr in ends.groupby(_GROUP[:2]).idxmin()} | best
    return curves[of_groups(curves, {(*key, lr) for key, lr in chosen.items()})]


_Curve = dict[str, NDArray[np.float64]]


def _by_seed(curves: pd.DataFrame) -> dict[int, _Curve]:
    """Return the lowest loss until each step of each seed, and its tokens and FLOPs."""
    columns = ["tokens", "flops", "loss"]
    of_seed = {
        int(str(seed)): _columns(run.astype(dict.fromkeys(columns, float)), columns)
        for seed, run in curves.groupby("seed")
    }
    return {seed: run | {"loss": np.minimum.accumulate(run["loss"])} for seed, run in of_seed.items()}


def _needed(curves: dict[int, _Curve], level: float) -> dict[int, tuple[float, float]]:
    """Return tokens and FLOPs at which each seed first comes down to a loss, interpolated between steps."""
    by_seed = {}
    for seed, run in curves.items():
        lowest = run["loss"]
        at = int(np.argmax(lowest <= level + 1e-12))
        before = max(at - 1, 0)
        share = (lowest[before] - level) / (lowest[before] - lowest[at]) if lowest[before] > lowest[at] else 1.0
        tokens, flops = (run[name][[before, at]] for name in ("tokens", "flops"))
        by_seed[seed] = (float(tokens @ [1 - share, share]), float(flops @ [1 - share, share]))
    return by_seed


def _row(
    size: str, level: float, name: str, needed: dict[str, dict[int, tuple[float, float]]], first: str
) -> dict[str, object]:
    own, other = needed[name], needed[first]
    seeds = sorted(own.keys() & other.keys())
    logs = np.array([math.log(own[seed][0] / other[seed][0]) for seed in seeds])
    spread = paired_t(logs) if name != first else None
    low, high = (math.exp(bound) for bound in spread[1]) if spread else (math.nan, math.nan)
    return {
        "size": size,
        "loss": level,
        "direction": name,
        "seeds": len(seeds),
        "tokens": float(np.mean([own[seed][0] for seed in seeds]).round()) if seeds else math.nan,
        "flops": float(np.mean([own[seed][1] for seed in seeds]).round()) if seeds else math.nan,
        "against": first,
        "ratio": math.exp(float(logs.mean())) if len(logs) else math.nan,
        "ratio_low": low,
        "ratio_high": high,
    }


def _sentences(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each size and direction but the first, at the lowest loss that all reach."""
    lowest = table[table["loss"] == table.groupby("size")["loss"].transform("min")]
    directions = table.groupby("size")["direction"].nunique()
    return [
        _sentence(row)
        for _, row in lowest.iterrows()
        if directions[row["size"]] == 1 or row["direction"] != row["against"]
    ]


def _sentence(row: pd.Series[Any]) -> str:
    level = f"{row['loss']:.3f} nats per token (training loss, averaged over {row['averaged']:,.0f} tokens)"
    if row["direction"] == row["against"]:
        needs = f"{row['tokens']:,.0f} tokens and {short_number(row['flops'])} FLOPs"
        return f"{row['size']}: {row['direction']} needs {needs} to reach {level}: {counted(int(row['seeds']), 'seed')}"
    if not row["seeds"]:
        return f"{row['size']}: {row['direction']} and {row['against']} share no seed, so they are not compared"
    return (
        f"{row['size']}: {row['direction']} needs {row['ratio']:.2f} times the tokens of {row['against']} to reach "
        f"{level}{_interval(row['ratio_low'], row['ratio_high'], int(row['seeds']))}"
    )


def _interval(low: float, high: float, seeds: int) -> str:
    if math.isnan(low):
        return ": one seed"
    return f": 95 % over {seeds} seeds {low:.2f} .. {high:.2f}"
