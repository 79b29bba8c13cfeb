"""SIGTERM to worker processes on any node of the cluster."""

from __future__ import annotations

import contextlib
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


def ask_to_end(holder: str) -> None:
    """Send SIGTERM to the worker `host:pid`, on whatever node of the cluster it is."""
    host, _, pid = holder.rpartition(":")
    if host == socket.gethostname():
        _terminate(pid)
        return
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == host:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ray.remote(_terminate).options(num_cpus=0, scheduling_strategy=there).remote(pid)


def _terminate(pid: str) -> None:
    # the process may have gone, or the holder may not have written its pid yet
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(pid))
        if process.name().startswith("ray::"):  # a reused pid may be another program's process
            process.terminate()
