"""Capacity of a cluster: the number of cells that run at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import ray

from bwlm.cluster.autoscaling import find_autoscaler
from bwlm.cluster.placement import SPARE_CPUS, count_places, driver_bundle, need_words
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.plan.machine import parts_of_gpus


def cpus_of_cell(resources: ResourceSettings) -> float:
    """Return the logical CPUs that a cell holds at least while it runs: its workers', and its trial's if it has one."""
    return resources.fewest * resources.cpus_per_worker + driver_bundle(resources).get("CPU", 0)


@dataclass(frozen=True)
class Capacity:
    """Number of cells that run at once, and the hardware that they run on."""

    concurrency: int
    dashboard: str | None
    cluster: str
    """`this machine`, or the address of a cluster, with a hint if no cell asks for its GPUs."""
    grows: bool = False
    """True for a cluster: its other work may end, or it may get nodes."""


def capacity_of_cluster(
    needs: Collection[ResourceSettings], concurrency: int | None, cells: int, dashboard: str | None
) -> Capacity:
    """Return the capacity of the cluster that this process is connected to, once at least one cell has room.

    If the cluster has an autoscaler, waits for the nodes that it starts for the cells. Raises `UserError` for a cell
    that neither the cluster nor any node type of its autoscaler can ever hold.
    """
    most = most_at_once(needs, concurrency, cells)
    chosen = min(count_places(resources, most) for resources in needs)
    gpus = int(sum(node.get("GPU", 0) for node in resources_of_nodes()))
    unused = gpus and not any(resources.gpus_per_worker for resources in needs)
    hint = f", whose {gpus} GPUs no cell asks for (resources.gpus_per_worker)" if unused else ""
    return Capacity(chosen, dashboard, f"{ray.get_runtime_context().gcs_address}{hint}", grows=True)


def most_at_once(needs: Collection[ResourceSettings], concurrency: int | None, cells: int) -> int:
    """Return how many cells could run at once on the cluster as it is, or as its autoscaler could make it.

    Raises `UserError` for a cell that can never run, and for more cells than fit.
    """
    nodes, wanted, kinds = resources_of_nodes(), min(concurrency or cells, cells), ""
    if any(room_on(nodes, resources) < wanted * resources.fewest for resources in needs):
        autoscaler = find_autoscaler()
        if autoscaler and not autoscaler.node_types:
            return wanted
        if autoscaler:
            nodes = autoscaler.grown(nodes)
            kinds = f", at its largest {' and '.join(kind.words() for kind in autoscaler.node_types)},"
    return _most(needs, concurrency, cells, nodes, kinds)


def _most(
    needs: Collection[ResourceSettings],
    concurrency: int | None,
    cells: int,
    nodes: Collection[dict[str, float]],
    kinds: str,
) -> int:
    for resources in needs:
        if (places := room_on(nodes, resources)) < resources.fewest:
            raise UserError(
                f"resources.workers: a cell needs {need_words(resources)}, but the cluster{kinds} has room for "
                f"{places} of its workers: lower resources.workers or what each asks for, or add nodes"
            )
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return choose_concurrency(needs, concurrency, cells, cpus - SPARE_CPUS, gpus, f"the cluster{kinds}")


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
    if resources.gpus_per_worker:
        fits = min(fits, parts_of_gpus(gpus, resources.fewest * resources.gpus_per_worker))
    if fits < 1:
        raise UserError(
            f"resources.workers: a cell needs {need_words(resources)}, but {where} has {int(cpus)} CPUs and "
            f"{int(gpus)} GPUs to give: lower resources.workers, resources.cpus_per_worker or "
            "resources.gpus_per_worker, or take a larger cluster"
        )
    return fits
