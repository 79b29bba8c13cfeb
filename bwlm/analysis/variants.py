"""The phases after base of a grid, side by side: what their variants differ in, and what each came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bwlm.analysis.result import markdown_table
from bwlm.analysis.tables import varying_settings
from bwlm.config import PHASES
from bwlm.record.lineage import ExperimentFolder

_FIGURES = {
    "val_loss_written": "loss of what it writes",
    "val_loss": "loss of all text",
    "val_bpb": "bpb",
    "val_reward": "reward",
}
_READING = """Losses are in nats per token of the validation conversations. In SFT and RL a direction learns to write
its own part of a conversation: compare variants of one direction. A reward is the mean over greedy answers to
validation problems."""


@dataclass(frozen=True)
class Variants:
    """The finished runs of one phase."""

    phase: str
    header: list[str]
    rows: list[list[str]]


def variants(folders: list[ExperimentFolder]) -> list[Variants]:
    """One table for each phase after base, in their order; the best of a direction first."""
    found = []
    for phase in PHASES[1:]:
        runs = [f for f in folders if f.config().experiment.phase == phase and f.status().state == "finished"]
        if runs:
            found.append(_of_phase(phase, runs))
    return found


def _of_phase(phase: str, runs: list[ExperimentFolder]) -> Variants:
    identities = {run.id: run.config().identity for run in runs}
    varied = [name for name in varying_settings(identities) if name != "parent_recipe"]
    metrics = {run.id: run.status().metrics for run in runs}
    figures = [name for name in _FIGURES if any(name in of_run for of_run in metrics.values())]
    ranked = sorted(
        runs, key=lambda run: (identities[run.id]["direction"], identities[run.id]["depth"], _rank(metrics[run.id]))
    )
    rows = [
        [
            run.id,
            *map(str, _size(identities[run.id])),
            *(f"{identities[run.id].get(name)}" for name in varied),
            *(f"{metrics[run.id][name]:.4f}" if name in metrics[run.id] else "" for name in figures),
        ]
        for run in ranked
    ]
    names = [name.rpartition(".")[2] for name in varied]
    return Variants(phase, ["id", "direction", "depth", *names, *(_FIGURES[name] for name in figures)], rows)


def _size(identity: dict[str, Any]) -> tuple[str, int]:
    return identity["direction"], identity["depth"]


def _rank(metrics: dict[str, float]) -> float:
    """Lower is better."""
    if "val_reward" in metrics:
        return -metrics["val_reward"]
    return metrics.get("val_loss_written", metrics["val_loss"])


def variants_section(folders: list[ExperimentFolder]) -> list[str]:
    """For a grid's report."""
    found = variants(folders)
    if not found:
        return []
    tables = [part for one in found for part in (f"### {one.phase}", markdown_table(one.header, one.rows))]
    return ["## Phases after base", *tables, _READING]
