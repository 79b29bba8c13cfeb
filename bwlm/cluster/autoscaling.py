"""The autoscaler of a cluster: the node types that it may start, and what it makes of work that waits for room.

Ray publishes no node types, so they are read from the config of the autoscaler's process on the head. Its answers to
waiting work are in Ray's own state, with autoscaler v2.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bwlm.format import counted

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
"""Resource that only the head has."""
_MONITORS = ("autoscaler/v2/monitor.py", "autoscaler/_private/monitor.py")


@dataclass(frozen=True)
class NodeType:
    """Kind of node that the autoscaler may start, such as `gpu`."""

    name: str
    resources: dict[str, float]
    most: int
    """Most nodes of this kind at once."""

    def words(self) -> str:
        """Return `4 nodes of gpu (8 CPUs and 1 GPU)`."""
        return f"{counted(self.most, 'node')} of {self.name} ({has_words(self.resources)})"


def has_words(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs in words: `8 CPUs and 1 GPU`, or `2 CPUs`."""
    named = ((resources.get(kind, 0), kind) for kind in ("CPU", "GPU"))
    return " and ".join(f"{count:g} {kind}{'' if count == 1 else 's'}" for count, kind in named if count) or "no CPUs"


@dataclass(frozen=True)
class Autoscaler:
    """Autoscaler of the cluster that this process is connected to."""

    node_types: tuple[NodeType, ...]
    """Kinds of its workers; none if they are not known, as under KubeRay."""

    def grown(self, nodes: Collection[dict[str, float]]) -> list[dict[str, float]]:
        """Return the resources of as many nodes of each kind as there may be, and of the nodes that are none of these.

        The most nodes of all kinds together are not counted: so no cell is refused that could have room.
        """
        kinds = [kind.resources for kind in self.node_types for _ in range(kind.most)]
        return [*kinds, *(node for node in nodes if HEAD in node)]


def find_autoscaler() -> Autoscaler | None:
    """Return the cluster's autoscaler; None if it has none, so that it stays as it is."""
    return _find_autoscaler(ray.get_runtime_context().gcs_address)


@cache
def _find_autoscaler(gcs: str) -> Autoscaler | None:
    [head] = [node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]] or [None]
    if head is None:
        return None
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        config = _config_of_monitor(gcs)
    else:
        there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
        look = ray.remote(_config_of_monitor).options(num_cpus=0, scheduling_strategy=there)
        config = ray.get(look.remote(gcs))
    if config is None:  # KubeRay's autoscaler runs in a container of its own
        return Autoscaler(()) if _status(gcs).autoscaling_state.autoscaler_state_version else None
    return Autoscaler(tuple(_node_types(yaml.safe_load(config)))) if config else None


def _config_of_monitor(gcs: str) -> str | None:
    """Return the config of the autoscaler that runs here; '' if it only watches, None if there is no such process."""
    port = gcs.rpartition(":")[2]
    for process in psutil.process_iter():
        words = _words(process)
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        is_monitor = any(word.endswith(_MONITORS) for word in words)
        if is_monitor and options.get("gcs-address", "").rpartition(":")[2] == port:
            path = options.get("autoscaling-config")
            return Path(path).expanduser().read_text("utf-8") if path else ""
    return None


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return []
    return words


def _node_types(config: dict[str, Any]) -> Iterable[NodeType]:
    most = config.get("max_workers", 0)
    for name, kind in config["available_node_types"].items():
        if count := min(kind.get("max_workers", most), most):
            yield NodeType(name, kind.get("resources", {}), count)


def _status(gcs: str) -> Any:
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=gcs).get_cluster_status(timeout_s=10))
    return reply


class Growth:
    """Answers of the autoscaler to placement groups that wait; made once they were asked for."""

    def __init__(self) -> None:
        self._gcs = ray.get_runtime_context().gcs_address
        self._asked = _status(self._gcs).cluster_resource_state.cluster_resource_state_version
        self._told: set[str] = set()

    def may_place(self, waiting: Collection[str]) -> bool:
        """Return false if the autoscaler says that it has no node for any of the groups, true before its answer.

        Logs why nodes could not be started, each reason once.
        """
        state = _status(self._gcs).autoscaling_state
        for failed in state.failed_instance_requests:
            line = f"the autoscaler could not start {failed.ray_node_type_name}: {failed.reason}"
            if line not in self._told:
                self._told.add(line)
                log.warning("%s", line)
        if state.last_seen_cluster_resource_state_version <= self._asked:
            return True
        hopeless = {group.details.partition(":")[0] for group in state.infeasible_gang_resource_requests}
        return not hopeless.issuperset(waiting)
