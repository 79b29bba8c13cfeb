"""Summary of a grid from its files alone: states of its cells, pace, time left, cost. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.format import counted, duration, first_of, short_number
from bwlm.grid.cells import PlannedCell, find_cells, without_parent
from bwlm.paths import read_json
from bwlm.plan.spec import LaunchSettings, Plan
from bwlm.record.experiment import LEASE, WORKER
from bwlm.record.grids import grid_folder
from bwlm.record.launches import LaunchEntry, Usage, launches_of, total_of
from bwlm.record.lease import present_holder
from bwlm.record.starts import Start, has_changed_workers, starts_of, steps_lost, worker_words

STANDINGS = ("finished", "stopped early", "running", "silent", "stopped", "failed", "waiting", "not trained")
"""States of cells in a summary. Stopped early: by the scheduler. Silent: its worker shows no sign of life. Stopped:
interrupted, it resumes. Not trained: the scheduler stopped a run from which it descends."""
DONE = ("finished", "stopped early", "not trained")


@dataclass(frozen=True)
class CellStanding:
    """Cell of a grid, its state, and who trains it."""

    planned: PlannedCell
    standing: str
    holder: dict[str, Any] | None
    """Process that holds the lease: host, pid, since (seconds since the epoch), silent."""
    log: str | None
    """Log of the worker that trains it, `host:path`."""

    @property
    def is_done(self) -> bool:
        """True if a launch leaves the cell as it is."""
        return self.standing in DONE


def cell_standings(planned: Sequence[PlannedCell]) -> list[CellStanding]:
    """Return the state of each cell, of cells that are not done with the process that holds them."""
    out = without_parent(list(planned))
    return [_standing(one, one.cell.id in out) for one in planned]


def _standing(planned: PlannedCell, is_out: bool) -> CellStanding:
    if is_out:
        return CellStanding(planned, "not trained", None, None)
    if planned.is_done:
        standing = "finished" if planned.status.state == "finished" else "stopped early"
        return CellStanding(planned, standing, None, None)
    held = present_holder(planned.folder.path / LEASE) if planned.folder.exists() else None
    if held is None:
        return CellStanding(planned, planned.status.state, None, None)
    holder, is_silent = held
    process = {"host": holder.host, "pid": holder.pid, "since": holder.since, "silent": is_silent}
    return CellStanding(planned, "silent" if is_silent else "running", process, _log_of(planned, process))


def _log_of(planned: PlannedCell, process: dict[str, Any]) -> str | None:
    try:
        noted = read_json(planned.folder.path / WORKER)
        is_its = (noted["host"], noted["pid"]) == (process["host"], process["pid"])
        return f"{noted['host']}:{noted['log']}" if is_its else None
    except (UserError, OSError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class GridSummary:
    """States of a grid's cells, and what its launches have used."""

    cells: list[CellStanding]
    launches: list[LaunchEntry]
    settings: LaunchSettings

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of cells by state, without states that no cell is in."""
        found = Counter(cell.standing for cell in self.cells)
        return {standing: found[standing] for standing in STANDINGS if found[standing]}

    @property
    def is_complete(self) -> bool:
        """True if nothing is left to train."""
        return all(cell.is_done for cell in self.cells)

    @cached_property
    def flops(self) -> float:
        """FLOPs that the cells have trained until now."""
        return sum(_flops_done(cell.planned) for cell in self.cells)

    @cached_property
    def flops_left(self) -> float:
        """FLOPs that are left to train."""
        left = [cell.planned for cell in self.cells if not cell.is_done]
        return sum(one.cell.flops_until(one.cell.steps) - _flops_done(one) for one in left)

    @cached_property
    def usage(self) -> Usage:
        """Sum of what all launches have used."""
        return total_of([launch.usage for launch in self.launches])

    @property
    def living(self) -> list[LaunchEntry]:
        """Launches that run now."""
        return [launch for launch in self.launches if launch.holder]

    @cached_property
    def flops_per_second(self) -> float | None:
        """Pace of the launches that run, or else of the last one; None before a cell has trained."""
        paced = self.living or self.launches[-1:]
        pace = sum(one.usage.pace_flops / one.usage.pace_seconds for one in paced if one.usage.pace_seconds)
        return pace or None

    @property
    def cells_per_hour(self) -> float | None:
        """Cells of the grid's mean size that the pace finishes in an hour."""
        whole = sum(cell.planned.cell.flops_until(cell.planned.cell.steps) for cell in self.cells)
        return 3600 * self.flops_per_second * len(self.cells) / whole if self.flops_per_second else None

    @property
    def tokens_per_second(self) -> float:
        """Speed of all running cells together."""
        running = [cell.planned.status.metrics for cell in self.cells if cell.standing == "running"]
        return sum(metrics.get("tokens_per_second", 0.0) for metrics in running)

    @property
    def seconds_left(self) -> float | None:
        """Time until the grid is done, at this pace."""
        return self.flops_left / self.flops_per_second if self.flops_per_second else None

    @cached_property
    def starts(self) -> dict[str, list[Start]]:
        """Starts of each cell that has begun."""
        return {cell.planned.cell.id: starts_of(cell.planned.folder.path) for cell in self.cells}

    @property
    def money(self) -> float | None:
        """Cost of all launches; None if no price is set."""
        price = self.settings.price
        return self.usage.cost(price.gpu_hour, price.cpu_hour) if price.gpu_hour or price.cpu_hour else None

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON."""
        used = {"worker": self.usage.worker_seconds, "cpu": self.usage.cpu_seconds, "gpu": self.usage.gpu_seconds}
        return {
            "counts": self.counts,
            "complete": self.is_complete,
            "flops": self.flops,
            "flops_left": self.flops_left,
            "cells_per_hour": self.cells_per_hour,
            "tokens_per_second": self.tokens_per_second,
            "seconds_left": self.seconds_left,
            **{f"{name}_hours": seconds / 3600 for name, seconds in used.items()},
            "launch_hours": self.usage.seconds / 3600,
            "money": self.money,
            "resumes": sum(max(0, len(starts) - 1) for starts in self.starts.values()),
            "steps_lost": sum(map(steps_lost, self.starts.values())),
            "launches": [_launch_json(launch) for launch in self.living],
        }

    # ---- in words ----

    def counts_words(self) -> str:
        """Return `3 of 8 cells finished, 2 running, 3 waiting`."""
        others = [f"{number} {name}" for name, number in self.counts.items() if name != "finished"]
        return ", ".join([f"{self.counts.get('finished', 0)} of {counted(len(self.cells), 'cell')} finished", *others])

    def resumed_words(self) -> list[str]:
        """Return a line on the cells that were resumed, and one on those whose number of workers changed."""
        resumed = {cell: starts for cell, starts in self.starts.items() if len(starts) > 1}
        changed = [f"{cell} ({worker_words(of)})" for cell, of in resumed.items() if has_changed_workers(of)]
        lost = sum(map(steps_lost, resumed.values()))
        return [
            *([f"resumed: {counted(len(resumed), 'cell')}, {counted(lost, 'step')} lost"] if resumed else []),
            *([f"other numbers of workers on the way: {first_of(changed)}"] if changed else []),
        ]

    def left_words(self) -> str:
        """Return the states of the cells, and the FLOPs and the time that are left."""
        parts = [self.counts_words(), f"{short_number(self.flops_left)} FLOPs left"]
        if self.seconds_left:
            parts.append(f"about {duration(self.seconds_left)} at this pace")
        return ", ".join(parts)


def _flops_done(planned: PlannedCell) -> float:
    return planned.cell.flops_until(min(planned.status.step, planned.cell.steps))


def _launch_json(launch: LaunchEntry) -> dict[str, Any]:
    assert launch.holder is not None
    return {"name": launch.name, "host": launch.holder.host, "pid": launch.holder.pid, "since": launch.holder.since}


def summarize(plan: Plan, storage: Path, planned: Sequence[PlannedCell] | None = None) -> GridSummary:
    """Return the summary of a grid; `planned` are its cells, if they are known already."""
    cells = cell_standings(find_cells(plan, storage) if planned is None else planned)
    return GridSummary(cells, launches_of(grid_folder(storage, plan.name)), plan.launch)
