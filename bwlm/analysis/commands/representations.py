"""Similarity of states (CKA) by layer at the end of training, and the distances at which attention heads look."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.analysis.charts.insides import similarity_chart
from bwlm.analysis.charts.style import EMBEDDING
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.research_logs import LoggedRun, from_each, opened
from bwlm.directions import READINGS, is_marked, rank
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.cka import FEWEST_TOKENS, Kernel, cka

_STATISTICS = ("entropy", "distance", "first_share")


@dataclass(frozen=True)
class States:
    """Newest states of a run in a reading."""

    run: str
    group: str
    """Size, with the learning rate if there are several: runs of one group are paired."""
    direction: str
    reading: str
    seed: int
    step: int
    tokens: NDArray[np.int64]
    layers: list[Kernel]

    @property
    def label(self) -> str:
        """Return the name of the run and its reading."""
        return f"{self.direction} ({self.reading})" if is_marked(self.direction) else self.direction

    @property
    def rank(self) -> tuple[str, int, str, int]:
        """Return a key that sorts states by group, direction and seed."""
        return (self.group, *rank(self.direction), READINGS.index(self.reading))


def representations(folders: list[ExperimentFolder]) -> Analysis:
    """Return the CKA by layer of two runs' states on the same tokens: across directions, and across seeds.

    Runs of one size are paired; if a direction has several learning rates at that size, only runs of one rate. Raises
    `UserError` if no two such runs have logged states of the same tokens.
    """
    groups = _groups(folders)
    states, notes = _states(folders, groups)
    alike = _over_pairs(_pairs(states, notes))
    if alike.empty:
        raise UserError("; ".join(notes) or "analyze representations: needs two runs of one size: name another run")
    title = "Representations"
    try:
        heads, without = from_each(folders, ranked_heads)
    except UserError as error:  # attention may be left out of the log
        heads, without = pd.DataFrame(), [str(error)]
    notes += [note for note in without if note not in notes]
    more = {} if heads.empty else {"heads": _mean_heads(heads)}
    chart = similarity_chart(alike, heads if heads.empty else heads.assign(group=heads["run"].map(groups)), title)
    table = alike.drop(columns=["direction", "reading"])
    return Analysis("representations", title, _alike(table), table, chart, notes, more=more)


def _groups(folders: list[ExperimentFolder]) -> dict[str, str]:
    """Return the size of each run, with its learning rate if a direction has several at that size."""
    labels, experiments = sizes(folders), {folder.id: folder.config().experiment for folder in folders}
    rates: dict[tuple[str, str], set[float]] = {}
    for run, experiment in experiments.items():
        rates.setdefault((labels[run], experiment.direction), set()).add(experiment.lr)
    several = {size for (size, _), of in rates.items() if len(of) > 1}
    return {run: f"{size}, lr {experiments[run].lr:g}" if size in several else size for run, size in labels.items()}


def _states(folders: list[ExperimentFolder], groups: dict[str, str]) -> tuple[list[States], list[str]]:
    """Return the states of each run and own reading, and why other runs have none."""
    logged: list[States] = []
    notes = []
    for folder in folders:
        try:
            with opened(folder) as run:
                readings = run.fixed("representations", "reading")
                tokens, states = run.fixed("representations", "token"), run.last("representations", "states")
                step = int(run.last("representations", "step"))
                if len(tokens) < FEWEST_TOKENS:
                    raise UserError(
                        f"{folder.id}: holds states of {counted(len(tokens), 'token')}, and CKA needs {FEWEST_TOKENS}: "
                        "train with a larger research_log.representations"
                    )
                for reading, of_reading in zip(readings, states, strict=True):
                    layers = [Kernel.from_states(of_layer) for of_layer in of_reading]
                    logged.append(
                        States(
                            folder.id, groups[folder.id], run.direction, str(reading), run.seed, step, tokens, layers
                        )
                    )
        except UserError as error:
            notes.append(str(error))
    return sorted(logged, key=lambda one: one.rank), notes


def _pairs(states: list[States], notes: list[str]) -> pd.DataFrame:
    """Return a row per pair of runs and layer: group, pair, direction and reading (of pairs of seeds), layer, cka.

    Pairs that cannot be compared, or are of unequal steps, are added to `notes`.
    """
    rows = []
    for one, other in combinations(states, 2):
        if one.group != other.group or (pair := pair_name(one, other)) is None:
            continue
        if not np.array_equal(one.tokens, other.tokens):
            notes.append(f"{one.run} and {other.run}: states of other tokens: they cannot be compared")
            continue
        if one.step != other.step:
            notes.append(f"{one.run} at step {one.step} is compared with {other.run} at step {other.step}")
        seeds = one.label == other.label
        of = (one.group, pair, one.direction if seeds else "", one.reading if seeds else "")
        names = [EMBEDDING, *map(str, range(len(one.layers) - 1))]  # states after the embedding, then after each layer
        rows += [(*of, layer, cka(x, y)) for layer, x, y in zip(names, one.layers, other.layers, strict=True)]
    return pd.DataFrame(rows, columns=["group", "pair", "direction", "reading", "layer", "cka"])


def _over_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return mean, lowest and highest CKA over the pairs of a kind; in each group pairs of seeds come first."""
    keys = ["group", "pair", "direction", "reading", "layer"]
    alike = pairs.groupby(keys, sort=False)["cka"].agg(["mean", "min", "max", "size"]).reset_index()
    alike = alike.assign(across=alike["direction"] == "").sort_values(["group", "across"], kind="stable")
    return alike.drop(columns="across").rename(columns={"mean": "cka", "min": "low", "max": "high", "size": "pairs"})


def pair_name(one: States, other: States) -> str | None:
    """Return the name of a comparison; None for two runs that differ in neither direction nor seed."""
    if one.run == other.run:
        return f"both readings of one {one.direction} model"
    if one.label != other.label:
        return f"{one.label} and {other.label}"
    return f"seeds of {one.label}" if one.seed != other.seed else None


def ranked_heads(run: LoggedRun) -> pd.DataFrame:
    """Return the newest attention statistics, a row per head, the nearest-looking head of each layer first.

    Columns: reading, layer, head (its rank), entropy in nats, distance in tokens, first_share (share of attention on
    the first token). Heads are ranked and not numbered, since head 0 of one seed is not head 0 of another.
    """
    statistics = {name: run.last("attention", name) for name in _STATISTICS}  # each [reading, layer, head]
    order = statistics["distance"].argsort(axis=-1)
    ranked = {name: np.take_along_axis(values, order, axis=-1) for name, values in statistics.items()}
    reading, layer, head = np.indices(order.shape)
    readings = run.fixed("attention", "reading")
    frame = {"reading": readings[reading.ravel()], "layer": layer.ravel(), "head": head.ravel()}
    return pd.DataFrame(frame | {name: values.ravel() for name, values in ranked.items()})


def _mean_heads(of_runs: pd.DataFrame) -> pd.DataFrame:
    """Return the means over the runs of a series, and the lowest and highest distance among the runs."""
    keys = ["series", "reading", "layer", "head"]
    means = {name: (name, "mean") for name in _STATISTICS}
    spread = {"nearest": ("distance", "min"), "farthest": ("distance", "max"), "runs": ("run", "nunique")}
    return of_runs.groupby(keys, sort=False).agg(**means, **spread).reset_index()


def _alike(table: pd.DataFrame) -> list[str]:
    """Return a sentence per kind of pair: its CKA, as mean over layers."""
    means = table.groupby(["group", "pair"], sort=False)["cka"].mean().reset_index()
    return [f"{row.group}: {row.pair}: CKA {row.cka:.3f}, mean over layers" for row in means.itertuples()]
