"""Room for a group of workers that may have several sizes, asked of Ray as placement groups.

One group holds the smallest size, and each further one what the next size needs besides. So Ray itself says which size
has room beside the cluster's other work, and an autoscaler starts nodes for those that wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from bwlm.cluster.autoscaling import find_autoscaler
from bwlm.cluster.capacity import resources_of_nodes, room_on
from bwlm.cluster.placement import UNDECIDED, worker_bundle
from bwlm.config import ResourceSettings

_LOOK_SECONDS = 0.2
_PLACED = "CREATED"


class GroupRoom:
    """Room for the sizes beyond the workers that are `held` already, as long as it is not forgotten."""

    def __init__(self, resources: ResourceSettings, sizes: Sequence[int], held: int = 0) -> None:
        """Ask for the room; `sizes` are in ascending order and above `held`."""
        worker = worker_bundle(resources)
        self.sizes, self._held = tuple(sizes), held
        self._groups = [placement_group([worker] * (size - before)) for before, size in pairwise([held, *sizes])]

    def size(self) -> int:
        """Return the largest size that has room now, or what is held."""
        return self._placed(self._states())

    def wait(self, give_up: Callable[[], bool]) -> int:
        """Return the largest size that has room, once one has and Ray has decided on the others.

        Returns what is held if `give_up` becomes true.
        """
        while not give_up():
            states = self._states()
            if (size := self._placed(states)) > self._held and not any(state in UNDECIDED for state in states):
                return size
            time.sleep(_LOOK_SECONDS)
        return self._held

    def _placed(self, states: Sequence[str]) -> int:
        placed = list(takewhile(lambda one: one[1] == _PLACED, zip(self.sizes, states, strict=True)))
        return placed[-1][0] if placed else self._held

    def forget(self) -> None:
        """Give the room back."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []

    def _states(self) -> list[str]:
        """Return `CREATED` for each group that has room, and for any other what Ray says of it."""
        table = placement_group_table()
        known = [table[group.id.hex()] for group in self._groups]
        return [_PLACED if one["state"] == _PLACED else one["stats"]["scheduling_state"] for one in known]


def sizes_for_one(resources: ResourceSettings, sizes: Sequence[int], at_once: int) -> list[int]:
    """Return the sizes that each of `at_once` groups could have on the cluster's nodes, or the smallest one.

    Nodes that an autoscaler may start count too. So the first of many groups takes no room that others begin in.
    """
    nodes, autoscaler = resources_of_nodes(), find_autoscaler()
    if autoscaler and not autoscaler.node_types:
        return list(sizes)
    room = room_on(autoscaler.grown(nodes) if autoscaler else nodes, resources)
    return [size for size in sizes if size == sizes[0] or size * at_once <= room]


def living_nodes() -> set[str]:
    """Return the ids of the cluster's nodes."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def node_leaves() -> bool:
    """Return whether Ray drains the node of this process: a preemption was announced."""
    here = ray.get_runtime_context().get_node_id()
    return here in ray._private.state.state.get_draining_nodes()
