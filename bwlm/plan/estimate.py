"""Time that a plan takes, by the speed of runs that finished on this machine.

The speed of a run is the FLOPs of its training and validations over the seconds that they took. The start of Ray and
of each cell, and the reports, come on top.
"""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.format import counted, duration, first_of
from bwlm.model.shape import flops_per_token
from bwlm.paths import read_json
from bwlm.phases import PHASES
from bwlm.plan.machine import Machine
from bwlm.plan.spec import Cell, LaunchSettings
from bwlm.progress import track
from bwlm.record.experiment import WORKER, ExperimentFolder, list_experiments
from bwlm.record.journal import entries_holding, last_entry


class _Load(NamedTuple):
    """Load of a cell, on which its speed depends: cells with equal loads are equally fast."""

    has_reward: bool
    on_gpus: bool
    flops_per_token: int
    resources: ResourceSettings
    batch_tokens: int


@dataclass(frozen=True)
class _Finished:
    """Finished run, and the cell that it was."""

    folder: ExperimentFolder
    cell: Cell
    step_seconds: float
    """Seconds of its steps, without waits between interrupted launches."""

    def flops_per_second(self) -> float:
        """Return the FLOPs of steps and validations over their seconds; reads the journal."""
        validations = entries_holding(self.folder.path, "validation_seconds")
        seconds = self.step_seconds + sum(entry.metrics["validation_seconds"] for entry in validations)
        return self.cell.flops_until(self.cell.steps) / seconds


@dataclass(frozen=True)
class _Speed:
    """Speed of the runs that tell most about a load."""

    flops_per_second: float
    """Median of the runs."""
    runs: list[str]
    rough: bool
    """True if their size or their resources are others."""


def estimate_time(
    left: Sequence[tuple[Cell, int]], launch: LaunchSettings, storage: Path, machine: Machine | None
) -> dict[str, Any]:
    """Return the seconds that cells take, each from the step that is given with it, and the runs by whose speed.

    Each cell is taken to be as fast as the finished runs that are most like it, the median of several; `rough` is true
    if these have another size or other resources. `unknown` cells have no such run; `seconds` is None if no cell has.
    With a `machine` only its own runs count. None stands for a cluster: then `at_once` is None, and `seconds` are
    those of all cells, one after the other.
    """
    finished = _by_load(_finished_runs(storage, socket.gethostname() if machine else None)) if left else {}
    loads = [_load(cell) for cell, _ in left]
    speeds = {load: _speed(load, finished) for load in dict.fromkeys(loads)}
    seconds = [
        (cell.flops_until(cell.steps) - cell.flops_until(step)) / speed.flops_per_second
        for (cell, step), load in zip(left, loads, strict=True)
        if (speed := speeds[load])
    ]
    known = [speed for speed in speeds.values() if speed]
    at_once = machine.cells_at_once([cell for cell, _ in left], launch.concurrency) if machine else None
    return {
        "seconds": max(sum(seconds) / (at_once or 1), *seconds) if seconds else None,
        "at_once": at_once,
        "runs": list(dict.fromkeys(run for speed in known for run in speed.runs)),
        "rough": any(speed.rough for speed in known),
        "unknown": len(left) - len(seconds),
    }


def _finished_runs(storage: Path, host: str | None) -> Iterator[_Finished]:
    """Yield the finished runs below a storage whose records say how fast they were, of one host or of all."""
    for folder in track(list_experiments(storage), "reading runs", "runs"):
        with contextlib.suppress(UserError):  # damaged: other commands say so
            config, status, last = folder.config(), folder.status(), last_entry(folder.path)
            tokens, speed = (last.metrics.get("tokens") if last else None), status.metrics.get("tokens_per_second")
            if status.state == "finished" and tokens and speed and host in (None, _host_of(folder)):
                yield _Finished(folder, Cell(folder.id, config.experiment, config.steps), tokens / speed)


def _host_of(folder: ExperimentFolder) -> str:
    """Return the name of the machine that trained a run; if the run does not say it, of the one that held it last."""
    try:
        return str(read_json(folder.path / WORKER)["host"])
    except (UserError, OSError, KeyError, TypeError):
        return folder.last_host()


def _load(cell: Cell) -> _Load:
    experiment = cell.experiment
    has_reward, on_gpus = PHASES[experiment.phase].has_reward, experiment.resources.gpus_per_worker > 0
    flops = flops_per_token(cell.shape)
    return _Load(has_reward, on_gpus, flops, experiment.resources, experiment.budget.batch_tokens)


def _by_load(finished: Iterable[_Finished]) -> dict[_Load, list[_Finished]]:
    by_load: dict[_Load, list[_Finished]] = {}
    for run in finished:
        by_load.setdefault(_load(run.cell), []).append(run)
    return by_load


def _speed(load: _Load, finished: Mapping[_Load, list[_Finished]]) -> _Speed | None:
    """Return the speed of the runs that tell most about a load, all equally alike; None if all are of another kind.

    No speed is carried over between learning from samples and from text, or between a GPU and a CPU.
    """
    unlikeness = {other: _unlikeness(load, other) for other in finished if other[:2] == load[:2]}
    least = min(unlikeness.values(), default=None)
    if least is None:
        return None
    # in the order in which they were found
    alike = [run for other, runs in finished.items() if unlikeness.get(other) == least for run in runs]
    speed = statistics.median(run.flops_per_second() for run in alike)
    return _Speed(speed, [run.folder.id for run in alike], least[:2] != (0.0, False))


def _unlikeness(one: _Load, other: _Load) -> tuple[float, bool, float]:
    """Return how far two loads are apart: in size first, then in resources, then in the batch."""
    size = abs(math.log(one.flops_per_token / other.flops_per_token))
    batch = abs(math.log(one.batch_tokens / other.batch_tokens))
    return size, one.resources != other.resources, batch


def time_words(estimate: dict[str, Any]) -> str:
    """Return the result of `estimate_time` as a line of text; '' if nothing is left to train."""
    if estimate["seconds"] is None:
        return "time: no estimate until a first cell has run here" if estimate["unknown"] else ""
    at_once = estimate["at_once"]
    how = "cells one after the other" if at_once is None else f"{counted(at_once, 'cell')} at once"
    seconds, runs = duration(estimate["seconds"]), first_of(estimate["runs"])
    words = f"time: about {seconds} for what is left, {how}, at the speed of {runs}"
    if estimate["rough"]:
        words += "; a rough guess, since nothing of this size and these resources has finished here"
    if estimate["unknown"]:
        words += f"; without {counted(estimate['unknown'], 'cell')} of a kind that has not finished here yet"
    return words
