"""Launches of a grid or a single experiment: prepare texts, schedule cells, feed MLflow, write the report.

    [1] resolve  ->  [2] prepare  ->  [3] enlist  ->  [4] train  ->  [5] report

The same command resumes an interrupted launch: finished cells stay as they are, the others resume from their own
checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bwlm.errors import BwlmError, UserError
from bwlm.format import counted
from bwlm.grid.announce import introduce, over_words, tell_capacity, tell_other_code, tell_unchecked_text
from bwlm.grid.cells import (
    PlannedCell,
    check_same,
    find_cells,
    waiting_cells,
    without_parent,
)
from bwlm.grid.continued import reopen
from bwlm.grid.enlist import ResolvedCell, enlist_cells, enlist_grid, folder_of, resolved_cells
from bwlm.grid.watch import LaunchWatch, watched
from bwlm.paths import check_writable
from bwlm.plan.spec import Cell, Plan, generations
from bwlm.progress import loading, track, working
from bwlm.record.bucket import fetch_named_weights, fetch_text, push_rest, push_runs, push_text, rest_told
from bwlm.record.catalog.rows import CellRow, load_cells
from bwlm.record.experiment import SAMPLES, ExperimentFolder
from bwlm.record.grids import EARLIER, GRID_FILE, REPORT
from bwlm.record.mlflow_note import is_closed
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.mlflow_view import GridResult
from bwlm.record.parent import link_to
from bwlm.record.tracking import Tracking
from bwlm.remote import address_of
from bwlm.storage.opened import check_bucket, exclusive, in_bucket, refresh
from bwlm.text.packing import Job, PackResult, RunJobs

if TYPE_CHECKING:
    from bwlm.analysis.report.study import GridReport
    from bwlm.cluster.capacity import Capacity
    from bwlm.config import ResourceSettings
    from bwlm.text.prepare import Prepared


@dataclass(frozen=True)
class LaunchResult:
    """Result of a launch: its cells, findings, report and MLflow store."""

    cells: list[CellRow]
    waiting: int
    """Number of cells that could not begin, since their parents have not finished."""
    report: Path
    tracking_uri: str
    dashboard: str | None
    was_over: bool
    """True if nothing was left to train."""

    @property
    def complete(self) -> bool:
        """True if every cell finished or was stopped by the scheduler."""
        return not self.waiting and all(cell.state in ("finished", "stopped") for cell in self.cells)


def run_plan(plan: Plan, storage: Path, show: Callable[[str], None], accept_code: bool = False) -> LaunchResult:
    """Run every cell that is not done, and write the report.

    With `accept_code`, today's code resumes cells that other code has begun, and their records say so. Raises
    `UserError`, before anything is made, for a plan that can never work. Raises `Paused` if the grid is asked to stop
    or reaches a limit, and `SystemExit` with `TERMINATED`, or `KeyboardInterrupt`, if this process is asked to end.
    """
    is_new = not storage.exists()
    planned_cells = _checked_cells(plan, storage, accept_code)
    tell_other_code(planned_cells, show)
    tell_unchecked_text(planned_cells, show)
    is_over = _is_over(planned_cells)
    with loading():
        from tasks.sources import check_sources

    for cell in plan.cells:
        check_sources(cell.experiment)
    if asks_for_scores := any(cell.experiment.evaluation.tasks for cell in plan.cells):
        _check_tasks(plan)
    uri = tracking_uri(storage, plan.launch.tracking_uri)
    _check_tracking(uri, storage, plan.launch.experiment)
    home = folder_of(plan, storage)
    if not is_over:
        _check_prices(plan)
        _check_room(plan)
    with (
        _only_launch(plan, storage),
        watched(plan, storage, is_over, show) as watch,
        contextlib.ExitStack() as until_the_end,
    ):
        cluster = cache(partial(_open_cluster, plan, is_over, until_the_end, show))  # its first call starts Ray
        tell = (lambda words: None) if is_over else show  # of text that nothing is trained on
        with watch.pausing():
            prepared = _prepared_texts(plan, storage, partial(_run_on, cluster, storage), tell)
            if is_new:  # now that it is made: a fault of the text leaves none
                show(f"new storage: {_place_of(storage)}")
            capacity = None if is_over else cluster()
            home.mkdir(parents=True, exist_ok=True)
            tracking = _open_tracking(uri, storage, plan)
            grid_run = _train_generations(plan, storage, prepared, accept_code, tracking, capacity, watch, show)
            if asks_for_scores:
                capacity = _score_rest(plan, storage, cluster, show) or capacity
        # not before: another text under the same name is found out last
        show("writing the report" if capacity else over_words(plan, planned_cells))
        with exclusive(home / "lock"):  # since another launch may end at the same moment
            return _conclude(plan, storage, tracking, grid_run, capacity)


# ---- [1] resolve ----


def _checked_cells(plan: Plan, storage: Path, accept_code: bool) -> list[PlannedCell]:
    """Return the plan's cells; raise `UserError` if a folder holds another run or an outside parent is unfinished."""
    check_writable(storage)
    check_bucket(storage)
    planned_cells = find_cells(plan, storage)
    changed = [planned.cell.id for planned in planned_cells if planned.changed]
    for planned in planned_cells:
        check_same(planned, planned.changed, plan, accept_code, changed)
    ids = {cell.id for cell in plan.cells}
    for cell in plan.cells:
        if (parent := cell.experiment.parent) is not None and cell.parent not in ids:
            fetch_named_weights(storage, parent)
            link_to(storage, parent, cell.experiment.phase, cell.id)
    return planned_cells


def _is_over(planned_cells: list[PlannedCell]) -> bool:
    """Return true if no cell is left to train, so that a launch needs no Ray."""
    out = without_parent(planned_cells)
    return all(planned.is_done or planned.cell.id in out for planned in planned_cells)


def _check_prices(plan: Plan) -> None:
    """Raise `UserError` if a limit of money would stop nothing, since a cell costs nothing by the launch's prices."""
    if plan.launch.limit.money is None:
        return
    for cell in plan.cells:
        missing = "gpu_hour" if cell.experiment.resources.gpus_per_worker else "cpu_hour"
        if not getattr(plan.launch.price, missing):
            raise UserError(
                f"launch.limit.money: {cell.id} has no price: set launch.price.{missing}, the price of one "
                f"{missing[:3].upper()} for an hour"
            )


def _check_room(plan: Plan) -> None:
    """Raise `UserError`, before a text is read, for what Ray would refuse."""
    with loading():
        from bwlm.cluster.session import check_room
    check_room(_needs(plan), plan.launch, len(plan.cells))


def _needs(plan: Plan) -> set[ResourceSettings]:
    return {cell.experiment.resources for cell in plan.cells}


def _open_cluster(plan: Plan, is_over: bool, until: contextlib.ExitStack, show: Callable[[str], None]) -> Capacity:
    """Start Ray, or connect to a cluster, until `until` is closed."""
    with loading():
        from bwlm.cluster.session import open_cluster
        from bwlm.config import ResourceSettings

    needs = {ResourceSettings()} if is_over else _needs(plan)  # text and scores need not what training needed
    capacity = until.enter_context(open_cluster(needs, plan.launch, len(plan.cells), plan.name))
    tell_capacity(capacity, show)
    return capacity


def _run_on(
    cluster: Callable[[], Capacity], storage: Path, jobs: list[Job], work: Callable[[Job], PackResult]
) -> list[PackResult]:
    """Run the work with Ray. Ray starts here, so that the faults of a text are told before it."""
    from bwlm.grid.nearby import pack_nearby
    from bwlm.text.stream import with_ray

    cluster()
    return pack_nearby(jobs, work) if in_bucket(storage) else with_ray(jobs, work)


@contextlib.contextmanager
def _only_launch(plan: Plan, storage: Path) -> Iterator[None]:
    """Raise `UserError` if an experiment is trained by another process already; launches of a grid share its cells."""
    with contextlib.ExitStack() as launches:
        for planned in () if plan.is_grid else find_cells(plan, storage):
            if not planned.is_done:
                launches.enter_context(planned.folder.only_launch())
        if not plan.is_grid:
            launches.callback(_discard_lock, folder_of(plan, storage))
        yield


def _discard_lock(home: Path) -> None:
    """Delete the lock of an experiment that was not made, and with it the folder that holds nothing else."""
    if not (home / "config.json").exists():
        (home / "lock").unlink(missing_ok=True)


def _ready_generations(plan: Plan, storage: Path, show: Callable[[str], None]) -> Iterator[Plan]:
    """Yield the cells of each generation that can be trained, as a plan, once those of the one before have ended."""
    for generation in generations(plan.cells):
        refresh(storage)
        if ready := _ready(generation, storage, show):
            yield replace(plan, cells=ready)


def _ready(generation: tuple[Cell, ...], storage: Path, show: Callable[[str], None]) -> tuple[Cell, ...]:
    """Return the cells whose parents have finished; show what the others wait for."""
    ready = []
    for cell in generation:
        parent = cell.parent
        folder = ExperimentFolder(storage, parent) if parent else None
        state = folder.status().state if folder and folder.exists() else "waiting"
        if folder is None or state == "finished":
            ready.append(cell)
        else:
            show(f"{cell.id} is not trained: its parent {parent} is {state}")
    return tuple(ready)


def _check_tracking(uri: str, storage: Path, experiment: str | None = None) -> None:
    """Raise `UserError` if the tracking server does not answer, or refuses: before anything is prepared."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        from bwlm.cluster.session import check_answers

        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_answers(
            parts.hostname, port, f"tracking: {parts.hostname}:{port}", "start the server, or unset MLFLOW_TRACKING_URI"
        )
        Tracking(uri, storage, experiment)  # raises if the server refuses: it may, although its /health is fine


def _open_tracking(uri: str, storage: Path, plan: Plan) -> Tracking:
    """Open MLflow's store, which is made if there is none yet."""
    with working("opening MLflow's store"):
        return Tracking(uri, storage, plan.launch.experiment)


def _place_of(storage: Path) -> str:
    return address_of(storage) if in_bucket(storage) else f"{storage.name} in {storage.parent}"


# ---- [2] prepare ----


def _prepared_texts(plan: Plan, storage: Path, run: RunJobs, tell: Callable[[str], None]) -> dict[str, Prepared]:
    """Return the texts of all cells; those of a bucket are brought here, and new ones are taken there."""
    with loading():
        from bwlm.grid.texts import prepare_texts

    for folder in (ExperimentFolder(storage, cell.id) for cell in plan.cells):
        if in_bucket(storage) and folder.exists():
            fetch_text(Path(folder.config().corpus))
    prepared = prepare_texts(plan, storage, run, tell)
    for text in {one.folder: one for one in prepared.values()}.values():
        push_text(text.folder)
        push_runs([text.tokenizer_folder])
    return prepared


# ---- [3] enlist, [4] train ----


def _train_generations(
    plan: Plan,
    storage: Path,
    prepared: dict[str, Prepared],
    accept_code: bool,
    tracking: Tracking,
    capacity: Capacity | None,
    watch: LaunchWatch,
    show: Callable[[str], None],
) -> str | None:
    """Enlist and train the cells, parents before their children; return the grid's MLflow run.

    Without `capacity` nothing is left to train, and the cells are only brought up to date.
    """
    grid_run: str | None = None
    for part in _ready_generations(plan, storage, show):
        # so that two launches of one plan make its folders and runs only once
        with exclusive(folder_of(plan, storage) / "lock"):
            refresh(storage)
            cells = resolved_cells(part, storage, prepared, accept_code)
            for cell in cells:
                if cell.planned.cell.id in plan.continued:
                    reopen(cell.planned.folder)
            grid_run = grid_run or enlist_grid(plan, storage, tracking, cells)
            runs = enlist_cells(cells, storage, tracking, grid_run)
            _push_enlisted(cells)
        if capacity is not None:
            introduce(plan, cells, show)
            _train(plan, part, cells, capacity, tracking, grid_run or runs[0], watch, show)
    return grid_run


def _push_enlisted(cells: list[ResolvedCell]) -> None:
    """Take the folders of cells to the bucket, with the status of those that have not begun."""
    for is_new in (True, False):
        chosen = [cell.planned for cell in cells if (cell.planned.status.state == "waiting") == is_new]
        push_runs([planned.folder.path for planned in chosen], trained=is_new)


def _train(
    plan: Plan,
    part: Plan,
    cells: list[ResolvedCell],
    capacity: Capacity,
    tracking: Tracking,
    run: str,
    watch: LaunchWatch,
    show: Callable[[str], None],
) -> None:
    """Train the cells of a part of the plan; `run` is the MLflow run that gets this machine's system metrics."""
    from bwlm.grid.training import train_cells  # imports Ray Tune, which a launch with nothing to train does not need

    planned = [cell.planned for cell in cells]
    storage = planned[0].folder.path.parent
    everything = find_cells(plan, storage)
    out = without_parent(everything)
    shown = [one for one in everything if one.cell.id not in out]
    train_cells(part, planned, shown, capacity, storage, tracking, run, watch, show)


def _check_tasks(plan: Plan) -> None:
    """Raise `UserError`, before anything is made, for tasks of `evaluation.tasks` that cannot be read."""
    with loading():
        from bwlm.grid.evaluation import check_tasks
    check_tasks(plan)


def _score_rest(
    plan: Plan, storage: Path, cluster: Callable[[], Capacity], show: Callable[[str], None]
) -> Capacity | None:
    """Score what finished cells lack, and return the cluster that did it; None if they lack nothing.

    A cell that trains scores itself: these are cells that finished before tasks were asked for, or whose scoring
    failed. What cannot be scored now is told, since the cells stay as they are.
    """
    from bwlm.grid.evaluation import evaluate_on_cluster, unscored

    def tell(error: BwlmError) -> None:
        show(f"tasks: {error}; the same command tries it again")

    capacity = None
    try:
        if evaluations := unscored(plan, storage, tell):
            cells = len({evaluation.folder.id for evaluation in evaluations})
            show(f"scoring {counted(cells, 'finished cell')} on tasks")
            capacity = cluster()
            evaluate_on_cluster(evaluations)
    except BwlmError as error:
        tell(error)
    return capacity


# ---- [5] report ----


def _conclude(
    plan: Plan, storage: Path, tracking: Tracking, grid_run: str | None, capacity: Capacity | None
) -> LaunchResult:
    """Write the reports, close the MLflow runs and return the result.

    Raises `RunError` if a bucket does not take all of it.
    """
    with rest_told(storage):
        refresh(storage)
    planned_cells = find_cells(plan, storage)
    begun = [planned for planned in planned_cells if planned.status.step or planned.status.ended]
    # where nothing was trained, the runs and what they are compared with are as they were
    _report([one for one in begun if capacity is not None or not _is_reported(one)], tracking, insides=not plan.is_grid)
    ids = [planned.cell.id for planned in planned_cells if planned.folder.exists()]
    home = folder_of(plan, storage) if plan.is_grid or not ids else storage / ids[-1]
    waiting = waiting_cells(planned_cells)
    dashboard = capacity.dashboard if capacity else None
    cells = load_cells(storage, ids)
    result = LaunchResult(cells, waiting, home / REPORT, tracking.uri, dashboard, was_over=capacity is None)
    if grid_run is not None:
        with loading():
            from bwlm.analysis.report.study import write_grid_report
        with working("writing the grid's report"):
            report = write_grid_report(storage, plan.name)
            files = [*report.files, home / GRID_FILE]
            files += [home / EARLIER] if (home / EARLIER).exists() else []
            tracking.close_parent(home, files, result.complete, _grid_result(report))
    push_rest([home, *(storage / run for run in ids)])
    return result


def _is_reported(planned: PlannedCell) -> bool:
    return (planned.folder.path / REPORT).exists() and is_closed(planned.folder, planned.status)


def _report(cells: list[PlannedCell], tracking: Tracking, insides: bool) -> None:
    """Write the reports of runs, and close the runs in MLflow."""
    if not cells:
        return
    with loading():
        from bwlm.analysis.report.study import write_experiment_report
    for planned in track(cells, "writing the reports", "runs"):
        artifacts = write_experiment_report(planned.folder, insides)
        artifacts += sorted((planned.folder.path / SAMPLES).glob("*.json"))
        tracking.close_child(planned.folder, planned.status, artifacts)


def _grid_result(report: GridReport) -> GridResult:
    from bwlm.analysis.commands.gap import gap_metrics, verdict_line
    from bwlm.analysis.report.tasks import task_metrics

    gaps = report.findings.gaps
    verdict = "; ".join(verdict_line(gap).replace("**", "") for gap in gaps)
    metrics = {name: value for gap in gaps for name, value in gap_metrics(gap).items()}
    return GridResult(report.summary, verdict or "none", metrics | task_metrics(report.tasks))
