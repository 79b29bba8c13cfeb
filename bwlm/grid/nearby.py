"""Ray's tasks on the node that asks for them: each node has a working folder of its own for a storage in a bucket."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bwlm.plan.machine import available_cores
from bwlm.text.packing import Job, PackResult


def pack_nearby(jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
    """Run the work on each job in tasks on this node, as many at once as it has cores; return the results in order.

    A node that only drives a cluster has no CPUs for Ray, so the tasks ask for none.
    """

    task = ray.remote(num_cpus=0, scheduling_strategy=_here())(_call)
    tasks: list[ray.ObjectRef] = []
    running: list[ray.ObjectRef] = []
    for job in jobs:
        if len(running) == available_cores():
            _, running = ray.wait(running, num_returns=1)
        tasks.append(task.remote(work, job))
        running.append(tasks[-1])
    results: list[PackResult] = ray.get(tasks)
    return results


def _call(work: Callable[[Job], PackResult], job: Job) -> PackResult:
    return work(job)


def stream_nearby() -> None:
    """Let Ray Data run this process's tasks on its own node, for all that it reads from now on."""
    context = ray.data.DataContext.get_current()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Data means to choose nodes itself one day, and cannot know of the files
        context.scheduling_strategy = context.scheduling_strategy_large_args = _here()


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
