"""Cores, memory and GPUs of this machine, and the threads and GPUs of each worker that follow from them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.plan.spec import Cell, generations
from bwlm.settings_file import Document, holds

ROUNDING = 1e-6
"""Added to quotients of GPUs: ten cells of 0.1 GPUs fit on one, whatever floats make of it."""


@dataclass(frozen=True)
class Machine:
    """Hardware that this process may use."""

    cores: int
    memory: int
    """Bytes."""
    gpus: int = 0
    gpu_memory: int = 0
    """Bytes of one GPU."""

    def cells_at_once(self, cells: Sequence[Cell], concurrency: int | None) -> int:
        """Return how many of the cells run at once: `concurrency`, or as many of the largest as fit; at least one."""
        fitting = min((self._room_for(cell.experiment.resources) for cell in cells), default=1)
        return max(1, min(len(cells), concurrency or fitting))

    def _room_for(self, resources: ResourceSettings) -> int:
        fits = self.cores // (resources.fewest * resources.cpus_per_worker)
        if resources.gpus_per_worker:
            fits = min(fits, parts_of_gpus(self.gpus, resources.fewest * resources.gpus_per_worker))
        return fits


def parts_of_gpus(gpus: float, each: float) -> int:
    """Return how many cells get `each` GPUs, or a part of a GPU, from `gpus`: a part never lies on two GPUs."""
    return int(gpus) * int(1 / each + ROUNDING) if each < 1 else int(gpus // each)


def machine_of(cells: Sequence[Cell]) -> Machine | None:
    """Return this machine, on which the cells train; None under `RAY_ADDRESS`. GPUs are counted if cells ask for them.

    Raises `UserError` if torch cannot use them.
    """
    if os.environ.get("RAY_ADDRESS"):
        return None
    wanted = any(cell.experiment.resources.gpus_per_worker for cell in cells)
    gpus = available_gpus() if wanted else 0
    from bwlm.model.compute import gpu_memory

    return Machine(available_cores(), available_memory(), gpus, gpu_memory() if gpus else 0)


def with_resources(cells: tuple[Cell, ...], document: Document) -> tuple[Cell, ...]:
    """Return the cells with the threads and GPUs of each worker that are not given, shared out from this machine.

    A cell alone takes all cores; cells that run at once share them, at least one core each, which is faster than to
    share the work of each cell. Nothing is filled in under `RAY_ADDRESS`: a cluster's machines are others.
    """
    if os.environ.get("RAY_ADDRESS"):
        return cells
    if not _is_given(document, "gpus_per_worker") and (gpus := installed_gpus()):
        cells = tuple(_resourced(cell, gpus_per_worker=int(gpus >= cell.experiment.resources.fewest)) for cell in cells)
    if not _is_given(document, "cpus_per_worker"):
        cores = available_cores()
        beside = max(map(len, generations(cells)), default=1)
        cells = tuple(_with_threads(cell, cores // min(beside, cores)) for cell in cells)
    return cells


def _is_given(document: Document, name: str) -> bool:
    field = f"resources.{name}"
    return holds(document.content, field) or field in document.content.get("axes", {})


def installed_gpus() -> int:
    """Return the number of CUDA devices. torch is asked only if there is a driver: its import takes seconds."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    from bwlm.model.compute import count_gpus

    return count_gpus()


def available_gpus() -> int:
    """Return the number of CUDA devices that a launch can use.

    Raises `UserError` if torch cannot use them: the first sign of it should not be the speed.
    """
    from bwlm.model.compute import can_use_gpus

    gpus = installed_gpus()
    if gpus and not can_use_gpus():
        raise UserError(
            f"this machine has {gpus} GPUs that torch cannot use: update the driver, or install a torch that it "
            "can run; resources.gpus_per_worker=0 trains on the CPU"
        )
    return gpus


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the cores that this process may use: a batch system or a container may give it a part of the machine."""
    cores = len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control group (version 2), or `max`: no quota
        microseconds, period = map(int, quota.read_text("ascii").split())
        cores = min(cores, microseconds // period)
    return max(1, cores)


def available_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the bytes of memory that this process may use: of the machine, or its container's limit."""
    memory: int = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no control group (version 2), or `max`: no limit
        memory = min(memory, int(limit.read_text("ascii")))
    return memory


def _with_threads(cell: Cell, cores: int) -> Cell:
    resources = cell.experiment.resources
    if resources.gpus_per_worker:
        return cell
    return _resourced(cell, cpus_per_worker=max(1, cores // resources.fewest))


def _resourced(cell: Cell, **update: float) -> Cell:
    resources = cell.experiment.resources.model_copy(update=update)
    return replace(cell, experiment=cell.experiment.model_copy(update={"resources": resources}))
