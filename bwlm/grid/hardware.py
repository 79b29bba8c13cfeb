"""Choice of precision, kernels and batch sizes for the hardware of the workers, here or on a node of the cluster."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import ray

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.model.compute import (
    Compute,
    ComputeOverrides,
    DeviceType,
    Hardware,
    choose_compute,
    look_at_hardware,
    why_not_compile,
)
from bwlm.model.shape import GPTConfig
from bwlm.phases import PHASES
from bwlm.record.run_config import RunConfig


def plan_compute(experiment: Experiment, shape: GPTConfig, steps: int) -> Compute:
    """Return how a run will compute on its workers; settings that are left open are chosen for the hardware."""
    settings, resources = experiment.compute, experiment.resources
    wanted = ComputeOverrides(
        None if settings.precision == "auto" else settings.precision,
        None if settings.attention == "auto" else settings.attention,
        settings.fused_loss,
        settings.compile,
        settings.device_batch_size,
    )
    hardware, peak = _worker_hardware("cuda" if resources.gpus_per_worker else "cpu", resources.cpus_per_worker)
    if 0 < (part := resources.gpus_per_worker) < 1:
        hardware = replace(hardware, name=f"{part:g} of a {hardware.name}", memory=part * hardware.memory)
    rows = experiment.budget.batch_tokens // shape.sequence_length // resources.fewest
    sampling = PHASES[experiment.phase].has_reward and settings.compile is None
    chosen = choose_compute(replace(wanted, compile=False) if sampling else wanted, hardware, peak, shape, rows, steps)
    if sampling:
        chosen = replace(chosen, reasons=chosen.reasons | {"compile": "off: most of a step is the writing of samples"})
    return replace(chosen, reasons=chosen.reasons | {"allocator": _allocator()})


def compiled_if_it_can(config: RunConfig) -> RunConfig:
    """Return the config, without compilation if the compiler of the workers fails.

    A run that has begun compiled then resumes uncompiled, and its rounding differs from that step on. Raises
    `UserError` if the settings ask for compilation and the compiler fails.
    """
    experiment, compute = config.experiment, config.compute
    device: DeviceType = "cuda" if experiment.resources.gpus_per_worker else "cpu"
    if not compute.compile or not (broken := _why_not_compile(device)):
        return config
    if experiment.compute.compile:
        raise UserError(
            f"compute.compile: true, but torch.compile fails here ({broken}): install what it needs, or leave the "
            "field out"
        )
    reason = f"off: torch.compile fails here ({broken})"
    return replace(config, compute=replace(compute, compile=False, reasons=compute.reasons | {"compile": reason}))


def _allocator() -> str:
    if os.environ.get("RAY_ADDRESS"):
        return "as the environment of the cluster's nodes sets it (docs/performance.md)"
    kept = (
        "freed memory stays in the process"
        if os.environ.get("MALLOC_MMAP_MAX_") == "0"
        else "as the environment sets it"
    )
    return f"{kept} (MALLOC_TRIM_THRESHOLD_={os.environ.get('MALLOC_TRIM_THRESHOLD_')})"


@cache
def _worker_hardware(device: DeviceType, threads: int) -> tuple[Hardware, float]:
    """Return a worker's hardware and its peak in FLOP/s: this machine's, or that of a node of the cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        return look_at_hardware(device, threads)
    look = ray.remote(look_at_hardware).options(num_cpus=threads, num_gpus=1 if device == "cuda" else 0)
    hardware: tuple[Hardware, float] = ray.get(look.remote(device, threads))
    return hardware


@cache
def _why_not_compile(device: DeviceType) -> str:
    """Return why torch.compile fails on a worker; '' if it works.

    An installed compiler may still fail, and a long run must not die of a default that nobody chose.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return why_not_compile(device)
    look = ray.remote(why_not_compile).options(num_cpus=1, num_gpus=1 if device == "cuda" else 0)
    return str(ray.get(look.remote(device)))
