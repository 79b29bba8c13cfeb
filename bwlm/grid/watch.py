"""Watch over a launch: what its cells use, limits of time and money, requests to stop, stalled cells, notices.

A thread looks every second. A launch that is to stop gets SIGTERM from its own process: so its cells save exactly as
if the machine had been preempted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bwlm.credentials import masked
from bwlm.errors import BwlmError, Paused, UserError, first_line
from bwlm.format import duration
from bwlm.grid.notify import Notifier
from bwlm.grid.summary import summarize
from bwlm.plan.spec import Cell, LaunchSettings, Plan
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import grid_folder, run_command
from bwlm.record.journal import NAME
from bwlm.record.launches import LaunchRecord, Usage, launches_of, recorded_launch, total_of
from bwlm.storage.opened import fetch, refresh
from bwlm.train.termination import TERMINATED

_LOOK_SECONDS = 1.0
_WRITE_SECONDS = 10.0
"""Seconds between two looks at costs and stalls, after which the usage is written, and a bucket is asked."""

Show = Callable[[str], None]


@dataclass
class _Running:
    """Cell on its workers."""

    cell: Cell
    first_step: int
    step: int
    began: float = field(default_factory=time.monotonic)
    journal_bytes: int = -1
    moved: float = field(default_factory=time.monotonic)
    """Time of the last report, or of the last look at which the journal had grown."""
    workers: int = 0
    """Workers that train it now: of a group none until its first report, since it may wait for a node."""
    is_scoring: bool = False
    is_stalled: bool = False

    def __post_init__(self) -> None:
        resources = self.cell.experiment.resources
        self.workers = 0 if resources.drives_group else resources.fewest


class LaunchWatch:
    """Accounts of a launch, which the callbacks of its cells keep, and the thread that looks at them."""

    def __init__(self, plan: Plan, storage: Path, record: LaunchRecord | None, show: Show) -> None:
        """Begin; without a `record` there is neither thread nor notice: a single experiment, or nothing to train."""
        self.reason = ""
        """Why the launch stops before its cells are done; '' if nobody asked it to."""
        self._plan, self._storage, self._record, self._show = plan, storage, record, show
        self._settings: LaunchSettings = plan.launch
        self._cells = {cell.id: cell for cell in plan.cells}
        self._notifier = Notifier(plan.launch.notify if record else None)
        self._usage = Usage(time.time())
        self._began = time.monotonic()
        self._paced_from: tuple[float, float] | None = None
        """Time of the first report of a step, and the FLOPs that had been trained by then."""
        self._running: dict[str, _Running] = {}
        self._spent_before = 0.0
        """Money that the other launches of the grid have cost until the last look at their files."""
        self._lock = threading.Lock()
        self._may_stop = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="launch-watch", daemon=True)

    # ---- what the callbacks of cells tell ----

    def began(self, cell: str, step: int) -> None:
        """Count a cell's workers from now on, those of a group from when they are there; it resumes from `step`."""
        with self._lock:
            self._running.setdefault(cell, _Running(self._cells[cell], step, step))

    def moved(self, cell: str, result: Mapping[str, Any]) -> None:
        """Take up a cell's newest report: its step, if it has done one, its workers, and whether tasks are scored."""
        with self._lock:
            if running := self._running.get(cell):
                running.step = max(running.step, int(result.get("step", 0)))
                running.moved = time.monotonic()
                if (workers := int(result.get("workers", running.workers))) != running.workers:
                    _add(self._usage, running)
                    running.first_step, running.began, running.workers = running.step, time.monotonic(), workers
                running.is_scoring = bool(result.get("scoring"))
        if self._paced_from is None and "step" in result:
            self._paced_from = time.monotonic(), self._usage_now().flops

    def released(self, cell: str) -> None:
        """Count a cell's workers no longer."""
        with self._lock:
            if running := self._running.pop(cell, None):
                _add(self._usage, running)

    def ended(self, cell: str, status: Status) -> None:
        """Send a notice of a cell that failed."""
        self.released(cell)
        if status.state == "failed":
            event = "failure" if status.diverged is None else "divergence"
            self._notify(event, f"{cell} failed: {status.reason}", cell, step=status.step)

    def trained(self) -> None:
        """Count no cell any longer: the training is over."""
        for cell in list(self._running):
            self.released(cell)

    # ---- the launch ----

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Let a request or a limit stop the launch in this block.

        Raises `Paused`, with the reason and what is left, if that happens.
        """
        self._refuse_spent()
        self._may_stop = True
        if self._record:
            self._thread.start()
        try:
            yield
        except SystemExit as end:
            if self.reason and end.code == TERMINATED:
                raise Paused(f"{self._plan.name} is stopped: {self.reason}: {self._left()}") from None
            raise
        finally:
            with self._lock:
                self._may_stop = False

    def _left(self) -> str:
        with contextlib.suppress(BwlmError):  # a bucket that is away: what is known here is told
            self._account()
            refresh(self._storage)
        words = summarize(self._plan, self._storage).left_words()
        return f"{words}; to resume, run the same command, or: {run_command(self._plan.name, self._storage)}"

    def _refuse_spent(self) -> None:
        """Raise `UserError` if earlier launches have cost as much as all of them may."""
        if self._record is None or not (limit := self._settings.limit.money):
            return
        self._look_at_costs()
        if (spent := self._spent()) >= limit:
            raise UserError(
                f"launch.limit.money: {spent:.2f} of {limit:g} are spent by earlier launches of {self._plan.name}: "
                "raise it"
            )

    def close(self, error: BaseException | None) -> None:
        """Write what was used, and send the notice of the end."""
        self._over.set()
        if self._record is None:
            return
        if self._thread.is_alive():
            self._thread.join()
        self.trained()
        outcome, reason = ("stopped", self.reason) if isinstance(error, Paused) else _outcome(error)
        with contextlib.suppress(OSError, BwlmError):  # a full disk, say: the launch tells its own fault
            summary = summarize(self._plan, self._storage)
            if error is None and not summary.is_complete:
                outcome = "incomplete"
            self._account(end=": ".join(filter(None, [outcome, reason])))
            text = ": ".join(filter(None, [outcome, reason, summary.counts_words()]))
            self._notify("end", text, outcome=outcome, reason=masked(reason), cells=summary.counts)
        self._notifier.close()

    # ---- the thread ----

    def _look_again(self) -> None:
        next_account = 0.0
        while not self._over.wait(_LOOK_SECONDS):
            with contextlib.suppress(OSError, BwlmError):  # a storage that is away for a moment
                if time.monotonic() >= next_account:
                    next_account = time.monotonic() + _WRITE_SECONDS
                    self._account()
                    self._look_at_costs()
                    self._look_for_stalls()
                if not self.reason and (reason := self._reason_to_stop()):
                    self._stop(reason)

    def _reason_to_stop(self) -> str:
        assert self._record is not None
        if by := self._record.asked_to_stop():
            return f"`bwlm grid stop` asked for it ({by})"
        limit = self._settings.limit
        if limit.hours and time.monotonic() - self._began >= 3600 * limit.hours:
            return f"launch.limit.hours={limit.hours:g} is reached"
        if limit.money and (spent := self._spent()) >= limit.money:
            return f"launch.limit.money={limit.money:g} is reached, {spent:.2f} are spent"
        return ""

    def _stop(self, reason: str) -> None:
        with self._lock:
            if not self._may_stop:
                return
            self.reason = reason
            self._show(f"the launch stops: {reason}: each cell saves a checkpoint")
            os.kill(os.getpid(), signal.SIGTERM)

    def _spent(self) -> float:
        """Return the money that all launches of the grid have cost until now."""
        price = self._settings.price
        return self._spent_before + self._usage_now().cost(price.gpu_hour, price.cpu_hour)

    def _look_at_costs(self) -> None:
        assert self._record is not None
        self._record.exchange()
        others = [one.usage for one in launches_of(self._record.home) if one.name != self._record.name]
        price = self._settings.price
        self._spent_before = total_of(others).cost(price.gpu_hour, price.cpu_hour)

    def _usage_now(self) -> Usage:
        """Return what was used, with the cells that still run."""
        now = time.monotonic()
        with self._lock:
            usage = replace(self._usage, seconds=now - self._began)
            for running in self._running.values():
                _add(usage, running)
        if self._paced_from is not None:
            since, flops = self._paced_from
            usage.pace_seconds, usage.pace_flops = now - since, usage.flops - flops
        return usage

    def _account(self, end: str = "") -> None:
        """Write what was used until now, if any cell has begun."""
        usage = self._usage_now()
        if self._record and usage.worker_seconds:
            self._record.write(replace(usage, end=end))

    def _look_for_stalls(self) -> None:
        for name, running in list(self._running.items()):
            path, now = self._storage / name / NAME, time.monotonic()
            if now - running.moved >= 60 * self._settings.stall_minutes:
                fetch(path)  # its worker may run on another machine
            size = path.stat().st_size if path.exists() else 0
            if size != running.journal_bytes:
                running.journal_bytes, running.moved, running.is_stalled = size, now, False
            elif now - running.moved >= 60 * self._settings.stall_minutes:
                if not running.is_stalled and not running.is_scoring:
                    running.is_stalled = True
                    words = f"{name} has done no step for {duration(now - running.moved)}"
                    self._show(f"stalled: {words}; bwlm grid status {self._plan.name} shows its worker and its log")
                    self._notify("stall", words, name, step=running.step)
                self._end_frozen(name)

    def _end_frozen(self, cell: str) -> None:
        """End a worker that shows no sign of life: Ray cannot tell it from a busy one, and starts the cell again."""
        from bwlm.cluster.signals import kill  # imports Ray, which a launch with nothing to train does not need

        if holder := ExperimentFolder(self._storage, cell).frozen_holder():
            self._show(
                f"{cell}: its worker {holder} is frozen, and is ended: the cell resumes from its last checkpoint"
            )
            kill(holder)

    def _notify(self, event: str, text: str, cell: str | None = None, **besides: Any) -> None:
        name, host = self._plan.name, f"{socket.gethostname()}:{os.getpid()}"
        self._notifier.send(
            {"event": event, "grid": name, "text": f"{name}: {masked(text)}", "cell": cell, "time": time.time()}
            | {"launch": host, "storage": str(self._storage)}
            | besides
        )


def _add(usage: Usage, running: _Running) -> None:
    """Add what a cell's workers have used since it began."""
    resources, seconds = running.cell.experiment.resources, time.monotonic() - running.began
    usage.worker_seconds += running.workers * seconds
    usage.cpu_seconds += running.workers * resources.cpus_per_worker * seconds
    usage.gpu_seconds += running.workers * resources.gpus_per_worker * seconds
    usage.flops += running.cell.flops_until(running.step) - running.cell.flops_until(running.first_step)


def _outcome(error: BaseException | None) -> tuple[str, str]:
    """Return how a launch ended, in a word, and the reason."""
    if error is None:
        return "complete", ""
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == TERMINATED):
        return "interrupted", "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
    return "error", first_line(error)


@contextmanager
def watched(plan: Plan, storage: Path, is_over: bool, show: Show) -> Iterator[LaunchWatch]:
    """Watch over a launch until the block ends; of a grid with cells left to train, also on the shared storage."""
    with contextlib.ExitStack() as until_the_end:
        record = None
        if plan.is_grid and not is_over:
            record = until_the_end.enter_context(recorded_launch(grid_folder(storage, plan.name)))
        watch = LaunchWatch(plan, storage, record, show)
        try:
            yield watch
        except BaseException as error:
            watch.close(error)
            raise
        watch.close(None)
