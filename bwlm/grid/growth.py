"""More cells at once, as the cluster gets room for them: an autoscaler's nodes come one by one, other work ends."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import BasicVariantGenerator

from bwlm.cluster.capacity import cpus_of_cell, most_at_once
from bwlm.cluster.placement import FurtherPlaces
from bwlm.config import ResourceSettings
from bwlm.errors import UserError

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


class MoreAtOnce(Callback):  # type: ignore[misc]
    """Callback that asks for the room of further cells, and lets Tune start one more for each that Ray gives.

    It asks while a launch has more cells than run, up to what the cluster could hold, so an autoscaler goes on starting
    nodes. Cells whose own number of workers follows the nodes take the room themselves.
    """

    def __init__(self, cells: BasicVariantGenerator, needs: Collection[ResourceSettings], wanted: int | None) -> None:
        """Let `cells` grow up to `wanted` at once, or as many as fit; each needs one of `needs`."""
        super().__init__()
        self._cells, self._needs, self._wanted = cells, needs, wanted
        largest = max(needs, key=lambda one: (one.fewest * one.gpus_per_worker, cpus_of_cell(one)))
        self._places = FurtherPlaces(largest)
        self._next_look = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into a state that we never restore

    def forget(self) -> None:
        """Ask for no more room."""
        self._places.forget()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() < self._next_look:
            return
        at_once = self._cells.max_concurrent
        left = self._cells.total_samples - sum(trial.is_finished() for trial in trials)
        # while a cell gives its room to the next one, or a node has gone, what is free is not for further cells
        further = self._most(left) - at_once if sum(map(_has_room, trials)) == at_once else 0
        if taken := self._places.take(max(0, further)):
            self._cells.max_concurrent += taken
            log.info("%d cells at once now: the cluster has room", self._cells.max_concurrent)
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def _most(self, left: int) -> int:
        """Return how many of the cells that are left the cluster could hold."""
        with contextlib.suppress(UserError):  # the nodes that could hold a cell have gone
            return most_at_once(self._needs, self._wanted, left)
        return 0


def _has_room(trial: Trial) -> bool:
    """Return whether a cell trains: its worker is its trial, or the group of its workers has reported."""
    drives_group = trial.config["resources"]["workers"] > 1
    return trial.status == Trial.RUNNING and (not drives_group or "workers" in (trial.last_result or {}))
