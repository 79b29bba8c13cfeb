"""Training of cells with Ray Tune, until each has ended or the launch is asked to end.

Tune's own state lies in a scratch folder and is never restored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ray.tune
from ray.tune.search import BasicVariantGenerator
from ray.tune.tune_config import TuneConfig

from bwlm.background import in_background
from bwlm.cluster.capacity import Capacity
from bwlm.config import ResourceSettings
from bwlm.grid.cells import PlannedCell
from bwlm.grid.gauges import CellGauges
from bwlm.grid.growth import MoreAtOnce
from bwlm.grid.progress import ProgressDisplay
from bwlm.grid.scheduling import CellStates, build_scheduler
from bwlm.grid.watch import LaunchWatch
from bwlm.grid.worker import train_cell, trial_resources
from bwlm.plan.resolve import worker_counts
from bwlm.plan.spec import Plan
from bwlm.record.bucket import push_runs
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.tracking import Tracking
from bwlm.remote import address_of
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import refresh
from bwlm.train.termination import TERMINATED, Termination

_DELIVERY_SECONDS = 10.0


Show = Callable[[str], None]


def train_cells(
    plan: Plan,
    cells: list[PlannedCell],
    shown: list[PlannedCell],
    capacity: Capacity,
    storage: Path,
    tracking: Tracking,
    run: str,
    watch: LaunchWatch,
    show: Show,
) -> None:
    """Train what is not done; `run` is the MLflow run that gets this machine's system metrics.

    The progress is that of the `shown` cells: with those of earlier and later phases.

    If this process is asked to end, by SIGTERM or Ctrl-C, its cells save checkpoints first, within a grace time. Then
    `show` gets the step that each cell resumes from. Raises `SystemExit` with `TERMINATED` after SIGTERM, and
    `KeyboardInterrupt` after Ctrl-C.
    """
    unfinished = _in_order([planned for planned in cells if not planned.is_done])
    if not unfinished:
        return
    folders = [planned.folder for planned in unfinished]
    shown_cells = tuple(planned.cell for planned in shown)
    states = {planned.cell.id: planned.status for planned in shown}
    monitor = tracking.monitor_system(run)
    try:
        with Termination() as termination, _ctrl_c_saves(show):
            with (
                ProgressDisplay(shown_cells, states, in_detail=not plan.is_grid) as progress,
                CellGauges(plan.name, shown_cells, states) as gauges,
                _delivery(tracking, folders),
            ):
                callbacks = CellStates(storage, progress, termination, watch, gauges)
                _tune(plan, unfinished, capacity, storage, callbacks, termination)
            if termination.asked:
                _deliver(tracking, folders)
                raise SystemExit(TERMINATED)
    except (KeyboardInterrupt, SystemExit):
        for line in _resume_lines(folders):
            show(line)
        tracking.interrupted(folders, run)
        push_runs([folder.path for folder in folders])
        raise
    finally:
        watch.trained()
        monitor.finish()


@contextlib.contextmanager
def _ctrl_c_saves(show: Show) -> Iterator[None]:
    """Turn the first Ctrl-C into SIGTERM, so that cells save; the second one ends the process.

    The `SystemExit` that SIGTERM leads to is a `KeyboardInterrupt` then.
    """
    interrupted = threading.Event()
    # only the main thread may set handlers, and gets Ctrl-C
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)
        show("Ctrl-C: each cell saves a checkpoint; press it again to end at once")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    except SystemExit:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


_LINES = 8
"""Most cells that get a line each; of more, only the numbers are shown."""


def _resume_lines(folders: list[ExperimentFolder]) -> list[str]:
    """Return a line for each cell that has not ended: the step from which it resumes."""
    with contextlib.suppress(BucketAway):
        refresh(folders[0].path.parent)
    left = {folder.id: checkpoint_steps(folder.checkpoints) for folder in folders if not folder.status().ended}
    if len(left) <= _LINES:
        return [
            f"{run}: {f'resumes from step {steps[-1]}' if steps else 'begins again'}" for run, steps in left.items()
        ]
    resumed = sum(map(bool, left.values()))
    return [f"{resumed} cells resume from their last checkpoints, {len(left) - resumed} begin again"]


def _in_order(cells: list[PlannedCell]) -> list[PlannedCell]:
    """Return the cells sorted by FLOPs, the longest first: short cells at the end let no worker idle for long.

    If another launch trains some of the cells, the free cells come first, the shortest ahead. Else both launches would
    reach the same cell each time, and one of them would wait.
    """
    ordered = sorted(cells, key=lambda planned: -planned.cell.flops)
    held = {planned.cell.id for planned in ordered if planned.folder.lease_holder() is not None}
    free = [planned for planned in ordered if planned.cell.id not in held]
    return [*reversed(free), *(planned for planned in ordered if planned.cell.id in held)] if held else ordered


def _tune(
    plan: Plan,
    cells: list[PlannedCell],
    capacity: Capacity,
    storage: Path,
    states: CellStates,
    termination: Termination,
) -> None:
    resources = {planned.cell.id: planned.cell.experiment.resources for planned in cells}
    sizes = {planned.cell.id: worker_counts(planned.cell.experiment) for planned in cells}
    in_turn = BasicVariantGenerator(max_concurrent=capacity.concurrency)
    with (
        tempfile.TemporaryDirectory(prefix="bwlm-tune-", ignore_cleanup_errors=True) as scratch,
        _more_at_once(plan, set(resources.values()), capacity, in_turn) as more,
    ):
        stall_seconds = max(1, round(60 * plan.launch.stall_minutes))
        shared = {"storage": address_of(storage), "scratch": scratch, "stall_seconds": stall_seconds}
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(train_cell, lambda config: trial_resources(resources[config["cell"]])),
            param_space={
                **shared,
                "cell": ray.tune.grid_search(list(resources)),
                # workers use what is reserved here, even if another launch writes other settings to the cell's folder
                "resources": ray.tune.sample_from(lambda config: resources[config["cell"]].model_dump()),
                "sizes": ray.tune.sample_from(lambda config: sizes[config["cell"]]),
                "at_once": capacity.concurrency,
            },
            tune_config=TuneConfig(
                search_alg=in_turn,
                # a group of workers is not told that its trial was stopped: it ends only with the trial's process
                reuse_actors=not any(one.drives_group for one in resources.values()),
                scheduler=build_scheduler(plan, cells, storage, termination),
            ),
            run_config=ray.tune.RunConfig(
                name=plan.name,
                storage_path=scratch,
                failure_config=ray.tune.FailureConfig(max_failures=plan.launch.retries),
                callbacks=[states, *more],
                verbose=0,
            ),
        )
        tuner.fit()


@contextlib.contextmanager
def _more_at_once(
    plan: Plan, needs: set[ResourceSettings], capacity: Capacity, cells: BasicVariantGenerator
) -> Iterator[list[MoreAtOnce]]:
    """Yield the callback that lets further cells begin where the cluster may get room for them."""
    if not capacity.grows or any(one.is_elastic for one in needs):
        yield []
        return
    more = MoreAtOnce(cells, needs, plan.launch.concurrency)
    try:
        yield [more]
    finally:
        more.forget()


@contextlib.contextmanager
def _delivery(tracking: Tracking, folders: list[ExperimentFolder]) -> Iterator[None]:
    """Deliver the runs' journals to MLflow in a background thread until the block ends."""

    def deliver(done: threading.Event) -> None:
        while not done.wait(_DELIVERY_SECONDS):
            _deliver(tracking, folders, done.is_set)

    with in_background("mlflow-delivery", deliver):
        yield


def _deliver(tracking: Tracking, folders: list[ExperimentFolder], enough: Callable[[], bool] = lambda: False) -> None:
    """Deliver every run's new entries to MLflow, up to the first run that fails: the next would wait as long."""
    with contextlib.suppress(BucketAway):  # what is here already is delivered
        refresh(folders[0].path.parent)
    for folder in folders:
        if enough() or not tracking.try_deliver(folder):
            return
