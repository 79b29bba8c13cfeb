"""Gradients and activations by layer, over the training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bwlm.analysis.charts.insides import layer_chart
from bwlm.analysis.charts.style import EMBEDDING, OUTPUT
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.research_logs import LoggedRun, from_each
from bwlm.record.experiment import ExperimentFolder

STATISTICS = ("norm", "rms", "mean", "max", "sparsity")
_WHERE = {EMBEDDING: "at the embedding", OUTPUT: "at the output"}
_OF = {"gradients": "parameter", "activations": "place"}


def over_time(group: str, folders: list[ExperimentFolder]) -> Analysis:
    """Return statistics of `gradients` or `activations` per layer over the training, as means over runs of a series.

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
    """Return a row per step and parameter, or place: step, layer, what, and the statistics."""
    steps, layers, names = run.all(group, "step"), run.layer_names(group), run.fixed(group, _OF[group])
    frame = pd.DataFrame(
        {
            "step": np.repeat(steps, len(names)),
            "layer": np.tile(layers, len(steps)),
            "what": np.tile([_kind(name) for name in names], len(steps)),
        }
    )
    return frame.assign(**{name: run.all(group, name).reshape(-1) for name in STATISTICS})


def _kind(name: str) -> str:
    """Return `blocks.3.attention.query.weight` as `attention.query`: the layer has a column of its own."""
    parts = [part for part in name.split(".") if part not in ("blocks", "weight") and not part.isdigit()]
    return ".".join(parts)


def _extremes(table: pd.DataFrame, group: str) -> list[str]:
    """Return a sentence for each series: the layer with the largest values at the end."""
    sentences = []
    for series, part in table.groupby("series", sort=False):
        last = part[part["step"] == part["step"].max()]
        top = last.loc[last["rms"].idxmax()]
        sentences.append(
            f"{series}: at step {int(top['step'])} the largest rms of {group} is {top['rms']:.3g}, "
            f"of {top['what']} {_WHERE.get(top['layer'], 'in layer ' + top['layer'])}"
        )
    return sentences
