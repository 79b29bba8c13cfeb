"""Time that a plan takes, by the speed of runs that finished on this machine.

The speed of a run is the FLOPs of its training and validations over the seconds that they took. The start of Ray and
of each cell, and the reports, come on top.
"""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.format import counted, duration, first_of
from bwlm.model.shape import flops_per_token
from bwlm.phases import PHASES
from bwlm.plan.machine import Machine
from bwlm.plan.spec import Cell, LaunchSettings
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.journal import entries_holding, last_entry


@dataclass(frozen=True)
class _Finished:
    """Finished run, and the cell that it was."""

    folder: ExperimentFolder
    cell: Cell
    step_seconds: float
    """Seconds of its steps, without waits between interrupted launches."""

    @cached_property
    def flops_per_second(self) -> float:
        """FLOPs of steps and validations over their seconds."""
        validations = entries_holding(self.folder.path, "validation_seconds")
        seconds = self.step_seconds + sum(entry.metrics["validation_seconds"] for entry in validations)
        return self.cell.flops_until(self.cell.steps) / seconds


def estimate_time(
    left: Sequence[tuple[Cell, int]], launch: LaunchSettings, storage: Path, machine: Machine | None
) -> dict[str, Any]:
    """Return the seconds that cells take, each from the step that it has reached, and the runs by whose speed.

    Each cell is taken to be as fast as the finished runs that are most like it, the median of several; `rough` is true
    if these have another size or other resources. `unknown` cells have no such run; `seconds` is None if no cell has.
    With a `machine` only its own runs count. None stands for a cluster: then `at_once` is None, and `seconds` are
    those of all cells, one after the other.
    """
    finished = list(_finished_runs(storage, socket.gethostname() if machine else None)) if left else []
    seconds, runs, rough = list[float](), dict[str, None](), False
    for cell, step in left:
        if alike := _most_alike(cell, finished):
            speed = statistics.median(run.flops_per_second for run in alike)
            seconds.append((cell.flops_until(cell.steps) - cell.flops_until(step)) / speed)
            runs |= dict.fromkeys(run.folder.id for run in alike)
            rough |= _unlikeness(cell, alike[0].cell)[:2] != (0.0, False)
    at_once = machine.cells_at_once([cell for cell, _ in left], launch.concurrency) if machine else None
    return {
        "seconds": max(sum(seconds) / (at_once or 1), *seconds) if seconds else None,
        "at_once": at_once,
        "runs": list(runs),
        "rough": rough,
        "unknown": len(left) - len(seconds),
    }


def _finished_runs(storage: Path, host: str | None) -> Iterator[_Finished]:
    """Yield the finished runs below a storage whose records say how fast they were, of one host or of all."""
    for folder in track(list_experiments(storage), "reading runs", "runs"):
        with contextlib.suppress(UserError):  # damaged: other commands say so
            config, status, last = folder.config(), folder.status(), last_entry(folder.path)
            tokens, speed = (last.metrics.get("tokens") if last else None), status.metrics.get("tokens_per_second")
            if status.state == "finished" and tokens and speed and host in (None, folder.last_host()):
                yield _Finished(folder, Cell(folder.id, config.experiment, config.steps), tokens / speed)


def _most_alike(cell: Cell, finished: Sequence[_Finished]) -> list[_Finished]:
    """Return the runs whose speed tells most about a cell's, all equally alike; none of another kind."""
    kind = _kind(cell)
    unlikeness = [(_unlikeness(cell, run.cell), run) for run in finished if _kind(run.cell) == kind]
    least = min((how for how, _ in unlikeness), default=None)
    return [run for how, run in unlikeness if how == least]


def _kind(cell: Cell) -> tuple[bool, bool]:
    """Return what no speed is carried over between: learning from samples or text, GPU or CPU."""
    experiment = cell.experiment
    return PHASES[experiment.phase].has_reward, experiment.resources.gpus_per_worker > 0


def _unlikeness(cell: Cell, other: Cell) -> tuple[float, bool, float]:
    """Return how far two cells are apart: in size first, then in resources, then in the batch."""
    one, two = cell.experiment, other.experiment
    size = abs(math.log(flops_per_token(cell.shape) / flops_per_token(other.shape)))
    batch = abs(math.log(one.budget.batch_tokens / two.budget.batch_tokens))
    return size, one.resources != two.resources, batch


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
