"""SIGTERM to a worker process, wherever in the cluster it runs."""

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
    with contextlib.suppress(psutil.Error, ValueError):  # a holder that has not yet written down who it is
        process = psutil.Process(int(pid))
        if process.name().startswith("ray::"):  # a number that was given away again is not ours to end
            process.terminate()
