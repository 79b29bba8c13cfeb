"""Capacity of a cluster: the number of cells that run at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import ray

from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.plan.machine import ROUNDING, parts_of_gpus

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


SPARE_CPUS = 1.0
"""Logical CPUs left for Ray Data's tasks: without a free CPU, a cell waits for its first batch for ever."""


TRIAL_CPUS = 0.1
"""Logical CPUs of a trial that drives several workers."""


def cpus_of_cell(resources: ResourceSettings) -> float:
    """Return the logical CPUs that a cell holds while it runs: its workers' and, with several workers, its trial's."""
    return resources.workers * resources.cpus_per_worker + (TRIAL_CPUS if resources.workers > 1 else 0)


@dataclass(frozen=True)
class Capacity:
    """Number of cells that run at once, and the hardware that they run on."""

    concurrency: int
    dashboard: str | None
    cluster: str
    """`this machine`, or the address of a cluster, with a hint if no cell asks for its GPUs."""


def capacity_of_cluster(
    needs: Collection[ResourceSettings], concurrency: int | None, cells: int, dashboard: str | None
) -> Capacity:
    """Return the capacity of the cluster that this process is connected to."""
    nodes = resources_of_nodes()
    cpus = sum(node.get("CPU", 0) for node in nodes) - SPARE_CPUS
    gpus = sum(node.get("GPU", 0) for node in nodes)
    for resources in needs:
        places = room_on(nodes, resources)
        if places < resources.workers:
            raise UserError(
                f"resources.workers: {resources.workers} workers of {resources.cpus_per_worker} CPUs and "
                f"{resources.gpus_per_worker:g} GPUs are needed, but the cluster has room for {places}: "
                "lower resources.workers or add nodes"
            )
    chosen = choose_concurrency(needs, concurrency, cells, cpus, gpus, "the cluster")
    gpus_of_cell = max(resources.workers * resources.gpus_per_worker for resources in needs)
    chosen = min(chosen, _free_now(max(map(cpus_of_cell, needs)), gpus_of_cell))
    unused = gpus and not any(resources.gpus_per_worker for resources in needs)
    hint = f", whose {int(gpus)} GPUs no cell asks for (resources.gpus_per_worker)" if unused else ""
    return Capacity(chosen, dashboard, f"{ray.get_runtime_context().gcs_address}{hint}")


def _free_now(cpus: float, gpus: float) -> int:
    """Return how many cells of this size fit beside the cluster's other work; wait until at least one does.

    A spare CPU stays free: a cell that took the last CPU would wait for its rows for ever, and so would other work.
    """
    while True:
        free = ray.available_resources()
        fits = (free.get("CPU", 0) - SPARE_CPUS) // cpus
        fits = min(fits, free.get("GPU", 0) / gpus + ROUNDING) if gpus else fits
        if fits >= 1:
            return int(fits)
        _tell_once(f"waiting until {cpus + SPARE_CPUS:g} CPUs and {gpus:g} GPUs of the cluster are free")
        time.sleep(_LOOK_SECONDS)


@cache
def _tell_once(message: str) -> None:
    log.warning("%s", message)


def resources_of_nodes() -> list[dict[str, float]]:
    """Return what each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room_on(nodes: Collection[dict[str, float]], resources: ResourceSettings) -> int:
    """Return how many workers fit on empty nodes."""
    return int(sum(_places(node, resources) for node in nodes))


def _places(node: dict[str, float], resources: ResourceSettings) -> float:
    """Return how many workers fit on one node."""
    places = node.get("CPU", 0) // resources.cpus_per_worker
    if resources.gpus_per_worker:
        places = min(places, parts_of_gpus(node.get("GPU", 0), resources.gpus_per_worker))
    return places


def choose_concurrency(
    needs: Collection[ResourceSettings], wanted: int | None, cells: int, cpus: float, gpus: float, where: str
) -> int:
    """Return the number of cells to run at once: `wanted`, or as many of the largest kind as fit.

    So no cell that is started waits for room. Raises `UserError` if `wanted` is more than fits, or if no cell fits.
    """
    fits = min(_fitting(resources, cpus, gpus, where) for resources in needs)
    if wanted is not None and wanted > fits:
        raise UserError(f"launch.concurrency: {wanted} cells at once, but {where} has room for {fits}: lower it")
    return max(1, min(wanted or fits, cells))


def _fitting(resources: ResourceSettings, cpus: float, gpus: float, where: str) -> int:
    fits = int(cpus // cpus_of_cell(resources))
    need = f"{resources.workers} x {resources.cpus_per_worker} CPUs"
    if resources.gpus_per_worker:
        fits = min(fits, parts_of_gpus(gpus, resources.workers * resources.gpus_per_worker))
        need += f" and {resources.gpus_per_worker:g} GPUs"
    if fits < 1:
        raise UserError(
            f"resources.workers: a cell needs {need}, but {where} has {int(cpus)} CPUs and {int(gpus)} GPUs to give: "
            "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker, or take a larger cluster"
        )
    return fits
