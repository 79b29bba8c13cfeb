"""CUDA graphs of the decode step: all kernels of a step start with one launch, where each would take longer to start
than to run.

A graph has fixed shapes. So there is one for each of a few numbers of rows and of places seen, all captured when the
cache is made; a step takes the smallest that holds it.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Logits [B, V] for ids [B], their places [B], and the number of places that any row sees; it waits for nothing."""

_FEWEST_PLACES = 256
"""Seeing fewer takes a GPU as long."""


class Captured(NamedTuple):
    """Graph of a step."""

    replay: Callable[[], None]
    logits: Tensor
    """[B, V] of the last replay; the next one of any graph may overwrite them"""


class StepGraphs:
    """Decode steps of up to `rows` rows of `room` places on a GPU; captured at once, never later."""

    def __init__(self, step: Step, rows: int, room: int, device: torch.device) -> None:
        self._step = step
        self._ids, self._places = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.rows, self.seen = sizes(1, rows), sizes(_FEWEST_PLACES, room)
        self._pool: Any = None
        # the largest first: the others fit into its memory
        self._captured = {
            (count, seen): self._capture(self._ids[:count], self._places[:count], seen)
            for count in reversed(self.rows)
            for seen in reversed(self.seen)
        }

    def __call__(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """Return logits [B, V] for an id of each of the first rows; `places` are those of all rows.

        A row that has no new id may be written to at its place, which it does not see.
        """
        count, seen = fitting(self.rows, len(ids)), fitting(self.seen, max(places[: len(ids)]) + 1)
        self._ids[: len(ids)] = torch.tensor(ids)
        self._places[:count] = torch.tensor(places[:count])
        captured = self._captured[count, seen]
        captured.replay()
        return captured.logits[: len(ids)].clone()

    def _capture(self, ids: Tensor, places: Tensor, seen: int) -> Captured:
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(ids, places, seen)  # what libraries allocate when they are first called is no part of a graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(ids, places, seen)
        self._pool = graph.pool()
        return Captured(graph.replay, logits)


def sizes(least: int, most: int) -> list[int]:
    """Return `least`, twice that, and so on, and `most` as the last."""
    found = [least]
    while found[-1] < most:
        found.append(2 * found[-1])
    return [*(size for size in found if size < most), most]


def fitting(among: Sequence[int], needed: int) -> int:
    """Return the smallest size that is enough."""
    return next(size for size in among if size >= needed)
