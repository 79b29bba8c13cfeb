"""Places for cells on a cluster: as many as Ray has room for, now or once its autoscaler has started nodes.

Each cell is asked for as a placement group, as Tune and Train ask for it later. So Ray itself says how many fit, the
autoscaler starts nodes for groups that wait, and Ray forgets the groups of a process that has died.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator
from functools import cached_property

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from bwlm.cluster.autoscaling import Growth, find_autoscaler, has_words
from bwlm.config import ResourceSettings
from bwlm.format import counted
from bwlm.progress import working

log = logging.getLogger(__name__)

SPARE_CPUS = 1.0
"""Logical CPUs left for Ray Data's tasks: without a free CPU, a cell waits for its first batch for ever."""

TRIAL_CPUS = 0.1
"""Logical CPUs of a trial that drives several workers."""

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 300.0
"""Longest wait for a further cell's nodes, once another cell has room."""
_UNDECIDED = ("QUEUED", "SCHEDULING_STARTED", "FAILED_TO_COMMIT_RESOURCES")
"""States in which Ray has not said yet whether a group has room now."""

Bundles = list[dict[str, float]]


def need_words(resources: ResourceSettings) -> str:
    """Return the need of a cell in words: `2 workers of 4 CPUs and 1 GPU`."""
    each = has_words({"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker})
    return each if resources.workers == 1 else f"{resources.workers} workers of {each}"


def bundles_of(resources: ResourceSettings) -> Bundles:
    """Return the resources of a cell: those of each worker and, with several workers, of the trial that drives them."""
    worker = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        worker["GPU"] = resources.gpus_per_worker
    return [worker] * resources.workers + ([{"CPU": TRIAL_CPUS}] if resources.workers > 1 else [])


def count_places(resources: ResourceSettings, wanted: int) -> int:
    """Return how many cells, `wanted` at most, have room at once beside the cluster's other work.

    Waits until one has, and for the nodes of the others while an autoscaler may start some. A spare CPU stays free: a
    cell that took the last CPU would wait for its rows for ever.
    """
    with _asked_for([[{"CPU": SPARE_CPUS}], *[bundles_of(resources)] * wanted]) as groups:
        what = f"room for {counted(wanted, 'cell')} of {need_words(resources)}"
        wait = _Wait(groups, what)
        with working(f"waiting for {what}", "cells", wanted, lambda: wait.placed):
            while not wait.is_over():
                time.sleep(_LOOK_SECONDS)
        return wait.placed


@contextlib.contextmanager
def _asked_for(needs: Collection[Bundles]) -> Iterator[list[str]]:
    """Ask Ray for a placement group for each need until the end of the block; yield their ids."""
    groups: list[PlacementGroup] = []
    try:
        groups += (placement_group(need) for need in needs)
        yield [group.id.hex() for group in groups]
    finally:
        for group in groups:
            remove_placement_group(group)


class _Wait:
    """Wait for the groups of a spare CPU and of cells."""

    def __init__(self, groups: list[str], what: str) -> None:
        self._spare, *self._cells = groups
        self._what = what
        self._since = time.monotonic()
        self._told = False
        self.placed = 0
        """Number of cells that have room."""

    def is_over(self) -> bool:
        """Return true once one cell has room at least, and no other one will have it soon."""
        table = placement_group_table()
        waiting = {id for id in (self._spare, *self._cells) if table[id]["state"] != "CREATED"}
        if (placed := len(set(self._cells) - waiting)) != self.placed:
            self.placed, self._since = placed, time.monotonic()
        if not waiting:
            return True
        if any(table[id]["stats"]["scheduling_state"] in _UNDECIDED for id in waiting):
            return False
        return not self._is_worth_it(waiting)

    @cached_property
    def _growth(self) -> Growth | None:
        return Growth() if find_autoscaler() else None

    def _is_worth_it(self, waiting: Collection[str]) -> bool:
        """Return true if the groups that have no room now are worth a wait; say so once."""
        comes = self._growth is not None and self._growth.may_place(waiting)
        if self.placed and self._spare not in waiting:
            comes = comes and time.monotonic() - self._since < _PATIENCE_SECONDS
            if not comes:
                return False
        if not self._told:
            self._told = True
            asked = "the autoscaler was asked for nodes" if comes else "the cluster is busy with other work"
            log.warning("waiting for %s and a spare CPU: %s", self._what, asked)
        return True
