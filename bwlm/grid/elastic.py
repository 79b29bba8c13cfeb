"""Workers of a cell that come and go: how many it begins with, and when it begins anew with others.

A cell begins with as many workers as have room. Where there is room for more, its workers are asked to end, as a
preempted machine asks them: they save, and the cell begins again with as many as have room then. So it loses no step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ray.exceptions import RayActorError

from bwlm.background import in_background
from bwlm.cluster.group_room import GroupRoom, living_nodes, node_leaves, sizes_for_one
from bwlm.cluster.signals import ask_to_end, process_termination
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import WORKER, ExperimentFolder
from bwlm.record.journal import last_entry
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import pull

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_NODE_SECONDS = 30.0
"""Time in which Ray learns that a node has gone: workers that were connected with its own see it at once."""
_WORTH_SECONDS = 30.0
"""Seconds that a cell has left at least when it takes more workers: to begin anew takes half as long."""


@dataclass(frozen=True)
class ElasticGroup:
    """Group of workers that has one of several sizes, in ascending order, beside others of its launch."""

    resources: ResourceSettings
    sizes: tuple[int, ...]
    at_once: int
    """Cells that run at once: each leaves the others their share of the nodes."""

    def wanted(self, above: int = 0) -> tuple[int, ...]:
        """Return the sizes above another one that the nodes could hold."""
        return tuple(size for size in sizes_for_one(self.resources, self.sizes, self.at_once) if size > above)

    def wait_for_room(self) -> int:
        """Return the largest size that has room, once one has; 0 if this process is asked to end before."""
        room = GroupRoom(self.resources, self.wanted())
        try:
            return room.wait(lambda: process_termination().asked)
        finally:
            room.forget()


def train_elastic(folder: ExperimentFolder, group: ElasticGroup, fit: Callable[[int], None]) -> None:
    """Train a cell by `fit`, which takes the number of workers, until it ends or its number of workers is to change.

    Raises `RayActorError`, marked as a preemption, if workers are lost: a node that goes is no failure of the cell.
    It counts as one if no node has gone and the cell has saved no checkpoint, so that a cell that cannot train ends.
    """
    size = group.wait_for_room()
    if not size:
        return
    saved, nodes = checkpoint_steps(folder.checkpoints), living_nodes()
    try:
        with _growing(folder, group, size):
            fit(size)
    except Exception as error:
        _learn(folder)
        gets_on = checkpoint_steps(folder.checkpoints) != saved
        if folder.status().ended or not (gets_on or _one_goes(nodes)):
            raise
        raise RayActorError(error_msg=f"{folder.id}: workers are gone: {error}", preempted=True) from None


def _one_goes(nodes: set[str]) -> bool:
    """Return whether one of the nodes has gone, as soon as Ray knows it."""
    deadline = time.monotonic() + _NODE_SECONDS
    while not (gone := nodes - living_nodes()) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return bool(gone)


@contextlib.contextmanager
def _growing(folder: ExperimentFolder, group: ElasticGroup, size: int) -> Iterator[None]:
    """Watch from a thread for room for more workers until the block ends, and for a notice that this node goes."""
    began, before = _last_step(folder), _worker_of(folder)

    def watch(over: threading.Event) -> None:
        room: GroupRoom | None = None
        try:
            while not over.wait(_LOOK_SECONDS):
                room, leaves = _asked_for(group, size, room), node_leaves()
                if leaves or (room is not None and room.size() > size):
                    _learn(folder)
                    if (worker := _worker_of(folder)) != before and (leaves or _is_worth_it(folder, began)):
                        ask_to_end(worker)
        except Exception as error:  # the cluster may be in trouble: then the cell stays as it is
            log.warning("%s: no longer looks for more workers: %s", folder.id, error)
        finally:
            if room is not None:
                room.forget()

    with in_background("elastic", watch):
        yield


def _asked_for(group: ElasticGroup, size: int, room: GroupRoom | None) -> GroupRoom | None:
    """Return the room for what the nodes could hold above a size: what was asked for, unless the nodes are others."""
    wanted = group.wanted(above=size)
    if room is not None and room.sizes == wanted:
        return room
    if room is not None:
        room.forget()
    return GroupRoom(group.resources, wanted, held=size) if wanted else None


def _is_worth_it(folder: ExperimentFolder, began: int) -> bool:
    """Return whether a cell has trained steps since it began, and has long enough left."""
    last = last_entry(folder.path)
    return last is not None and last.step > began and last.metrics.get("seconds_left", 0.0) >= _WORTH_SECONDS


def _last_step(folder: ExperimentFolder) -> int:
    last = last_entry(folder.path)
    return last.step if last else 0


def _worker_of(folder: ExperimentFolder) -> str:
    """Return `host:pid` of rank 0 that trains the run, or trained it last; '' before the first."""
    with contextlib.suppress(UserError):
        noted = read_json(folder.path / WORKER)
        return f"{noted['host']}:{noted['pid']}"
    return ""


def _learn(folder: ExperimentFolder) -> None:
    """Learn from a bucket what a worker on another machine has done."""
    with contextlib.suppress(BucketAway):
        pull(folder.path)
