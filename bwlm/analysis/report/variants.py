"""Variants of a grid's phases after base, side by side: settings in which they differ, and results over seeds.

Runs of a variant differ in seeds alone: their own seed, and the seeds of their ancestors. The first seed that differs,
counted from the base, is the seed of the statistics: runs of one base are not independent of each other, and count as
their mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from bwlm.analysis.commands.result import markdown_table
from bwlm.analysis.runs.labels import with_ancestors
from bwlm.format import counted
from bwlm.phases import LATER
from bwlm.record.catalog.select import without_seed
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.fingerprint import OF_ONE_PARENT
from bwlm.record.labels import setting_of, varying_settings
from bwlm.stats.columns import FloatArray
from bwlm.stats.gaps import FEWEST_SEEDS, holm, paired_t

_FIGURES = {
    "val_loss_written": "loss of what it writes",
    "val_loss": "loss of all text",
    "val_bpb": "bpb",
    "val_reward": "reward",
}
_JUDGED = ("val_reward", "val_loss_written", "val_loss")
"""Figures that judge a variant, in order: the first that its phase measures counts."""
_SAME_TASK = ("direction", "depth", "data", "tokenizer", "reversal", "model.sequence_length", "evaluation.tokens")
"""Fields in which two variants must agree: else they were measured on different text, or on another part of it."""
_ALSO_IN_RL = ("rl.validation",)
_READING = f"""Losses are in nats per token of the validation conversations. In SFT and RL a direction learns to write
its own part of a conversation: compare variants of one direction. A reward is the mean over greedy answers to
validation problems. With {FEWEST_SEEDS} seeds or more ± is half of the 95 % t-interval over seeds; two variants of one
direction, depth and text are compared by the paired t-test over the seeds that both have, Holm-adjusted over all such
pairs of the phase: `A → B` is the figure of B minus that of A. Runs of one base count as their mean."""

Seeds = tuple[Any, ...]
"""Seeds of a run and its ancestors, the base first."""


@dataclass(frozen=True)
class Variants:
    """Table of one phase's finished runs, a variant a row, and comparisons of variants."""

    phase: str
    settings: list[str]
    """Headings of the first columns, which tell variants apart."""
    header: list[str]
    rows: list[list[str]]
    """Cells of the table, a row per variant; of comparable variants the best first."""
    comparisons: list[str]
    """Sentences on each two variants that can be compared."""

    def in_short(self) -> list[list[str]]:
        """Return header and rows without the settings after the id: in a grid the id holds their values."""
        return [[first, *figures[len(self.settings) - 1 :]] for first, *figures in (self.header, *self.rows)]


@dataclass(frozen=True)
class _Variant:
    name: str
    fields: dict[str, Any]
    """Fields of `with_ancestors` of the first run."""
    figures: dict[Seeds, dict[str, float]]
    """Means over the runs of the same seeds."""

    def of(self, name: str) -> dict[Seeds, float]:
        return {seeds: values[name] for seeds, values in self.figures.items() if name in values}


def variants(folders: list[ExperimentFolder]) -> list[Variants]:
    """Return the variants of each phase after base, in the order of the phases."""
    sections = []
    for phase in LATER:
        runs = [f for f in folders if f.config().experiment.phase == phase and f.status().state == "finished"]
        if runs:
            sections.append(_of_phase(phase, runs))
    return sections


def variants_section(folders: list[ExperimentFolder]) -> list[str]:
    """Return the section of a grid's report."""
    parts = []
    for one in variants(folders):
        parts += [f"### {one.phase}", markdown_table(one.header, one.rows)]
        parts += ["\n".join(f"- {line}" for line in one.comparisons)] if one.comparisons else []
    return ["## Phases after base", *parts, _READING] if parts else []


def _of_phase(phase: str, runs: list[ExperimentFolder]) -> Variants:
    fields = {run.id: with_ancestors(run) for run in runs}
    grouped = _grouped(runs, fields)
    varied = [name for name in varying_settings(fields) if name != "parent_recipe"] + _varying_rates(fields)
    figures = [name for name in _FIGURES if any(one.of(name) for one in grouped)]
    judged = next(name for name in _JUDGED if name in figures)
    grouped.sort(key=lambda one: (_task(one), _rank(one, judged)))
    seeded = any(len(one.figures) > 1 for one in grouped)
    settings = ["id", "direction", "depth", *map(_short, varied)]
    header = [*settings, *(["seeds"] if seeded else []), *(_FIGURES[name] for name in figures)]
    rows = [
        [
            one.name,
            *(str(one.fields.get(name)) for name in ("direction", "depth", *varied)),
            *([str(len(_by_seed(one.of(judged))))] if seeded else []),
            *(_mean(_by_seed(one.of(name))) for name in figures),
        ]
        for one in grouped
    ]
    return Variants(phase, settings, header, rows, _comparisons(grouped, judged))


def _grouped(runs: list[ExperimentFolder], fields: dict[str, dict[str, Any]]) -> list[_Variant]:
    groups: dict[str, list[ExperimentFolder]] = {}
    for run in runs:
        alike = {name: value for name, value in fields[run.id].items() if not _is_of_a_seed(name)}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    grouped = []
    for group in groups.values():
        metrics: dict[Seeds, list[dict[str, float]]] = {}
        for run in group:
            metrics.setdefault(_seeds(fields[run.id]), []).append(run.status().metrics)
        figures = {
            seeds: {name: _over(of_runs, name) for name in _FIGURES if all(name in one for one in of_runs)}
            for seeds, of_runs in metrics.items()
        }
        globs = {without_seed(run.id) for run in group}
        name = globs.pop() if len(group) > 1 and len(globs) == 1 else ", ".join(run.id for run in group)
        grouped.append(_Variant(name, fields[group[0].id], figures))
    return grouped


def _over(runs: list[dict[str, float]], name: str) -> float:
    return float(np.mean([one[name] for one in runs]))


def _is_of_a_seed(name: str) -> bool:
    return setting_of(name)[1] == "seed" or name in OF_ONE_PARENT


def _seeds(fields: dict[str, Any]) -> Seeds:
    names = [name for name in fields if setting_of(name)[1] == "seed"]
    return tuple(fields[name] for name in sorted(names, key=setting_of, reverse=True))


def _varying_rates(fields: dict[str, dict[str, Any]]) -> list[str]:
    """Return the learning rates that vary, own and of ancestors, without a rate that varies just like one before."""
    known = {name for of_run in fields.values() for name in of_run if setting_of(name)[1] == "lr"}
    columns = {name: tuple(of_run.get(name) for of_run in fields.values()) for name in sorted(known, key=setting_of)}
    varying: list[str] = []
    for name, column in columns.items():
        if len(set(column)) > 1 and column not in [columns[other] for other in varying]:
            varying.append(name)
    return varying


def _short(name: str) -> str:
    """Shorten a setting for a table's header: mid.optim.init_lr_frac -> mid init_lr_frac."""
    far, setting = setting_of(name)
    return (f"{name.partition('.')[0]} " if far else "") + setting.rpartition(".")[2]


def _task(one: _Variant) -> tuple[str, ...]:
    return tuple(str(one.fields.get(name)) for name in (*_SAME_TASK, *_ALSO_IN_RL))


def _rank(one: _Variant, judged: str) -> float:
    """Return the mean of the figure that judges, with the sign by which lower is better."""
    mean = float(np.mean([*one.of(judged).values()] or [np.inf]))
    return -mean if judged == "val_reward" else mean


def _by_seed(figures: dict[Seeds, float]) -> FloatArray:
    """Return the mean figure of each seed of the statistics [seeds]."""
    place = next((n for n, column in enumerate(zip(*figures, strict=True)) if len(set(column)) > 1), 0)
    by_seed: dict[Any, list[float]] = {}
    for seeds, figure in figures.items():
        by_seed.setdefault(seeds[place], []).append(figure)
    return np.array([np.mean(of_seed) for of_seed in by_seed.values()])


def _mean(values: FloatArray) -> str:
    if not len(values):
        return ""
    spread = paired_t(values) if len(values) >= FEWEST_SEEDS else None
    return f"{values.mean():.4f}" + (f" ± {(spread[1][1] - spread[1][0]) / 2:.4f}" if spread else "")


def _comparisons(grouped: list[_Variant], judged: str) -> list[str]:
    """Return sentences on the pairs of comparable variants, the second minus the first; the better stand first."""
    pairs = [(one, other) for one, other in combinations(grouped, 2) if _task(one) == _task(other)]
    apart = [_differences(other.of(judged), one.of(judged)) for one, other in pairs]
    tested = {
        number: test for number, d in enumerate(apart) if len(d) >= FEWEST_SEEDS and (test := paired_t(d)) is not None
    }
    adjusted = dict(zip(tested, holm([p for p, _ in tested.values()]), strict=True))
    unit = "" if judged == "val_reward" else " nats per token"
    lines = []
    for number, (_, (low, high)) in tested.items():
        one, other = (f"`{variant.name}`" for variant in pairs[number])
        sure = f"95 % over {counted(len(apart[number]), 'seed')} {low:+.4f} .. {high:+.4f}, p = {adjusted[number]:.2g}"
        lines.append(f"{one} → {other}: {_FIGURES[judged]} {apart[number].mean():+.4f}{unit}, {sure}")
    if len(tested) < len(pairs):
        left = "variants" if not tested else counted(len(pairs) - len(tested), "pair") + " of variants"
        lines.append(f"{left} with under {FEWEST_SEEDS} seeds in common: too few to tell which is better")
    return lines


def _differences(one: dict[Seeds, float], other: dict[Seeds, float]) -> FloatArray:
    """Return the differences over the seeds that both have [seeds]."""
    return _by_seed({seeds: one[seeds] - other[seeds] for seeds in one if seeds in other})
