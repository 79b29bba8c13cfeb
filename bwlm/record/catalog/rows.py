"""Rows of runs for lists and tables: settings, state, step and metrics.

Needs neither torch nor pandas, so that a list of runs is there at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.health import damage, damage_words


@dataclass(frozen=True)
class CellRow:
    """Row of one experiment, as lists and scripts see it."""

    id: str
    phase: str
    direction: str
    depth: int
    lr: float
    seed: int
    parent: str | None
    state: str
    reason: str
    step: int
    metrics: dict[str, float]
    damage: list[str] = field(default_factory=list)
    """Faults of its records, as far as a check that reads little finds them."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return asdict(self)


def load_cell(folder: ExperimentFolder) -> CellRow:
    """Return the row of an experiment. Raises `UserError` if its config, status or link cannot be read."""
    config, status = folder.config(), folder.status()
    experiment = config.experiment
    return CellRow(
        id=folder.id,
        phase=experiment.phase,
        direction=experiment.direction,
        depth=experiment.depth,
        lr=experiment.lr,
        seed=experiment.seed,
        parent=folder.parent(),
        state=status.state,
        reason=status.reason,
        step=status.step,
        metrics=status.metrics,
        damage=damage(folder, config, status, thorough=False),
    )


def load_readable(folders: Iterable[ExperimentFolder]) -> tuple[list[CellRow], list[str]]:
    """Return the rows of the experiments that can be read, and a line on each that is damaged or left out."""
    cells, left_out = [], []
    for folder in track(list(folders), "reading runs", "runs"):
        try:
            cell = load_cell(folder)
        except UserError as error:
            left_out.append(f"{folder.id} is left out: {error}")
            continue
        cells.append(cell)
        if cell.damage:
            left_out.append(damage_words(folder, cell.damage))
    return cells, left_out


AXES = ("direction", "depth", "lr", "seed")
FIGURES = {
    "loss": ("val_loss", ".4f"),
    "bpb": ("val_bpb", ".4f"),
    "bpb forward": ("val_bpb_forward", ".4f"),
    "bpb backward": ("val_bpb_backward", ".4f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
}
"""Columns of figures, each with its metric and its format: loss in nats per token, then bits per byte."""
CELL_HEADER = [*AXES, "state", *FIGURES]


def cell_columns(cell: CellRow, header: Iterable[str] = CELL_HEADER) -> list[str]:
    """Return a cell's line under some of the columns of `CELL_HEADER`; a figure that it has not is empty."""
    return [_column(cell, name) for name in header]


def _column(cell: CellRow, name: str) -> str:
    if name in FIGURES:
        metric, style = FIGURES[name]
        return format(cell.metrics[metric], style) if metric in cell.metrics else ""
    value = getattr(cell, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def load_cells(storage: Path, ids: list[str]) -> list[CellRow]:
    """Return the rows of the experiments `ids`, in their order."""
    return [load_cell(ExperimentFolder(storage, name)) for name in ids]
