"""The phases after base of a grid, side by side: what their variants differ in, and what each came to over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from bwlm.analysis.result import markdown_table
from bwlm.analysis.select import without_seed
from bwlm.analysis.stats import FEWEST_SEEDS, counted, holm, paired_t
from bwlm.analysis.tables import varying_settings
from bwlm.config import PHASES
from bwlm.record.lineage import ExperimentFolder

_FIGURES = {
    "val_loss_written": "loss of what it writes",
    "val_loss": "loss of all text",
    "val_bpb": "bpb",
    "val_reward": "reward",
}
_JUDGED = ("val_reward", "val_loss_written", "val_loss")
"""A variant is judged by the first that its phase measures."""
_READING = f"""Losses are in nats per token of the validation conversations. In SFT and RL a direction learns to write
its own part of a conversation: compare variants of one direction. A reward is the mean over greedy answers to
validation problems. With {FEWEST_SEEDS} seeds or more ± is half of the 95 % t-interval over seeds; two variants are
compared by the paired t-test over the seeds that both have, Holm-adjusted over all such pairs of the phase."""


@dataclass(frozen=True)
class Variants:
    """The finished runs of one phase; a variant has runs that differ in the seed alone, theirs and their parents'."""

    phase: str
    header: list[str]
    rows: list[list[str]]
    """A variant each, the best of a direction first."""
    comparisons: list[str]
    """Of each two variants of a direction and depth, in words."""


def variants(folders: list[ExperimentFolder]) -> list[Variants]:
    """For each phase after base, in their order."""
    found = []
    for phase in PHASES[1:]:
        runs = [f for f in folders if f.config().experiment.phase == phase and f.status().state == "finished"]
        if runs:
            found.append(_of_phase(phase, runs))
    return found


def variants_section(folders: list[ExperimentFolder]) -> list[str]:
    """For a grid's report."""
    parts = []
    for one in variants(folders):
        parts += [f"### {one.phase}", markdown_table(one.header, one.rows)]
        parts += ["\n".join(f"- {line}" for line in one.comparisons)] if one.comparisons else []
    return ["## Phases after base", *parts, _READING] if parts else []


def _of_phase(phase: str, runs: list[ExperimentFolder]) -> Variants:
    identities = {run.id: run.config().identity for run in runs}
    rates = {fields["lr"] for fields in identities.values()}
    varied = [name for name in varying_settings(identities) if name != "parent_recipe"]
    varied += ["lr"] if len(rates) > 1 else []
    table = pd.DataFrame([_row(run, identities[run.id], varied) for run in runs])
    figures = [name for name in _FIGURES if table[name].notna().any()]
    judged = next(name for name in _JUDGED if name in figures)
    groups = [group for _, group in table.groupby(["direction", "depth", "variant"], sort=False)]
    groups.sort(key=lambda group: (*group[["direction", "depth"]].iloc[0], _rank(group, judged)))
    seeded = any(len(group) > 1 for group in groups)
    header = ["id", "direction", "depth", *(name.rpartition(".")[2] for name in varied)]
    header += [*(["seeds"] if seeded else []), *(_FIGURES[name] for name in figures)]
    rows = [
        [
            group["variant" if len(group) > 1 else "run"].iloc[0],
            *(str(group[name].iloc[0]) for name in ("direction", "depth", *varied)),
            *([str(len(group))] if seeded else []),
            *(_mean(group[name].dropna().to_numpy()) for name in figures),
        ]
        for group in groups
    ]
    return Variants(phase, header, rows, _comparisons(groups, judged))


def _row(run: ExperimentFolder, identity: dict[str, Any], varied: list[str]) -> dict[str, Any]:
    metrics = run.status().metrics
    named = {"run": run.id, "variant": without_seed(run.id)} | {name: identity.get(name) for name in varied}
    named |= {name: identity[name] for name in ("direction", "depth", "seed")}
    return named | {name: metrics.get(name, np.nan) for name in _FIGURES}


def _rank(group: pd.DataFrame, judged: str) -> float:
    """Lower is better."""
    mean = float(group[judged].mean())
    return -mean if judged == "val_reward" else mean


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    if not len(values):
        return ""
    spread = paired_t(values) if len(values) >= FEWEST_SEEDS else None
    return f"{values.mean():.4f}" + (f" ± {(spread[1][1] - spread[1][0]) / 2:.4f}" if spread else "")


def _comparisons(groups: list[pd.DataFrame], judged: str) -> list[str]:
    """Each two of one direction and depth, the better first; `groups` are in that order."""
    pairs = [(one, other) for one, other in combinations(groups, 2) if _kind(one) == _kind(other)]
    apart = [_differences(one, other, judged) for one, other in pairs]
    tested = {
        number: found for number, d in enumerate(apart) if len(d) >= FEWEST_SEEDS and (found := paired_t(d)) is not None
    }
    adjusted = dict(zip(tested, holm([p for p, _ in tested.values()]), strict=True))
    unit = "" if judged == "val_reward" else " nats per token"
    lines = []
    for number, (_, (low, high)) in tested.items():
        one, other = (f"`{group['variant'].iloc[0]}`" for group in pairs[number])
        sure = f"95 % over {counted(len(apart[number]), 'seed')} {low:+.4f} .. {high:+.4f}, p = {adjusted[number]:.2g}"
        lines.append(f"{one} less {other}: {_FIGURES[judged]} {apart[number].mean():+.4f}{unit}, {sure}")
    if len(tested) < len(pairs):
        left = "variants" if not tested else counted(len(pairs) - len(tested), "pair") + " of variants"
        lines.append(f"{left} with under {FEWEST_SEEDS} seeds in common: too few to tell which is better")
    return lines


def _kind(group: pd.DataFrame) -> tuple[str, int]:
    return group["direction"].iloc[0], group["depth"].iloc[0]


def _differences(one: pd.DataFrame, other: pd.DataFrame, judged: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each seed that both have."""
    both = one.set_index("seed")[judged] - other.set_index("seed")[judged]
    values: np.ndarray[Any, np.dtype[np.float64]] = both.dropna().to_numpy()
    return values
