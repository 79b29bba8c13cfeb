"""Gauges of a launch for Prometheus: the newest figures of its cells, which Ray exports from every node.

Ray forgets a gauge that nobody has set for some 20 seconds, and leaves out values that are not finite. So a thread sets
the newest figures again every few seconds; a cell that has ended vanishes soon after, and the last figures of a cell
that diverged stay until the launch ends.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ray.util.metrics import Gauge

from bwlm.plan.spec import Cell
from bwlm.record.experiment import Status

FIGURES: Mapping[str, tuple[str, str]] = {
    "step": ("bwlm_step", "optimizer steps so far"),
    "train_loss_smooth": ("bwlm_loss", "exponential average of the training loss, nats/token"),
    "reward": ("bwlm_reward", "RL: mean reward of the step's samples"),
    "val_bpb": ("bwlm_val_bpb", "validation loss in the own direction, bits/byte"),
    "tokens_per_second": ("bwlm_tokens_per_second", "training tokens per second, of all workers"),
    "mfu": ("bwlm_mfu", "model FLOPs utilization, a share"),
    "step_seconds": ("bwlm_step_seconds", "time of a step"),
    "wait_seconds": ("bwlm_wait_seconds", "time before a step: waiting for rows, writing records"),
    "checkpoint_seconds": ("bwlm_checkpoint_seconds", "time of the last save, which runs beside steps"),
    "memory_bytes": ("bwlm_memory_bytes", "memory of a worker, or peak memory of its GPU"),
    "seconds_left": ("bwlm_seconds_left", "time until the last step, estimated"),
}
"""Gauges of a cell, by the metric of a step that they show: name and description."""
LOSS_FINITE = "bwlm_loss_finite"
CELLS = "bwlm_cells"
CELL_LABELS = ("grid", "cell", "phase", "direction", "depth", "lr", "seed")
STATES = ("waiting", "running", "finished", "stopped", "failed")

_SET_SECONDS = 5.0


class CellGauges:
    """Newest figures of a launch's cells, as gauges of Ray, for the time of a block."""

    def __init__(self, grid: str, cells: Iterable[Cell], states: Mapping[str, Status]) -> None:
        """Begin with the cells of all phases, and the states in which they were found."""
        self._grid = grid
        by_id = {cell.id: cell for cell in cells}
        self._labels = {name: _labels(grid, cell) for name, cell in by_id.items()}
        self._groups = {name for name, cell in by_id.items() if cell.experiment.resources.drives_group}
        """Cells with a group of workers, which may wait for a node until its first report."""
        self._states = {name: states[name].state if states[name].ended else "waiting" for name in self._labels}
        self._figures: dict[str, dict[str, float]] = {}
        """Values to set, by cell and gauge."""
        gauges = {name: Gauge(name, description, CELL_LABELS) for name, description in FIGURES.values()}
        gauges[LOSS_FINITE] = Gauge(LOSS_FINITE, "0 if the cell diverged: its loss is the last finite one", CELL_LABELS)
        self._gauges = gauges
        self._cells = Gauge(CELLS, "cells in each state", ("grid", "state"))
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._set_again, name="gauges", daemon=True)

    def __enter__(self) -> CellGauges:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def began(self, cell: str, step: int) -> None:
        """Count a cell as running, with a group of workers from its first report; `step` is what it resumes from."""
        with self._lock:
            self._states[cell] = "waiting" if cell in self._groups else "running"
            self._figures[cell] = {"bwlm_step": step, LOSS_FINITE: 1}

    def moved(self, cell: str, result: Mapping[str, Any]) -> None:
        """Take up the figures of a cell's newest report."""
        newest = {name: float(result[key]) for key, (name, _) in FIGURES.items() if key in result}
        with self._lock:
            self._states[cell] = "running"
            figures = self._figures.setdefault(cell, {LOSS_FINITE: 1})
            figures.update((name, value) for name, value in newest.items() if math.isfinite(value))

    def released(self, cell: str) -> None:
        """Count a cell as waiting: its worker died, or was asked to end."""
        with self._lock:
            self._states[cell] = "waiting"

    def ended(self, cell: str, status: Status) -> None:
        """Count a cell by how it ended. One that diverged keeps its last figures."""
        with self._lock:
            self._states[cell] = status.state
            if status.diverged is not None:
                self._figures.setdefault(cell, {}).update({"bwlm_step": status.step, LOSS_FINITE: 0})

    def _set_again(self) -> None:
        while True:
            self._set()
            if self._over.wait(_SET_SECONDS):
                return

    def _set(self) -> None:
        with self._lock:
            counts = Counter[str](self._states.values())
            figures = {cell: dict(of) for cell, of in self._figures.items() if self._is_shown(cell, of)}
        for state in STATES:
            self._cells.set(counts[state], {"grid": self._grid, "state": state})
        for cell, of in figures.items():
            for name, value in of.items():
                self._gauges[name].set(value, self._labels[cell])

    def _is_shown(self, cell: str, figures: Mapping[str, float]) -> bool:
        return self._states[cell] == "running" or figures[LOSS_FINITE] == 0


def _labels(grid: str, cell: Cell) -> dict[str, str]:
    one = cell.experiment
    values = (grid, cell.id, one.phase, one.direction, one.depth, one.lr, one.seed)
    return dict(zip(CELL_LABELS, map(str, values), strict=True))
