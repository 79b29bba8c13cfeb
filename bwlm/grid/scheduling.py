"""Schedulers (FIFO, ASHA) and callbacks of Ray Tune: early stops, the end of each cell, the end of the launch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from bwlm.cluster.signals import ask_to_end, own_workers
from bwlm.grid.cells import PlannedCell
from bwlm.grid.continued import is_continued
from bwlm.grid.gauges import CellGauges
from bwlm.grid.progress import ProgressDisplay
from bwlm.grid.watch import LaunchWatch
from bwlm.paths import write_text
from bwlm.plan.spec import Plan, SchedulerSettings, asha_group
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.lease import LEASE_SECONDS
from bwlm.storage.head import LateWriter
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import pull, push
from bwlm.train.termination import TERMINATED, Termination

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
"""Least seconds between two looks at cells whose end is not known."""
_PATIENCE_SECONDS = LEASE_SECONDS + 15.0
"""Seconds for which a launch whose trials are all over waits to learn how its cells ended: leases of processes that
died on other machines have run out by then."""
Ending = Callable[[Status], Status]
"""(state of a cell whose worker has noted no end) -> the end to note for it, or that state if there is none yet"""


class CellScheduler(FIFOScheduler):  # type: ignore[misc]
    """FIFO scheduler that ends a launch: when this process is asked to end, it asks its running cells to end too.

    No other cell begins then. Cells that another launch trains are left to it.
    """

    def __init__(self, storage: Path, termination: Termination, grace_seconds: float) -> None:
        super().__init__()
        self._storage = storage
        self._termination = termination
        self._grace_seconds = grace_seconds
        self._told: set[str] = set()
        self._deadline: float | None = None

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the trial that Tune starts next, or None; Tune asks many times a second.

        Raises `SystemExit` past the grace time: a cell that hangs loses only the steps since its last checkpoint. And
        if the cells that are left all wait for other launches: they have nothing to save.
        """
        if not self._termination.asked:
            return super().choose_trial_to_run(tune_controller)
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds
        holders = []
        for trial in list(tune_controller.get_live_trials()):
            if trial.status == Trial.RUNNING:
                holders.append(ExperimentFolder(self._storage, trial.config["cell"]).lease_holder())
            else:
                trial.init_local_path()  # Tune looks for the folder of every trial at the end
                tune_controller.stop_trial(trial)
        self._ask({holder for holder in holders if holder})
        all_wait = bool(holders) and all(holder and holder not in self._told for holder in holders)
        if all_wait or time.monotonic() > self._deadline:
            raise SystemExit(TERMINATED)
        return None

    def _ask(self, holders: set[str]) -> None:
        """Ask those of the processes to end that this launch has started, each once."""
        if untold := holders - self._told:
            for holder in untold & own_workers():
                ask_to_end(holder)
                self._told.add(holder)


class DirectionwiseASHA(CellScheduler):
    """ASHA (Li et al. 2020) among cells that differ only in the learning rate, on the tuning half of the windows.

    With one set of rungs for all cells, ASHA would stop the direction with the higher loss and leave nothing to
    compare. At its last step a cell has nothing left to save, and finishes.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        steps: dict[str, int],
        strata: dict[str, str],
        storage: Path,
        termination: Termination,
        grace_seconds: float,
    ) -> None:
        """Make rungs for each group of cells.

        `steps` maps each cell's id to its number of steps, `strata` to the group in which it competes.
        """
        super().__init__(storage, termination, grace_seconds)
        self._steps, self._strata = steps, strata
        longest = max(steps.values())
        self._rungs = {
            stratum: ASHAScheduler(
                time_attr="step",
                metric="val_bpb_tuning",
                mode="min",
                max_t=longest,
                grace_period=min(settings.grace_steps, longest),
                reduction_factor=settings.reduction_factor,
                stop_last_trials=False,
            )
            for stratum in sorted(set(strata.values()))
        }

    def _of(self, trial: Any) -> Any:
        return self._rungs[self._strata[trial.config["cell"]]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("step", 0) >= self._steps[trial.config["cell"]]:
            return str(self.CONTINUE)
        return str(self._of(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


def build_scheduler(plan: Plan, cells: list[PlannedCell], storage: Path, termination: Termination) -> CellScheduler:
    """Return the scheduler of the kind that the plan names."""
    grace_seconds = plan.launch.grace_seconds
    if not plan.scheduler.stops_early:
        return CellScheduler(storage, termination, grace_seconds)
    steps = {planned.cell.id: planned.cell.steps for planned in cells}
    strata = {planned.cell.id: _stratum(planned) for planned in cells}
    return DirectionwiseASHA(plan.scheduler, steps, strata, storage, termination, grace_seconds)


def _stratum(planned: PlannedCell) -> str:
    """Return the group in which a cell competes; a continued cell is alone in its own, and so is never stopped."""
    return planned.cell.id if is_continued(planned.folder) else asha_group(planned.cell.experiment)


class CellStates(TrialProgressCallback):  # type: ignore[misc]
    """Callbacks that show progress, and write the end of a cell that its worker did not write: stopped or crashed.

    They replace Tune's own display, which prints a line for each trial that never began.
    """

    def __init__(
        self, storage: Path, progress: ProgressDisplay, termination: Termination, *watches: LaunchWatch | CellGauges
    ) -> None:
        super().__init__()
        self._storage = storage
        self._progress = progress
        self._watches = watches
        self._observers: tuple[ProgressDisplay | LaunchWatch | CellGauges, ...] = (progress, *watches)
        self._termination = termination
        self._heard: dict[str, int] = {}
        self._over: dict[str, Ending] = {}
        """Cells whose trials are over, until their ends are known."""
        self._next_look = 0.0
        self._is_away = False

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into a state that we never restore, and a live display cannot be pickled
        return {}

    def _folder(self, trial: Any) -> ExperimentFolder:
        return ExperimentFolder(self._storage, trial.config["cell"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder(trial)
        step = max(checkpoint_steps(folder.checkpoints), default=0)
        for observer in self._observers:
            observer.began(folder.id, step)
        self._heard.setdefault(folder.id, _size(folder.warnings))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        folder = self._folder(trial)
        self._tell_warnings(folder)
        for watch in self._watches:
            watch.moved(folder.id, result)
        if "step" in result:
            self._progress.moved(folder.id, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder(trial)
        for watch in self._watches:
            watch.released(folder.id)
        if not self._termination.asked:
            self._progress.broke_off(folder.id, folder.status().step)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note_over(self._folder(trial), _interrupted if self._termination.asked else _stopped)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder, error = self._folder(trial), Path(trial.error_file).read_text("utf-8", "replace")
        with _on_a_full_disk_too(folder):
            write_text(folder.path / "error.txt", error)
        self._note_over(folder, partial(_crashed, error.strip().splitlines()[-1].strip()))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._over and time.monotonic() >= self._next_look:
            self._look()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Wait for a minute to learn how cells ended, unless the launch is asked to end."""
        for name in self._over:
            self._progress.warned(name, "how it ended is not known yet: waits for a minute at most")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._over and not self._termination.asked and time.monotonic() < deadline:
            time.sleep(max(0.0, self._next_look - time.monotonic()))
            self._look()

    def _note_over(self, folder: ExperimentFolder, ending: Ending) -> None:
        for watch in self._watches:
            watch.released(folder.id)
        self._over[folder.id] = ending

    def _look(self) -> None:
        """Close the cells whose end is known by now, each after a look into the bucket.

        If the bucket is away, nothing is written: the worker may have noted its end there from another machine. Nor for
        a crashed cell that a process holds: another launch trains it, or its worker was killed on another machine, and
        the lease will run out.
        """
        began = time.monotonic()
        try:
            for name, ending in list(self._over.items()):
                self._look_at(ExperimentFolder(self._storage, name), ending)
            self._is_away = False
        except BucketAway as error:
            if not self._is_away:
                log.warning("%s: how cells have ended is not known until it does", error)
            self._is_away = True
        if self._over:
            self._next_look = time.monotonic() + max(_LOOK_SECONDS, time.monotonic() - began)

    def _look_at(self, folder: ExperimentFolder, ending: Ending) -> None:
        pull(folder.path)
        self._tell_warnings(folder)
        at = folder.status()
        end = at if at.ended else ending(at)
        if end.state == "running":
            return
        del self._over[folder.id]
        if end.ended:
            self._close(folder, at, end)

    def _close(self, folder: ExperimentFolder, at: Status, ending: Status) -> None:
        """Write and show the end of a cell: `ending`, unless its worker has already written another."""
        if not at.ended:
            with _on_a_full_disk_too(folder):
                folder.write_status(ending)
                push(folder.path, trained=True)
        for observer in self._observers:
            observer.ended(folder.id, at if at.ended else ending)

    def _tell_warnings(self, folder: ExperimentFolder) -> None:
        """Show the warnings of the cell's worker since this launch started it."""
        size, heard = _size(folder.warnings), self._heard.get(folder.id, 0)
        if size > heard:
            with folder.warnings.open("rb") as file:
                file.seek(heard)
                for line in file.read(size - heard).decode(errors="replace").splitlines():
                    self._progress.warned(folder.id, line)
            self._heard[folder.id] = size


@contextlib.contextmanager
def _on_a_full_disk_too(folder: ExperimentFolder) -> Iterator[None]:
    """Log an error on writing one cell's status instead of raising it: the other cells go on."""
    try:
        yield
    except OSError as error:
        log.warning("%s: cannot be written (%s): free space or make it writable", folder.path, error.strerror)
    except (BucketAway, LateWriter) as error:
        log.warning("%s: its end is not in the bucket (%s): the same command trains it on", folder.id, error)


def _stopped(at: Status) -> Status:
    """Return the end of a cell that the scheduler has stopped."""
    return Status("stopped", f"by the scheduler at step {at.step}", at.step, at.metrics)


def _interrupted(at: Status) -> Status:
    """Return the state of a cell whose launch was asked to end: it resumes."""
    return at


def _crashed(error: str, at: Status) -> Status:
    """Return the end of a cell that has crashed with an error; its state while a process holds it."""
    if at.state == "running":
        return at
    return Status("failed", f"crashed, see error.txt: {error}", at.step, at.metrics)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
