"""Batches of a split in one direction, as a function of the step: by Ray Data's tasks, or in this process.

A batch is a dictionary of arrays with one record a row: `inputs`, `targets` and `segments`, each [R, T] int32. RL adds
what its samples earned (`bwlm/train/rollouts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bwlm.directions import is_marked
from bwlm.text.conversation import TurnLayout, row_layout
from bwlm.text.direction import Directed, Rows, SpecialIds, lay_out, readings
from bwlm.text.packing import PackedRows
from bwlm.text.plan import MixturePlan, RowPlan

Batch = dict[str, NDArray[Any]]


@lru_cache(maxsize=16)
def open_rows(folder: str, split: str) -> PackedRows:
    """One memory map of a split for each process."""
    return PackedRows(Path(folder), split)


def row_plan(folder: str, rows_per_step: int, seed: int) -> RowPlan | MixturePlan:
    """The order of the rows of a prepared corpus, or of the mixture that it is."""
    packed = open_rows(folder, "train")
    if not packed.sources:
        return RowPlan(len(packed), rows_per_step, seed)
    rows, drawn = zip(*((source.rows, source.drawn) for source in packed.sources), strict=True)
    return MixturePlan(rows, drawn, rows_per_step, seed)


@dataclass(frozen=True)
class DirectedPlan:
    """Everything that fixes the batches of one rank: cheap to send to a task."""

    folder: str
    direction: str
    special: SpecialIds
    plan: RowPlan | MixturePlan
    rank: int = 0
    world: int = 1
    turns: TurnLayout | None = None
    """Of conversations; None: documents."""

    def batch(self, step: int) -> Batch:
        """The rows that this rank reads at `step`, in its direction."""
        directed = self.lay_out(self.rows(step))
        return {"inputs": directed.ids[:, :-1], "targets": directed.targets, "segments": directed.segments}

    def rows(self, step: int) -> Rows:
        """The rows that this rank reads at `step`, before any direction."""
        return open_rows(self.folder, "train").take(*self.plan.at(step, self.rank, self.world))

    def lay_out(self, rows: Rows) -> Directed:
        """Rows as the model of this direction trains on them."""
        reading = readings(self.direction, rows, self.plan.seed)
        width = open_rows(self.folder, "train").width
        layout = row_layout(self.direction, rows, reading, self.turns)
        return lay_out(rows, reading, is_marked(self.direction), self.special, width, layout)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Steps first..last-1, read in this process."""
        return (self.batch(step) for step in range(first, last))


def join(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
