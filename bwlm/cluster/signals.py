"""SIGTERM and SIGKILL to worker processes on any node of the cluster."""

from __future__ import annotations

import contextlib
import signal
import socket
from functools import cache

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bwlm.train.termination import Termination


@cache
def process_termination() -> Termination:
    """Return this worker process's flag: a process that was asked to end takes no further cell."""
    return Termination()


def own_workers() -> set[str]:
    """Return `host:pid` of the actors' processes that this driver has started, on all nodes of the cluster."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
    return {f"{hosts.get(actor['Address']['NodeID'])}:{actor['Pid']}" for actor in actors}


def ask_to_end(holder: str) -> None:
    """Send SIGTERM to the worker `host:pid`, on whatever node of the cluster it is."""
    _send(holder, signal.SIGTERM)


def kill(holder: str) -> None:
    """Send SIGKILL to the worker `host:pid`, on whatever node of the cluster it is."""
    _send(holder, signal.SIGKILL)


def _send(holder: str, number: signal.Signals) -> None:
    host, _, pid = holder.rpartition(":")
    if host == socket.gethostname():
        _send_here(pid, number)
        return
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == host:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ray.remote(_send_here).options(num_cpus=0, scheduling_strategy=there).remote(pid, number)


def _send_here(pid: str, number: signal.Signals) -> None:
    # the process may have gone, or the holder may not have written its pid yet
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(pid))
        if process.name().startswith("ray::"):  # a reused pid may be another program's process
            process.send_signal(number)
