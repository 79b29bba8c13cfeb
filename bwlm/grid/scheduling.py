"""What Tune is told: which cells may be stopped early, and what to note of a cell when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from bwlm.grid.progress import GridProgress
from bwlm.grid.spec import SchedulerSettings
from bwlm.paths import write_atomic
from bwlm.record.lineage import ExperimentFolder, Status


class DirectionwiseASHA(FIFOScheduler):  # type: ignore[misc]
    """ASHA (Li et al. 2020) among cells that differ in the learning rate alone, on the tuning half of the windows.

    One set of rungs for all would stop the direction that reads worse, and leave nothing to compare.
    """

    def __init__(self, settings: SchedulerSettings, max_steps: int, strata: dict[str, str]) -> None:
        super().__init__()
        self._strata = strata
        self._rungs = {
            stratum: ASHAScheduler(
                time_attr="step",
                metric="val_bpb_tuning",
                mode="min",
                max_t=max_steps,
                grace_period=min(settings.grace_steps, max_steps),
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
        return str(self._of(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


def make_scheduler(settings: SchedulerSettings, max_steps: int, strata: dict[str, str]) -> TrialScheduler:
    """`strata` names, for each cell, the group within which it competes."""
    return FIFOScheduler() if settings.kind == "fifo" else DirectionwiseASHA(settings, max_steps, strata)


class CellStates(ray.tune.Callback):  # type: ignore[misc]
    """Shows how far the cells are, and notes those that their own worker could not note: stopped early, or crashed."""

    def __init__(self, storage: Path, progress: GridProgress) -> None:
        self._storage = storage
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into a state that we never restore, and a live display cannot be pickled
        return {"_storage": self._storage}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._progress.began(trial.config["cell"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" in result:
            self._progress.moved(trial.config["cell"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = ExperimentFolder(self._storage, trial.config["cell"])
        at = folder.status()
        self._close(folder, at, Status("stopped", f"by the scheduler at step {at.step}", at.step, at.metrics))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = ExperimentFolder(self._storage, trial.config["cell"])
        at, error = folder.status(), trial.get_error()
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        write_atomic(folder.path / "error.txt", f"{error}\n".encode())
        if folder.lease_holder() is not None:  # another launch trains it already
            return
        self._close(folder, at, Status("failed", f"crashed, see error.txt: {last}", at.step, at.metrics))

    def _close(self, folder: ExperimentFolder, at: Status, ending: Status) -> None:
        """Notes an end that the worker did not note itself."""
        if not at.ended:
            folder.write_status(ending)
        self._progress.ended(folder.id, at if at.ended else ending)
