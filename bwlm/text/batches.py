"""Batches of a split in one direction, as a function of the step: by Ray Data's tasks, or in this process.

A batch is a dictionary of arrays with one record a row: `inputs`, `targets` and `segments`, each [R, T] int32. RL
adds rewards and advantages of its samples (`bwlm/train/rollouts.py`).
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
    """Return the packed rows of a split, memory-mapped once in each process."""
    return PackedRows(Path(folder), split)


def row_plan(folder: str, rows_per_step: int, seed: int) -> RowPlan | MixturePlan:
    """Return the order of the rows of a prepared corpus, which may be a mixture."""
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
    """Layout of conversations; None: documents."""

    def batch(self, step: int) -> Batch:
        """Return the batch that this rank reads at `step`, in its direction."""
        directed = self.lay_out(self.rows(step))
        return {"inputs": directed.ids[:, :-1], "targets": directed.targets, "segments": directed.segments}

    def rows(self, step: int) -> Rows:
        """Return the rows that this rank reads at `step`, before any direction."""
        return open_rows(self.folder, "train").take(*self.plan.at(step, self.rank, self.world))

    def lay_out(self, rows: Rows) -> Directed:
        """Return the rows as the model of this direction trains on them."""
        reading = readings(self.direction, rows, self.plan.seed)
        width = open_rows(self.folder, "train").width
        layout = row_layout(self.direction, rows, reading, self.turns)
        return lay_out(rows, reading, is_marked(self.direction), self.special, width, layout)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Yield the batches of steps first..last-1, read in this process."""
        return (self.batch(step) for step in range(first, last))


def join(batches: list[Batch]) -> Batch:
    """Return the rows of several batches as one batch."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
