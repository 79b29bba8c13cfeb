"""How models look inside: gradients and activations over time, states and attention at the end.

Axes: Q tokens, C width, L layers, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.analysis.charts import layer_chart, similarity_chart
from bwlm.analysis.logs import LoggedRun, from_each, opened
from bwlm.analysis.result import Analysis
from bwlm.analysis.tables import sizes
from bwlm.errors import UserError
from bwlm.record.lineage import ExperimentFolder

STATISTICS = ("norm", "rms", "mean", "max", "sparsity")
_OF = {"gradients": "parameter", "activations": "place"}


def over_time(group: str, folders: list[ExperimentFolder]) -> Analysis:
    """`gradients` or `activations`: statistics per layer over training, mean over the runs of a series.

    Raises `UserError` if no run logged them.
    """

    def read(run: LoggedRun) -> pd.DataFrame:
        return _long(run, group)

    of_runs, notes = from_each(folders, read)
    keys = ["series", "direction", "step", "layer", "what"]
    table = of_runs.groupby(keys, sort=False)[list(STATISTICS)].mean().reset_index()
    title = f"{group.capitalize()} by layer"
    return Analysis(group, title, _extremes(table, group), table, layer_chart(table, title), notes)


def _long(run: LoggedRun, group: str) -> pd.DataFrame:
    """A row a step and parameter or place: step, layer, what, and the statistics."""
    steps, layers, names = run.all(group, "step"), run.fixed(group, "layer"), run.fixed(group, _OF[group])
    frame = pd.DataFrame(
        {
            "step": np.repeat(steps, len(names)),
            "layer": np.tile(layers, len(steps)),
            "what": np.tile([_kind(name) for name in names], len(steps)),
        }
    )
    return frame.assign(**{name: run.all(group, name).reshape(-1) for name in STATISTICS})


def _kind(name: str) -> str:
    """`blocks.3.attention.query.weight` as `attention.query`: layers are told apart by their number."""
    parts = [part for part in name.split(".") if part not in ("blocks", "weight") and not part.isdigit()]
    return ".".join(parts)


def _extremes(table: pd.DataFrame, group: str) -> list[str]:
    """Which layer has the largest values at the end, by series."""
    found = []
    for series, part in table.groupby("series", sort=False):
        last = part[part["step"] == part["step"].max()]
        top = last.loc[last["rms"].idxmax()]
        found.append(
            f"{series}: at step {int(top['step'])} the largest rms of {group} is {top['rms']:.3g}, "
            f"of {top['what']} in layer {int(top['layer'])}"
        )
    return found


def linear_cka(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Linear CKA of states [Q, C] and [Q, C'] of the same tokens, without the bias of few tokens, at most 1.

    HSIC(x x', y y') / sqrt(HSIC(x x', x x') HSIC(y y', y y')) with the unbiased estimator of Song et al. (2012, JMLR
    13:1393-1434), as in Nguyen et al. (2021, arXiv:2010.15327): the plain one of Kornblith et al. (2019,
    arXiv:1905.00414) is near 1 for anything where tokens are hardly more than features.
    """
    return _cka(Kernel.of(x), Kernel.of(y))


@dataclass(frozen=True)
class Kernel:
    """x x' of centred states x [Q, C] without its diagonal, never built: [Q, Q] is larger than [Q, C]."""

    x: NDArray[np.float64]
    diagonal: NDArray[np.float64]
    sums: NDArray[np.float64]
    """Of its rows [Q]."""

    @classmethod
    def of(cls, states: NDArray[Any]) -> Kernel:
        values = states.astype(np.float64)
        x = values - values.mean(0)
        diagonal = np.square(x).sum(1)
        return cls(x, diagonal, x @ x.sum(0) - diagonal)

    @cached_property
    def own(self) -> float:
        return hsic(self, self)


def hsic(k: Kernel, m: Kernel) -> float:
    """The unbiased estimator of Song et al., for kernels without their diagonals."""
    n = len(k.x)
    products = np.square(k.x.T @ m.x).sum() - k.diagonal @ m.diagonal
    total = products + k.sums.sum() * m.sums.sum() / ((n - 1) * (n - 2)) - 2 * (k.sums @ m.sums) / (n - 2)
    return float(total / (n * (n - 3)))


def _cka(k: Kernel, m: Kernel) -> float:
    return hsic(k, m) / math.sqrt(k.own * m.own) if k.own > 0 and m.own > 0 else math.nan


def representations(folders: list[ExperimentFolder]) -> Analysis:
    """Layer by layer, how alike the states of two runs are on the same tokens: across directions, and across seeds.

    Runs of one size are paired. Raises `UserError` with under two of those that logged states of the same tokens.
    """
    states, notes = _states(folders)
    rows = []
    for (one, of_one), (other, of_other) in combinations(states.items(), 2):
        if of_one["size"] != of_other["size"] or (kind := _kind_of_pair(of_one, of_other)) is None:
            continue
        if not np.array_equal(of_one["token"], of_other["token"]):
            notes.append(f"{one} and {other}: states of other tokens: they cannot be compared")
            continue
        layers = zip(of_one["states"], of_other["states"], strict=True)
        rows += [{"pair": kind, "layer": layer, "cka": _cka(x, y)} for layer, (x, y) in enumerate(layers)]
    if not rows:
        raise UserError("; ".join(notes) or "representations: two runs of one size are needed to compare their states")
    pairs = pd.DataFrame(rows)
    table = (
        pairs.groupby(["pair", "layer"], sort=False)["cka"].agg(["mean", "min", "max", "size"]).reset_index()
    ).rename(columns={"mean": "cka", "size": "pairs"})
    heads, _ = from_each(folders, _heads)
    title = "Representations"
    chart = similarity_chart(table, heads, title)
    return Analysis("representations", title, _alike(table), table, chart, notes)


def _states(folders: list[ExperimentFolder]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By run and, for a bidirectional one, reading: label, tokens, the kernel of its newest states in each layer."""
    found: dict[str, dict[str, Any]] = {}
    notes, labels = [], sizes(folders)
    for folder in folders:
        try:
            with opened(folder) as run:
                readings, states = run.fixed("representations", "reading"), run.last("representations", "states")
                for reading, of_reading in zip(readings, states, strict=True):
                    label = run.direction if len(readings) == 1 else f"{run.direction} ({reading})"
                    tokens = run.fixed("representations", "token")
                    kernels = [Kernel.of(of_layer) for of_layer in of_reading]
                    of = {"run": folder.id, "size": labels[folder.id], "seed": run.seed, "lr": run.lr, "label": label}
                    found[f"{folder.id} {reading}"] = of | {"token": tokens, "states": kernels}
        except UserError as error:
            notes.append(str(error))
    return found, notes


def _kind_of_pair(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What a comparison is of; None for two runs of a direction that differ in more than the seed."""
    labels = sorted((one["label"], other["label"]))
    if one["run"] == other["run"]:
        return f"both readings of one {one['label'].partition(' ')[0]} model"
    if labels[0] != labels[1]:
        return f"{labels[0]} and {labels[1]}"
    return f"seeds of {labels[0]}" if one["lr"] == other["lr"] and one["seed"] != other["seed"] else None


def _heads(run: LoggedRun) -> pd.DataFrame:
    """Newest attention statistics, a row a head: entropy in nats, distance in tokens, first_share."""
    values = {name: run.last("attention", name) for name in ("entropy", "distance", "first_share")}
    readings = run.fixed("attention", "reading")
    index = np.indices(values["entropy"].shape)
    frame = {"reading": readings[index[0].ravel()], "layer": index[1].ravel(), "head": index[2].ravel()}
    return pd.DataFrame(frame | {name: found.ravel() for name, found in values.items()})


def _alike(table: pd.DataFrame) -> list[str]:
    """The mean over layers of each kind of pair, against the pairs of seeds."""
    means = table.groupby("pair", sort=False)["cka"].mean()
    return [f"{pair}: CKA {value:.3f}, mean over layers" for pair, value in means.items()]
