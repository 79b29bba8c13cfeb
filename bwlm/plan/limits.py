"""Warnings before a launch: memory, disk and GPUs that its cells need and this machine has not, and rounded widths."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from bwlm.config import CheckpointSettings
from bwlm.errors import UserError
from bwlm.format import counted, file_size, listed
from bwlm.model.shape import WIDTH_PER_DEPTH, count_parameters
from bwlm.paths import check_writable
from bwlm.phases import PHASES
from bwlm.plan.machine import Machine
from bwlm.plan.resolve import worker_counts
from bwlm.plan.spec import Cell, LaunchSettings
from bwlm.record.researchlog_size import bytes_of_log

_FLOAT = 4
"""Bytes of a weight, of its gradient, and of each figure that the optimizer keeps of it."""


def plan_warnings(
    cells: Sequence[Cell], launch: LaunchSettings, storage: Path, machine: Machine | None
) -> Iterator[str]:
    """Yield a line on each thing that the cells may lack; `machine` is None where they train on a cluster."""
    yield from _rounded(cells)
    yield from _left_out(cells)
    if cells and machine:
        yield from _short_of_gpus(cells, machine) or _short_of_memory(cells, launch, machine)
    yield from _storage(cells, storage)


# ---- sizes ----


def optimizer_bytes(cell: Cell) -> int:
    """Return the bytes of the optimizer's state: two figures a weight for AdamW, one for Muon."""
    counts = count_parameters(cell.shape)
    in_muon = counts.matrices if cell.experiment.optim.kind == "muon" else 0
    return _FLOAT * (2 * counts.total - in_muon)


def training_bytes(cell: Cell) -> int:
    """Return the bytes that a worker holds at least: weights, gradients, and its part of the optimizer's state."""
    counts, workers = count_parameters(cell.shape), cell.experiment.resources.fewest
    in_muon = _FLOAT * counts.matrices if cell.experiment.optim.kind == "muon" else 0
    return 2 * _FLOAT * counts.total + optimizer_bytes(cell) - in_muon + in_muon // workers


def checkpoint_bytes(cell: Cell) -> int:
    """Return the bytes of all checkpoints of a cell that are on disk at once, with the one that is being written."""
    one = _FLOAT * count_parameters(cell.shape).total + optimizer_bytes(cell)
    return one * (_kept(cell.experiment.checkpoint, cell.steps) + 1)


def _kept(settings: CheckpointSettings, steps: int) -> int:
    saved = 1 + (steps - 1) // settings.every if settings.every else 1
    every = steps // settings.keep_every if settings.keep_every else 0
    return min(saved, settings.keep + settings.keep_best + every)


# ---- warnings ----


def _rounded(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for each head_dim that makes models wider than 64 x depth."""
    depths: dict[int, set[int]] = {}
    for cell in cells:
        if cell.shape.width != WIDTH_PER_DEPTH * cell.experiment.depth:
            depths.setdefault(cell.experiment.model.head_dim, set()).add(cell.experiment.depth)
    for head_dim, rounded in sorted(depths.items()):
        depth = max(rounded)
        width = -(-WIDTH_PER_DEPTH * depth // head_dim) * head_dim
        yield (
            f"width: model.head_dim={head_dim} does not divide {WIDTH_PER_DEPTH} x depth at depth {listed(rounded)}, "
            f"so the width is rounded up ({WIDTH_PER_DEPTH * depth} to {width} at depth {depth}): a head_dim that "
            f"divides {WIDTH_PER_DEPTH} rounds none"
        )


def _left_out(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for each range of workers of which some counts do not share a step evenly."""
    lines = set()
    for cell in cells:
        resources, counts = cell.experiment.resources, worker_counts(cell.experiment)
        if len(counts) <= resources.most - resources.fewest:
            of_step = "prompts" if PHASES[cell.experiment.phase].has_reward else "rows"
            lines.add(
                f"workers: of {resources.fewest} to {resources.most} only {listed(counts)} share the {of_step} of a "
                "step evenly, so a cell has one of these (resources.workers)"
            )
    yield from sorted(lines)


def _short_of_gpus(cells: Sequence[Cell], machine: Machine) -> list[str]:
    needs = max(cell.experiment.resources.fewest * cell.experiment.resources.gpus_per_worker for cell in cells)
    if needs <= machine.gpus:
        return []
    present = counted(machine.gpus, "GPU") if machine.gpus else "no GPU"
    return [
        f"GPUs: a cell asks for {needs:g} (resources.workers x resources.gpus_per_worker), and this machine has "
        f"{present}: resources.gpus_per_worker=0 trains on the CPU"
    ]


def _short_of_memory(cells: Sequence[Cell], launch: LaunchSettings, machine: Machine) -> list[str]:
    """Return the warning where the largest cell, or as many cells as run at once, take more than the memory."""
    largest = max(cells, key=training_bytes)
    resources, each = largest.experiment.resources, training_bytes(largest)
    if resources.gpus_per_worker:
        if each <= machine.gpu_memory:
            return []
        where, has, fix = "a GPU", machine.gpu_memory, "lower depth"
    else:
        at_once = machine.cells_at_once(cells, launch.concurrency)
        fits = machine.memory // (each * resources.fewest)
        if at_once <= fits:
            return []
        where, has, fix = "this machine", machine.memory, f"launch.concurrency={fits}" if fits else "lower depth"
        each *= at_once * resources.fewest
    held = counted(each // training_bytes(largest), "worker")
    return [
        f"memory: {held} at once hold at least {file_size(each)} of weights, gradients and optimizer (largest cell: "
        f"{largest.id}), and {where} has {file_size(has)}: {fix}"
    ]


def _storage(cells: Sequence[Cell], storage: Path) -> Iterator[str]:
    try:
        check_writable(storage)
    except UserError as error:
        yield str(error)
        return
    logs = sum(bytes_of_log(cell.experiment, cell.shape, cell.steps) for cell in cells)
    checkpoints = sum(map(checkpoint_bytes, cells))
    free = shutil.disk_usage(next(folder for folder in (storage, *storage.parents) if folder.exists())).free
    if logs + checkpoints > free:
        fix = "research_log.tokens=0" if logs > checkpoints else "checkpoint.keep=1"
        yield (
            f"disk: {file_size(logs)} of loss logs and {file_size(checkpoints)} of checkpoints, and {storage} has "
            f"{file_size(free)} free: {fix} takes less, or choose another --storage"
        )
