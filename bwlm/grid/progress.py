"""The live table of a launch on stderr: running cells, waiting cells, time left."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bwlm.format import clock, short_number, wrapped
from bwlm.plan.spec import Cell
from bwlm.progress import working
from bwlm.record.experiment import Status

_LINE_SECONDS = 30.0
"""Least seconds between two lines of a single experiment, outside a terminal; validations get a line at once."""
_GRID_SECONDS = 300.0
"""Least seconds between two lines of a grid, outside a terminal; cells that end get a line at once."""
_REPORT_SECONDS = 1.0
"""Seconds that the report of a cell takes, and that of the grid, about: charts on two busy cores."""

_NO_STEP = "workers start, no step yet"
_BAR, _SHORTEST_BAR = 20, 5
"""Columns of a cell's bar; in a narrow terminal it is shorter, and left out below the shortest."""
_GAP = 2
"""Columns between those of the table."""
_ENDED = 3
"""Cells whose ends are shown below the running ones, the newest last."""
_BESIDES = 4
"""Lines of the screen besides running cells and ends: counts, header, cells that do not fit, the cursor's."""
_NAMED = 3
"""Running cells that a line of a grid names, outside a terminal."""

_DETAILS = (
    (
        ("train_loss", "loss of this step {:.3f}"),
        ("train_loss_forward", "forward {:.3f}"),
        ("train_loss_backward", "backward {:.3f}"),
        ("sample_tokens", "{:.1f} tokens a sample"),
        ("finished", "{:.0%} finished"),
        ("entropy", "entropy {:.2f}"),
        ("grad_norm", "grad norm {:.3g}"),
    ),
    (
        ("lr_matrix", "learning rates: matrix {:.3g}"),
        ("lr_embedding", "embedding {:.3g}"),
        ("lr_unembedding", "unembedding {:.3g}"),
    ),
    (
        ("mfu", "MFU {:.1%}"),
        ("memory_bytes", "memory {}B"),
        ("research_log_bytes", "records {}B"),
        ("disk_free_bytes", "disk {}B free"),
        ("tokens", "{} tokens"),
        ("flops", "{} FLOPs"),
    ),
)
"""Lines of metrics with their words; figures without a format get a unit prefix (k, M, G, ..)."""


class ProgressDisplay:
    """Table that redraws itself in a terminal; elsewhere lines: one when a cell ends, some while cells run."""

    def __init__(self, cells: tuple[Cell, ...], states: Mapping[str, Status], in_detail: bool = False) -> None:
        """Show the cells of all phases; if `in_detail`, as for one alone, one runs at a time with all its figures."""
        self._cells = {cell.id: cell for cell in cells}
        self._in_detail = in_detail or len(cells) == 1
        self._ended = {name: status for name, status in states.items() if status.ended}
        self._flops = {cell.id: cell.flops_until(cell.steps) for cell in cells}
        """FLOPs of each cell to its end: of a thousand cells too many to count at each report."""
        self._newest_ends: deque[str] = deque(maxlen=_ENDED)
        self._running: dict[str, dict[str, Any]] = {}
        self._console = Console(stderr=True)
        self._began = self._told = self._newest = self._paced_from = time.monotonic()
        self._heard: dict[str, float] = {}
        """Time of each cell's newest report."""
        self._done_before = self._flops_done()
        self._until_report = contextlib.ExitStack()
        self._live = Live(console=self._console, get_renderable=self._picture, refresh_per_second=2, transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._until_report.enter_context(working(_NO_STEP))
        return self

    def __exit__(self, *_: object) -> None:
        self._until_report.close()
        if self._console.is_terminal:
            self._live.stop()

    def began(self, cell: str, step: int) -> None:
        """Add a cell to the running ones; `step` is the step that it resumes from."""
        self._ended.pop(cell, None)
        if cell not in self._running:
            self._running[cell] = {"step": step}
            self._done_before += self._cells[cell].flops_until(step)

    def moved(self, cell: str, result: dict[str, Any]) -> None:
        """Show a cell's newest step."""
        self._until_report.close()
        self._running[cell] = self._running.get(cell, {}) | result
        if not self._heard:  # the pace of steps, without the start of workers and the warm-up of the first step
            self._paced_from, self._done_before = time.monotonic(), self._flops_done()
        self._newest = self._heard[cell] = time.monotonic()
        if self._in_detail and ("val_bpb" in result or time.monotonic() - self._told > _LINE_SECONDS):
            self._line(_step_words(result, self._cells[cell].steps), below=_details(self._running[cell]))
        elif not self._in_detail and time.monotonic() - self._told > _GRID_SECONDS:
            self._line(f"{len(self._ended)}/{len(self._cells)} {self._running_words()}")
        if self._in_detail and not self._console.is_terminal:
            self._say_what_takes_long(cell, result)

    def _running_words(self) -> str:
        """Return where the running cells are, of many where some of them are."""
        at = [f"{name} at step {now['step']}/{self._cells[name].steps}" for name, now in self._running.items()]
        return ", ".join(at[:_NAMED]) + (f" and {len(at) - _NAMED} more" if len(at) > _NAMED else "")

    def _say_what_takes_long(self, cell: str, result: Mapping[str, Any]) -> None:
        """Show until the next report what a single experiment does besides its steps."""
        if result.get("scoring"):
            self._until_report.enter_context(working(f"scoring the checkpoint of step {result['step']:,} on tasks"))
        elif self._validates_after(cell, result["step"]):
            self._until_report.enter_context(working(f"step {result['step'] + 1:,} and its validation"))

    def broke_off(self, cell: str, step: int) -> None:
        """Show that a cell's worker died or was asked to end: another worker resumes from its last checkpoint."""
        self._line(f"{cell}: broke off at step {step}, goes on", also_above_the_table=True)

    def warned(self, cell: str, warning: str) -> None:
        """Print a warning above the table, so that it stays."""
        self._line(f"warning: {cell}: {warning}", also_above_the_table=True)

    def ended(self, cell: str, status: Status) -> None:
        """Show how a cell ended."""
        self._running.pop(cell, None)
        self._ended[cell] = status
        self._newest = time.monotonic()
        bpb = f", val_bpb {status.metrics['val_bpb']:.4f}" if "val_bpb" in status.metrics else ""
        bpb += f", val_reward {status.metrics['val_reward']:.3f}" if "val_reward" in status.metrics else ""
        reason = f" ({status.reason})" if status.reason else ""
        self._newest_ends.append(f"{cell}: {status.state}{bpb}")
        self._line(f"{len(self._ended)}/{len(self._cells)} {cell}: {status.state}{reason}{bpb}")

    def _line(self, text: str, also_above_the_table: bool = False, below: Iterable[str] = ()) -> None:
        if self._console.is_terminal and not also_above_the_table:
            return
        self._told = time.monotonic()
        left = self._seconds_left()
        remaining = f", about {clock(left)} left" if left else ""
        for line in (text + remaining, *(f"  {detail}" for detail in below)):
            shown = wrapped(line, self._console.width) if self._console.is_terminal else line
            self._console.print(shown, highlight=False, markup=False, soft_wrap=True)

    def _flops_done(self) -> float:
        running = {name: int(result["step"]) for name, result in dict(self._running).items()}
        ended = sum(self._flops[name] for name in self._ended if name not in running)
        return ended + sum(self._cells[name].flops_until(step) for name, step in running.items())

    def _seconds_left(self) -> float | None:
        """Return the time left at the pace from the first report to the newest; None before, and once it is over."""
        total = sum(self._flops.values())
        done = self._flops_done()
        fresh = done - self._done_before
        if fresh <= 0 or len(self._ended) == len(self._cells):
            return None
        ahead = (self._newest - self._paced_from) * (total - done) / fresh + _REPORT_SECONDS * (len(self._cells) + 1)
        left = ahead - (time.monotonic() - self._newest)
        return left if left > 0 else None

    def _picture(self) -> Group:
        """Return the table: as many running cells as fit on the screen, those first that began first."""
        every = dict(self._running)
        ends = [Text(_ending(line, self._console.width), style="dim") for line in self._newest_ends]
        room = max(1, self._console.height - len(ends) - _BESIDES)
        running = dict(list(every.items())[: room if len(every) > room else None])
        single = every.values() if self._in_detail else ()
        details = [_fitting(detail, self._console.width) for result in single for detail in _details(result)]
        more = [Text(f"and {len(every) - len(running)} more running", style="dim")] if len(running) < len(every) else []
        below = [*(Text(detail, style="dim") for detail in details), *more, *([] if self._in_detail else ends)]
        return Group(self._head(every), self._table(running), *below)

    def _table(self, running: Mapping[str, dict[str, Any]]) -> Table:
        learnt = "reward" if any("reward" in result for result in running.values()) else "loss"
        header = ("cell", "step", learnt, "val bpb", "tokens/s")
        rows = [self._row(name, result) for name, result in running.items()]
        lengths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        bar = min(_BAR, self._console.width - sum(lengths) - _GAP * (len(header) + 1))
        if bar < _SHORTEST_BAR:  # figures are never cut, and the ends of ids differ
            bar, room = 0, self._console.width - sum(lengths[1:]) - _GAP * len(header)
            rows = [(_ending(name, room), *figures) for name, *figures in rows]
        table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim")
        for name in ("cell", "step", *([""] if bar else []), learnt, "val bpb", "tokens/s"):
            table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
        for (name, step, *figures), result in zip(rows, running.items(), strict=True):
            drawn = [ProgressBar(self._cells[result[0]].steps, result[1]["step"], width=bar)] if bar else []
            table.add_row(Text(name), step, *drawn, *figures)
        return table

    def _head(self, running: Mapping[str, dict[str, Any]]) -> Text:
        """Return the first line: the number of cells in each state, unless there is one cell, and the time."""
        left, gone = self._seconds_left(), f"{clock(time.monotonic() - self._began)} gone"
        times = [gone, *([f"about {clock(left)} left"] if left is not None else [])]
        if not self._heard and len(self._ended) < len(self._cells):
            times.append(_NO_STEP)
        if len(self._cells) == 1:
            return Text(" · ".join(times))
        failed = sum(status.state == "failed" for status in self._ended.values())
        waiting = len(self._cells) - len(self._ended) - len(running)
        return Text.assemble(
            (f"{len(self._ended) - failed} done", "green"),
            (f" · {failed} failed" if failed else "", "red"),
            " · ".join([f" · {len(running)} running", f"{waiting} waiting", *times]),
        )

    def _row(self, name: str, result: dict[str, Any]) -> tuple[str, ...]:
        shown = [
            format(result[key], style) if key in result else "–"
            for key, style in ((_learnt(result), ".3f"), ("val_bpb", ".4f"), ("tokens_per_second", ",.0f"))
        ]
        if result.get("scoring"):
            shown[1] = "scoring"
        elif self._is_validating(name, result):
            shown[1] = "validating"
        return (name, f"{result['step']}/{self._cells[name].steps}", *shown)

    def _is_validating(self, name: str, result: dict[str, Any]) -> bool:
        """Return whether the step after a cell's newest report is over, as far as its pace tells, and is validated."""
        silent = time.monotonic() - self._heard.get(name, self._began)
        return silent > result.get("step_seconds", math.inf) and self._validates_after(name, result["step"])

    def _validates_after(self, name: str, step: int) -> bool:
        """Return whether the next step of a cell ends with a validation."""
        cell = self._cells[name]
        every = cell.experiment.evaluation.every
        return step + 1 == cell.steps or (step < cell.steps and bool(every) and (step + 1) % every == 0)


def _ending(name: str, room: int) -> str:
    """Return the last characters of a name that is too long for `room` columns."""
    return name if len(name) <= room else f"…{name[1 - max(room, 2) :]}"


def _fitting(parts: str, width: int) -> str:
    """Return a line without its last parts, if it is too long with them."""
    while len(parts) > width and " · " in parts:
        parts = parts.rpartition(" · ")[0]
    return parts


def _learnt(result: Mapping[str, Any]) -> str:
    """Return the name of the metric that shows learning: in RL the reward, since a policy-gradient loss does not."""
    return "reward" if "reward" in result else "train_loss_smooth"


def _details(result: Mapping[str, Any]) -> list[str]:
    """Return the further lines of a single experiment: its losses, its learning rates, its use of the hardware."""
    if "reward" in result:
        result = {name: value for name, value in result.items() if not name.startswith("train_loss")}
    lines = []
    for parts in _DETAILS:
        known = [(words, result[key]) for key, words in parts if key in result]
        shown = [words.format(value if ":" in words else short_number(value)) for words, value in known]
        lines += [" · ".join(shown)] if shown else []
    return lines


def _step_words(result: Mapping[str, Any], steps: int) -> str:
    """Return a result in words: `step 120/400, loss 3.412, val_bpb 2.3100, 23,456 tokens/s`."""
    learnt = _learnt(result)
    named = {learnt: "reward {:.3f}" if learnt == "reward" else "loss {:.3f}"}
    named |= {"val_bpb": "val_bpb {:.4f}", "val_reward": "val_reward {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
    figures = [words.format(result[key]) for key, words in named.items() if key in result]
    return ", ".join([f"step {result['step']:,}/{steps:,}", *figures])
