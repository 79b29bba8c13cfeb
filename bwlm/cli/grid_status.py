"""Documents and pages about the state of a grid: `bwlm grid status`, and the cells of a plan."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlm.cli.terminal import say, show, show_sentences, show_table
from bwlm.format import duration, first_of, short_number
from bwlm.paths import FileState, file_state
from bwlm.remote import address_of, working_root

if TYPE_CHECKING:
    from bwlm.grid.cells import PlannedCell
    from bwlm.grid.summary import CellStanding, GridSummary
    from bwlm.plan.spec import Plan

STOPPED_ABOVE = "not trained: the scheduler stopped a run early from which it descends"
_FEW = 8
"""Most cells of a grid that is listed whole, and most waiting cells and logs that are listed; of more, the number."""
_REDRAW_SECONDS = 2.0
_BUCKET_SECONDS = 5.0
"""Seconds between two looks into a bucket."""
_LINE_SECONDS = 60.0
"""Seconds between two lines of `--watch` outside a terminal."""
_SHARE = 0.25
"""Share of its time that `--watch` reads files, at most: a grid may have a thousand folders on a slow network."""


# ---- documents ----


def cells_document(plan: Plan, planned: Sequence[PlannedCell]) -> dict[str, Any]:
    """Return the cells of a grid as scripts see them: the state of each, and what a launch would do with it."""
    from bwlm.grid.summary import cell_standings
    from bwlm.record.researchlog_size import bytes_of_log
    from bwlm.record.starts import starts_of, steps_lost

    cells = [
        {
            "id": p.cell.id, "params": p.cell.parameters, "tokens": p.cell.tokens, "flops": p.cell.flops,
            "log_bytes": bytes_of_log(p.cell.experiment, p.cell.shape, p.cell.steps),
            "state": p.status.state, "reason": STOPPED_ABOVE if known.standing == "not trained" else _reason(p),
            "changed": p.changed, "other_text": p.other_text, "done": p.is_done,
            "step": p.status.step, "steps": p.cell.steps, "metrics": p.status.metrics,
            "standing": known.standing, "holder": known.holder, "log": known.log, **_next(known),
            "steps_lost": steps_lost(starts_of(p.folder.path)),
        }
        for p, known in zip(planned, cell_standings(planned), strict=True)
    ]  # fmt: skip
    return {"grid": plan.name, "cells": cells}


def status_document(plan: Plan, root: Path) -> dict[str, Any]:
    """Return the document of `bwlm grid status --json`: cells with the process that trains each, and a summary."""
    from bwlm.grid.cells import find_cells
    from bwlm.grid.summary import summarize

    planned = find_cells(plan, root)
    return cells_document(plan, planned) | {"summary": summarize(plan, root, planned).to_json()}


def _reason(planned: PlannedCell) -> str:
    """Return why a cell ended as it did, or why `grid run` would refuse it."""
    if planned.changed:
        return f"exists with other settings ({'; '.join(planned.changed)})"
    return _other_text(planned) or planned.other_code or planned.status.reason


def _other_text(planned: PlannedCell) -> str:
    """Return how the source of a cell's text differs from what its run read; '' if it does not."""
    from bwlm.grid.cells import text_of

    if not (read := planned.other_text):
        return ""
    named = text_of(planned.cell.experiment)
    return f"its run read {read}, and the grid names {named}: refused unless its content is the same"


def reasons(cells: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each reason of a grid's cells, with the cells that it holds for."""
    holds_for: dict[str, list[str]] = {}
    for cell in cells:
        holds_for.setdefault(cell["reason"], []).append(cell["id"])
    return [f"{first_of(ids)}: {reason}" for reason, ids in holds_for.items() if reason]


def _next(cell: CellStanding) -> dict[str, Any]:
    """Return what `bwlm grid run` does with a cell: `action`, and the step from which it resumes."""
    from bwlm.record.checkpoint import checkpoint_steps

    planned = cell.planned
    steps = [] if cell.is_done else checkpoint_steps(planned.folder.checkpoints)
    if planned.changed:
        action = "changed"
    elif cell.is_done:
        action = "not trained" if cell.standing == "not trained" else "done"
    elif steps and planned.other_code:
        action = "other code"
    elif cell.standing == "running":
        action = "running"
    else:
        action = "resume" if steps else "restart" if planned.status.step else "new"
    return {"action": action, "from_step": steps[-1] if action == "resume" else None}


def action_words(cell: dict[str, Any]) -> str:
    """Return what a launch does with a cell of a document, for a table: `resumes from step 400`, `changed: lr`."""
    if cell["action"] == "changed":
        return f"changed: {', '.join(field.partition(':')[0] for field in cell['changed'])}"
    words = {"resume": f"resumes from step {cell['from_step']}", "restart": "begins again", "running": "runs now"}
    return words.get(cell["action"], str(cell["action"]))


# ---- pages ----


def print_status(plan: Plan, root: Path, summary: GridSummary, everything: bool) -> None:
    """Print a summary, then the cells that are not done; with `everything`, and of a small grid, all cells."""
    from bwlm.record.catalog.rows import load_readable

    everything = everything or len(summary.cells) <= _FEW
    show(f"{plan.name}: {summary.counts_words()}")
    _print_accounts(summary)
    listed = [cell for cell in summary.cells if everything or not cell.is_done]
    waiting = [cell.planned.cell.id for cell in listed if cell.standing == "waiting"]
    if few := len(waiting) <= _FEW or everything:
        waiting = []
    listed = [cell for cell in listed if few or cell.standing != "waiting"]
    known, left_out = load_readable(one.planned.folder for one in listed if one.planned.folder.exists())
    for line in left_out:
        say(line)
    _print_cells(listed, {row.id: row for row in known})
    if waiting:
        show(f"waiting: {first_of(waiting)}")
    _print_logs(summary.cells, everything)
    show_sentences(*reasons([_failed(cell) for cell in listed]))
    if not any(one.planned.folder.exists() for one in summary.cells):
        show(
            f"no cell of {plan.name} has begun in {address_of(root)}{'' if root.exists() else ', which does not exist'}"
        )


def _print_accounts(summary: GridSummary) -> None:
    """Print pace, time left, cost and launches, a line each, as far as they are known."""
    usage, pace = summary.usage, summary.cells_per_hour
    if pace and not summary.is_complete:
        time_left = f"about {duration(summary.seconds_left or 0)} left"
        at = f"at {pace:.3g} cells an hour" if summary.living else f"at the last launch's {pace:.3g} cells an hour"
        speed = f", now {summary.tokens_per_second:,.0f} tokens/s" if summary.tokens_per_second else ""
        show(f"{time_left}: {short_number(summary.flops_left)} FLOPs {at}{speed}")
    if usage.worker_seconds:
        hours = {"worker": usage.worker_seconds, "CPU": usage.cpu_seconds, "GPU": usage.gpu_seconds}
        spent = [f"{_hours(seconds)} {name} hours" for name, seconds in hours.items() if seconds]
        money = [f"{summary.money:.2f} by launch.price"] if summary.money is not None else []
        show(f"cost so far: {', '.join([f'{short_number(summary.flops)} FLOPs', *spent, *money])}")
    show(*summary.resumed_words())
    for launch in summary.living:
        assert launch.holder is not None
        show(f"launch: {launch.holder} runs it {launch.holder.since_words}")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2g}" if seconds < 36_000 else f"{seconds / 3600:,.0f}"


def _print_cells(cells: Sequence[CellStanding], known: dict[str, Any]) -> None:
    from bwlm.record.catalog.rows import FIGURES, cell_columns

    header = ["id", "state", "step", "held by", *FIGURES]
    rows = []
    for cell in cells:
        planned, row = cell.planned, known.get(cell.planned.cell.id)
        if planned.folder.exists() and row is None:
            continue  # left out: its line says why
        figures = cell_columns(row, FIGURES) if row else [""] * len(FIGURES)
        step = f"{planned.status.step}/{planned.cell.steps}" if planned.status.step else ""
        rows.append([planned.cell.id, cell.standing, step, _holder_words(cell), *figures])
    if rows:
        least = ("loss", "bpb forward", "bpb backward")
        show_table(header, rows, names=("id",), least=least)


def _holder_words(cell: CellStanding) -> str:
    if cell.holder is None:
        return ""
    since = duration(max(0.0, time.time() - cell.holder["since"]))
    return f"{cell.holder['host']}:{cell.holder['pid']}, {since}"


def _print_logs(cells: Sequence[CellStanding], everything: bool) -> None:
    """Print where the logs of running and failed cells are."""
    logs = [(cell.planned.cell.id, cell.log) for cell in cells if cell.log]
    failed = [cell.planned.folder for cell in cells if cell.standing == "failed"]
    logs += [(folder.id, str(error)) for folder in failed if (error := folder.path / "error.txt").exists()]
    for name, path in logs if everything else logs[:_FEW]:
        show(f"log of {name}: {path}")
    if len(logs) > _FEW and not everything:
        show(f"{len(logs) - _FEW} more logs: --all")


def _failed(cell: CellStanding) -> dict[str, str]:
    return {"id": cell.planned.cell.id, "reason": _reason(cell.planned) if cell.standing == "failed" else ""}


# ---- watching ----


class Watcher:
    """Repeated reader of a grid's files. A cell that has finished is read once, unless its status.json changes."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self._plan, self._root = plan, root
        self._finished: dict[str, tuple[FileState | None, PlannedCell]] = {}
        """Cells that have finished, each with the state in which its status.json was then."""
        self._seconds = 0.0

    def look(self) -> GridSummary:
        """Return the summary of this moment."""
        from bwlm.grid.cells import find_cells
        from bwlm.grid.summary import summarize
        from bwlm.storage.opened import refresh

        began = time.monotonic()
        refresh(self._root)
        states = {cell.id: _file_state(self._root / cell.id / "status.json") for cell in self._plan.cells}
        known = {name: one for name, (state, one) in self._finished.items() if state == states[name]}
        rest = replace(self._plan, cells=tuple(cell for cell in self._plan.cells if cell.id not in known))
        known |= {one.cell.id: one for one in find_cells(rest, self._root)}
        self._finished = {name: (states[name], one) for name, one in known.items() if one.status.state == "finished"}
        summary = summarize(self._plan, self._root, [known[cell.id] for cell in self._plan.cells])
        self._seconds = time.monotonic() - began
        return summary

    def wait(self, seconds: float) -> None:
        """Wait so many seconds, or longer if a look takes long, or asks a bucket."""
        least = _BUCKET_SECONDS if working_root(self._root) else seconds
        time.sleep(max(least, self._seconds / _SHARE))


def _file_state(path: Path) -> FileState | None:
    with contextlib.suppress(OSError):
        return file_state(path)
    return None


def watch_status(plan: Plan, root: Path, everything: bool) -> None:
    """Show the status until nothing is left to train, or Ctrl-C: redrawn on a terminal, elsewhere line by line."""
    watcher = Watcher(plan, root)
    with contextlib.suppress(KeyboardInterrupt):
        if not sys.stdout.isatty():
            return _print_lines(plan, watcher)
        _redraw(plan, root, watcher, everything)
    return print_status(plan, root, watcher.look(), everything)


def _redraw(plan: Plan, root: Path, watcher: Watcher, everything: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False, transient=True) as live:
        while not (summary := watcher.look()).is_complete:
            page = io.StringIO()
            # also what goes to stderr: a second live line there would move the cursor of this one
            with contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
                print_status(plan, root, summary, everything)
            live.update(Text(page.getvalue().rstrip(), overflow="fold"), refresh=True)
            watcher.wait(_REDRAW_SECONDS)


def _print_lines(plan: Plan, watcher: Watcher) -> None:
    before, told = None, 0.0
    while True:
        summary = watcher.look()
        if summary.counts != before or time.monotonic() - told >= _LINE_SECONDS:
            left = f", about {duration(summary.seconds_left)} left" if summary.living and summary.seconds_left else ""
            print(f"{time.strftime('%H:%M:%S')} {plan.name}: {summary.counts_words()}{left}", flush=True)
            before, told = summary.counts, time.monotonic()
        if summary.is_complete:
            return
        watcher.wait(_REDRAW_SECONDS)
