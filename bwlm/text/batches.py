"""Directed batches of a split, as a function of the step: what Ray Data's tasks run, and what tests read in-process.

A batch is a dictionary of arrays with one record a row: `inputs`, `targets` and `segments`, each [R, T] int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bwlm.text.direction import Ids, SpecialIds, is_marked, lay_out, readings
from bwlm.text.packing import PackedRows
from bwlm.text.plan import RowPlan

Batch = dict[str, Ids]


@lru_cache(maxsize=16)
def open_rows(folder: str, split: str) -> PackedRows:
    """One memory map of a split for each process."""
    return PackedRows(Path(folder), split)


@dataclass(frozen=True)
class DirectedPlan:
    """Everything that fixes the batches of one rank: cheap to send to a task."""

    folder: str
    direction: str
    special: SpecialIds
    plan: RowPlan
    rank: int = 0
    world: int = 1

    def batch(self, step: int) -> Batch:
        """The rows that this rank reads at `step`, in its direction."""
        rows = open_rows(self.folder, "train").take(*self.plan.at(step, self.rank, self.world))
        reading = readings(self.direction, rows, self.plan.seed)
        directed = lay_out(
            rows, reading, is_marked(self.direction), self.special, open_rows(self.folder, "train").width
        )
        return {"inputs": directed.ids[:, :-1], "targets": directed.targets, "segments": directed.segments}

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Steps first..last-1, read in this process."""
        return (self.batch(step) for step in range(first, last))


def join(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
