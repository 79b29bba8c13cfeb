"""Names, times, tags, texts and figures of grids and runs, as MLflow shows them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import Entry, last_entry, read_journal
from bwlm.record.run_config import RunConfig
from bwlm.record.starts import has_changed_workers, starts_of, steps_lost, worker_words

LONGEST_TAG = 8000
"""Characters of a tag, in MLflow."""
_TAGGED = ("phase", "direction", "depth", "lr", "seed")


@dataclass(frozen=True)
class GridSettings:
    """Settings of a grid's cells."""

    cells: int
    common: dict[str, str]
    """Settings that all cells share."""
    axes: dict[str, str]
    """Values of the settings in which cells differ."""


@dataclass(frozen=True)
class GridResult:
    """Result of a grid in words and figures."""

    text: str
    """Short report in Markdown."""
    verdict: str
    metrics: dict[str, float]


def run_tags(folder: ExperimentFolder, parent: str | None, resumed: list[int]) -> dict[str, str]:
    """Return the tags of a run below the MLflow run `parent`; `resumed` are the steps from which it was resumed."""
    config = folder.config()
    tags = {f"bwlm.{name}": str(getattr(config.experiment, name)) for name in _TAGGED}
    tags |= {
        "bwlm.experiment_id": config.id,
        "bwlm.parent_experiment": folder.parent() or "",
        "bwlm.fingerprint": config.fingerprint,
        "bwlm.code": config.code,
        "bwlm.grid": config.grid or "",
        "bwlm.folder": str(folder.path),
    }
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if resumed:
        tags["bwlm.resumed"] = f"from step {', '.join(map(str, resumed))}"
    return {name: value for name, value in tags.items() if value} | checkpoint_tag(folder)


def began(folder: Path) -> int | None:
    """Return when a run began its first step, in milliseconds; None if it has trained none."""
    first = next(read_journal(folder), None)
    return first.time - round(1000 * first.metrics.get("step_seconds", 0.0)) if first else None


def ended(folder: Path) -> int | None:
    """Return when a run ended its last step, in milliseconds; None if it has trained none."""
    last = last_entry(folder)
    return last.time if last else None


def checkpoint_tag(folder: ExperimentFolder) -> dict[str, str]:
    """Return a tag with the path of the newest checkpoint, if there is one."""
    saved = sorted(folder.checkpoints.glob("step_*/meta.json"), key=lambda path: int(path.parent.name[len("step_") :]))
    return {"bwlm.checkpoint": str(saved[-1].parent)} if saved else {}


def start_tags(folder: ExperimentFolder) -> dict[str, str]:
    """Return tags of a run that was resumed: how many steps that cost, and its numbers of workers if they changed."""
    starts = starts_of(folder.path)
    if len(starts) < 2:
        return {}
    workers = {"bwlm.workers": worker_words(starts)} if has_changed_workers(starts) else {}
    return {"bwlm.steps_lost": str(steps_lost(starts)), **workers}


def shortened(text: str) -> str:
    """Return a text that fits into a tag: MLflow cuts longer ones anywhere."""
    if len(text) <= LONGEST_TAG:
        return text
    rest = "\n\nThe rest is in RESEARCH_REPORT.md, among the artifacts."
    return text[: LONGEST_TAG - len(rest)].rpartition("\n")[0] + rest


def run_name(config: RunConfig) -> str:
    """Return the name of a run in MLflow: `d4_lr0.5_s0_backward` for the cell `mygrid_backward_d4_lr0.5_s0`.

    MLflow's lists show about 20 characters of a name, in which the cells of a grid should differ.
    """
    experiment = config.experiment
    cell = re.fullmatch(rf"{re.escape(str(config.grid))}_{experiment.direction}_(d\d+_lr[^_]+_s\d+)(.*)", config.id)
    if cell is None:
        return config.id
    phase = f"-{experiment.phase}" if f"-{experiment.phase}" in cell[2] else ""
    return f"{cell[1]}{phase}_{experiment.direction}{cell[2].replace(phase, '', 1)}"


def points(entries: list[Entry], names: Callable[[Mapping[str, float]], Mapping[str, float]]) -> list[Any]:
    """Return entries as MLflow's metrics under its names, without figures that are not finite.

    A search sorts NaN last both ways, and infinity returns as a number.
    """
    from mlflow.entities import Metric

    measured = [(entry, name, value) for entry in entries for name, value in names(entry.metrics).items()]
    return [Metric(name, value, e.time, e.step) for e, name, value in measured if math.isfinite(value)]
