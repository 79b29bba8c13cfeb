"""Room for groups of several sizes, asked of a real Ray of six CPUs."""

from __future__ import annotations

import time

import pytest

from bwlm.cluster import group_room
from bwlm.cluster.autoscaling import Autoscaler, NodeType
from bwlm.cluster.group_room import GroupRoom, node_leaves, sizes_for_one
from bwlm.config import ResourceSettings
from tests.cluster.test_placement import holder

TWO_CPUS = ResourceSettings(workers={"min": 1, "max": 4}, cpus_per_worker=2)  # type: ignore[arg-type]


def never() -> bool:
    return False


def test_a_group_is_as_large_as_there_is_room(ray_cluster: str) -> None:
    """Six CPUs: two workers of two have room, and four have not; where others hold three, one has."""
    import ray

    room = GroupRoom(TWO_CPUS, [1, 2, 4])
    assert room.wait(never) == 2
    room.forget()
    other = holder(3)
    room = GroupRoom(TWO_CPUS, [1, 2, 4])
    assert room.wait(never) == 1
    room.forget()
    ray.kill(other)


def test_room_that_comes_later_is_seen(ray_cluster: str) -> None:
    """A group of one, which holds two CPUs itself, and two CPUs of others."""
    import ray

    own, other = holder(2), holder(3)
    room = GroupRoom(TWO_CPUS, [2, 4], held=1)
    assert room.size() == 1
    assert room.wait(lambda: True) == 1, "asked to end"
    ray.kill(other)
    assert room.wait(never) == 2
    room.forget()
    ray.kill(own)


def test_each_of_several_groups_leaves_the_others_their_share(ray_cluster: str) -> None:
    assert sizes_for_one(TWO_CPUS, [1, 2, 4], at_once=1) == [1, 2]
    assert sizes_for_one(TWO_CPUS, [1, 2, 4], at_once=2) == [1]
    assert sizes_for_one(TWO_CPUS, [2, 4], at_once=2) == [2], "a cell needs its fewest in any case"


def test_nodes_that_an_autoscaler_may_start_count(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (NodeType("cpu", {"CPU": 4}, 2),)
    monkeypatch.setattr(group_room, "find_autoscaler", lambda: Autoscaler(kinds))
    assert sizes_for_one(TWO_CPUS, [1, 2, 4, 8], at_once=1) == [1, 2, 4]
    monkeypatch.setattr(group_room, "find_autoscaler", lambda: Autoscaler(()))
    assert sizes_for_one(TWO_CPUS, [1, 2, 4, 8], at_once=1) == [1, 2, 4, 8], "of kinds that nobody knows"


def test_room_is_given_back(ray_cluster: str) -> None:
    import ray

    GroupRoom(TWO_CPUS, [1, 2]).forget()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 6:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not node_leaves()
