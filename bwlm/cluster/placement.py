"""Places for cells on a cluster: as many as Ray has room for, now or once its autoscaler has started nodes.

Each cell is asked for as a placement group, as Tune and Train ask for it later. So Ray itself says how many fit, the
autoscaler starts nodes for groups that wait, and Ray forgets the groups of a process that has died.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from functools import cached_property

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from bwlm.cluster.autoscaling import HEAD, Autoscaler, Growth, find_autoscaler, has_words
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.progress import working

log = logging.getLogger(__name__)

SPARE_CPUS = 1.0
"""Logical CPUs left for tasks that prepare text: without them, such a launch waits until a cell of another one ends."""

_OF_HEAD = 0.001
"""Part of the head's own resource that puts a trial there; it takes no CPU, of which a head may have none."""

TRIAL_CPUS = 0.1
"""Logical CPUs of a trial that drives a group of workers."""

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0
"""Longest wait for a further cell's nodes, once another cell has room: it can begin later too."""
_ELASTIC_PATIENCE_SECONDS = 300.0
"""The same for cells whose workers follow the nodes: no further ones begin later."""
UNDECIDED = ("QUEUED", "SCHEDULING_STARTED", "FAILED_TO_COMMIT_RESOURCES")
"""States in which Ray has not said yet whether a group has room now."""

Bundles = list[dict[str, float]]


def need_words(resources: ResourceSettings) -> str:
    """Return the least need of a cell in words: `2 workers of 4 CPUs and 1 GPU`."""
    each = has_words({"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker})
    return each if resources.fewest == 1 else f"{resources.fewest} workers of {each}"


def bundles_of(resources: ResourceSettings) -> Bundles:
    """Return the least resources of a cell: of each worker, and of the trial if it drives a group of workers."""
    driver = driver_bundle(resources)
    return [worker_bundle(resources)] * resources.fewest + ([driver] if driver else [])


def driver_bundle(resources: ResourceSettings) -> dict[str, float]:
    """Return the resources of the trial that drives a group of workers; none for a cell of one worker.

    If the number of workers follows the nodes, the trial is on the head: no other node takes it along when it goes.
    """
    if resources.is_elastic:
        return {HEAD: _OF_HEAD}
    return {"CPU": TRIAL_CPUS} if resources.drives_group else {}


def worker_bundle(resources: ResourceSettings) -> dict[str, float]:
    """Return the resources of one worker."""
    worker = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        worker["GPU"] = resources.gpus_per_worker
    return worker


def count_places(resources: ResourceSettings, wanted: int) -> int:
    """Return how many cells, `wanted` at most, have room at once beside the cluster's other work.

    Waits until one has, and for the nodes of the others while an autoscaler may start some. A spare CPU stays free
    for tasks that prepare text. Raises `UserError` if the node types of the cluster are not known, and its autoscaler
    says that none can hold a cell.
    """
    wait = _Wait(resources, wanted)
    try:
        with working(f"waiting for {wait.what}", "cells", wanted, lambda: wait.placed):
            while not wait.is_over():
                time.sleep(_LOOK_SECONDS)
        return wait.placed
    finally:
        wait.forget()


class _Wait:
    """Wait for the group of the first cell, which has the spare CPU too, and for those of the others."""

    def __init__(self, resources: ResourceSettings, wanted: int) -> None:
        self.what = f"room for {counted(wanted, 'cell')} of {need_words(resources)}"
        self.placed = 0
        """Number of cells that have room."""
        self._cell, self._wanted = bundles_of(resources), wanted
        self._patience = _ELASTIC_PATIENCE_SECONDS if resources.is_elastic else _PATIENCE_SECONDS
        self._first = placement_group([*self._cell, {"CPU": SPARE_CPUS}])
        self._others: list[PlacementGroup] = []
        self._since = time.monotonic()
        self._told = False
        self._ask_for_others()

    def is_over(self) -> bool:
        """Return true once one cell has room at least, and no other one will have it soon."""
        waiting = self._waiting()
        if any(state in UNDECIDED for state in waiting.values()):
            return False
        if self._first.id.hex() in waiting:
            self._go_on_waiting(waiting)
            return False
        if len(self._others) < self._wanted - 1:
            self._ask_for_others()
            return False
        return not waiting or not self._comes(waiting) or time.monotonic() - self._since > self._patience

    def forget(self) -> None:
        """Give back all room that was asked for."""
        self._forget_others()
        remove_placement_group(self._first)

    def _waiting(self) -> dict[str, str]:
        """Return the groups without room, each with what Ray says of it."""
        table, cells = placement_group_table(), [group.id.hex() for group in (self._first, *self._others)]
        waiting = {id: table[id]["stats"]["scheduling_state"] for id in cells if table[id]["state"] != "CREATED"}
        if (placed := len(cells) - len(waiting)) != self.placed:
            self.placed, self._since = placed, time.monotonic()
        return waiting

    def _go_on_waiting(self, waiting: dict[str, str]) -> None:
        """Say once what is waited for; without nodes to come, wait for the first cell alone.

        Two launches that each held room for others would wait for each other for ever.
        """
        comes = self._comes(waiting)
        if not comes and set(waiting.values()) == {"INFEASIBLE"} and find_autoscaler() == Autoscaler(()):
            raise UserError(
                f"resources.workers: {self.what} was asked of the cluster's autoscaler, and it has no node that could "
                "ever hold one: lower resources.workers or what each asks for"
            )
        if not self._told:
            self._told = True
            why = "the autoscaler was asked for nodes" if comes else "the cluster is busy with other work"
            log.warning("waiting for %s and a spare CPU: %s", self.what, why)
        if not comes:
            self._forget_others()

    @cached_property
    def _growth(self) -> Growth | None:
        return Growth() if find_autoscaler() else None

    def _comes(self, waiting: Collection[str]) -> bool:
        return self._growth is not None and self._growth.may_place(waiting)

    def _ask_for_others(self) -> None:
        self._others = [placement_group(self._cell) for _ in range(self._wanted - 1)]

    def _forget_others(self) -> None:
        for group in self._others:
            remove_placement_group(group)
        self._others = []


class FurtherPlaces:
    """Room asked for, for further cells of a launch whose first ones train."""

    def __init__(self, resources: ResourceSettings) -> None:
        self._cell = bundles_of(resources)
        self._groups: list[PlacementGroup] = []
        """The first one has the spare CPU too."""

    def take(self, wanted: int) -> int:
        """Return how many further cells, `wanted` at most, have room by now. It is given back, for them to take.

        If none has, room for `wanted` is asked for. Without a spare CPU none has.
        """
        table = placement_group_table() if self._groups else {}
        placed = [table[group.id.hex()]["state"] == "CREATED" for group in self._groups]
        taken = min(sum(placed), wanted) if placed[:1] == [True] else 0
        if any(placed) or len(placed) != wanted:
            self.forget()
        if not taken and not self._groups:
            bundles = [[*self._cell, {"CPU": SPARE_CPUS}], *[self._cell] * (wanted - 1)][:wanted]
            self._groups = [placement_group(cell) for cell in bundles]
        return taken

    def forget(self) -> None:
        """Give back all room that was asked for."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []
