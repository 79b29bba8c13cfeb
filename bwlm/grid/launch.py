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

from bwlm.errors import BwlmError
from bwlm.format import counted, first_of
from bwlm.grid.cells import (
    PlannedCell,
    changes,
    check_same,
    counts_files_by_time,
    find_cells,
    resume_config,
    run_config,
    waiting_cells,
    with_code_of,
    without_parent,
)
from bwlm.model.compute import Compute
from bwlm.paths import check_writable, exclusive, write_text
from bwlm.plan.spec import Cell, Plan, generations
from bwlm.progress import loading, track, working
from bwlm.record.catalog.rows import CellRow, load_cells
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import SAMPLES, ExperimentFolder
from bwlm.record.grids import EARLIER, GRID_FILE, REPORT, grid_folder, keep_report, write_cells
from bwlm.record.lineage import ParentLink
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.mlflow_view import GridResult, GridSettings
from bwlm.record.parent import link_to
from bwlm.record.run_config import RunConfig
from bwlm.record.tracking import Tracking, is_closed
from bwlm.text.packing import Job, PackResult
from bwlm.text.prepare import Prepared

if TYPE_CHECKING:
    from bwlm.analysis.report.study import GridReport
    from bwlm.cluster.capacity import Capacity
    from bwlm.config import ResourceSettings


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
    `UserError`, before anything is made, for a plan that can never work. Raises `SystemExit` with `TERMINATED`, or
    `KeyboardInterrupt`, if this process is asked to end meanwhile.
    """
    is_new = not storage.exists()
    planned_cells = _checked_cells(plan, storage, accept_code)
    _tell_other_code(planned_cells, show)
    _tell_unchecked_text(planned_cells, show)
    is_over = _is_over(planned_cells)
    with loading():
        from bwlm.grid.texts import prepare_texts
        from tasks.sources import check_sources

    for cell in plan.cells:
        check_sources(cell.experiment)
    if asks_for_scores := any(cell.experiment.evaluation.tasks for cell in plan.cells):
        _check_tasks(plan)
    uri = tracking_uri(storage, plan.launch.tracking_uri)
    _check_tracking(uri, storage, plan.launch.experiment)
    home = folder_of(plan, storage)
    grid_run: str | None = None
    if not is_over:
        _check_room(plan)
    with _only_launch(plan, storage), contextlib.ExitStack() as until_the_end:
        cluster = cache(partial(_open_cluster, plan, until_the_end, show))  # its first call starts Ray
        tell = (lambda words: None) if is_over else show  # of text that nothing is trained on
        prepared = prepare_texts(plan, storage, partial(_run_on, cluster), tell)
        if is_new:  # now that it is made: a fault of the text leaves none
            show(f"new storage: {storage.name} in {storage.parent}")
        capacity = None if is_over else cluster()
        home.mkdir(parents=True, exist_ok=True)
        tracking = _open_tracking(uri, storage, plan)
        for part in _ready_generations(plan, storage, show):
            with exclusive(home / "lock"):  # so that two launches of one plan make its folders and runs only once
                cells = _resolved(part, storage, prepared, accept_code)
                grid_run = grid_run or _enlist_grid(plan, storage, tracking, cells)
                runs = _enlist(cells, storage, tracking, grid_run)
            if capacity is not None:
                _introduce(plan, cells, show)
                _train(plan, part, cells, capacity, tracking, grid_run or runs[0], show)
        if asks_for_scores:
            capacity = _score_rest(plan, storage, cluster, show) or capacity
        # not before: another text under the same name is found out last
        show("writing the report" if capacity else _over_words(plan, planned_cells))
        with exclusive(home / "lock"):  # since another launch may end at the same moment
            return _conclude(plan, storage, tracking, grid_run, capacity)


# ---- [1] resolve ----


def _checked_cells(plan: Plan, storage: Path, accept_code: bool) -> list[PlannedCell]:
    """Return the plan's cells; raise `UserError` if a folder holds another run or an outside parent is unfinished."""
    check_writable(storage)
    planned_cells = find_cells(plan, storage)
    changed = [planned.cell.id for planned in planned_cells if planned.changed]
    for planned in planned_cells:
        check_same(planned, planned.changed, plan, accept_code, changed)
    ids = {cell.id for cell in plan.cells}
    for cell in plan.cells:
        if (parent := cell.experiment.parent) is not None and cell.parent not in ids:
            link_to(storage, parent, cell.experiment.phase, cell.id)
    return planned_cells


def _is_over(planned_cells: list[PlannedCell]) -> bool:
    """Return true if no cell is left to train, so that a launch needs no Ray."""
    out = without_parent(planned_cells)
    return all(planned.is_done or planned.cell.id in out for planned in planned_cells)


def _over_words(plan: Plan, planned_cells: list[PlannedCell]) -> str:
    """Return a line for a launch that has nothing to train, with the way to train anew."""
    [first, *others] = [planned.cell.id for planned in planned_cells]
    if not plan.is_grid and not others:
        return f"{first}: already finished. To train it anew, take another --id, or first: bwlm runs delete {first}"
    name = "name in its file" if plan.is_grid else "--id"
    return (
        f"{plan.name}: {_ended_words(planned_cells, 'cell' if plan.is_grid else 'run')}. "
        f"To train all anew, take another {name}; to train one anew, delete it first: bwlm runs delete {first}"
    )


def _ended_words(planned_cells: list[PlannedCell], noun: str) -> str:
    """Return how many cells finished, and the names of the cells that the scheduler kept from it."""
    finished = counted(sum(planned.status.state == "finished" for planned in planned_cells), noun)
    stopped = [planned.cell.id for planned in planned_cells if planned.is_done and planned.status.state == "stopped"]
    never = [planned.cell.id for planned in planned_cells if not planned.is_done]
    if not stopped and not never:
        return f"already finished, {finished}"
    return (
        f"nothing left to train, {finished} finished"
        + (f"; stopped early by the scheduler: {first_of(stopped)}" if stopped else "")
        + (f"; not trained, since an ancestor was stopped early: {first_of(never)}" if never else "")
    )


def _check_room(plan: Plan) -> None:
    """Raise `UserError`, before a text is read, for what Ray would refuse."""
    with loading():
        from bwlm.cluster.session import check_room
    check_room(_needs(plan), plan.launch, len(plan.cells))


def _needs(plan: Plan) -> set[ResourceSettings]:
    return {cell.experiment.resources for cell in plan.cells}


def _open_cluster(plan: Plan, until: contextlib.ExitStack, show: Callable[[str], None]) -> Capacity:
    """Start Ray, or connect to a cluster, until `until` is closed."""
    with loading():
        from bwlm.cluster.session import open_cluster
    capacity = until.enter_context(open_cluster(_needs(plan), plan.launch, len(plan.cells), plan.name))
    _tell_capacity(capacity, show)
    return capacity


def _run_on(cluster: Callable[[], Capacity], jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
    """Run the work with Ray Data. Ray starts here, so that the faults of a text are told before it."""
    from bwlm.text.stream import with_ray

    cluster()
    return with_ray(jobs, work)


def _tell_other_code(cells: list[PlannedCell], show: Callable[[str], None]) -> None:
    """Print a line for each way in which the code of finished cells differs; they are not trained again.

    If cells remain to be trained, one more line says that they get no verdict together with those.
    """
    by_code: dict[str, list[str]] = {}
    for planned in cells:
        if planned.other_code and planned.is_done:
            by_code.setdefault(planned.other_code, []).append(planned.cell.id)
    for how, ids in by_code.items():
        show(f"{counted(len(ids), 'cell')} stay as they are ({ids[0]}, ..), finished by other code ({how})")
    if by_code and not all(planned.is_done for planned in cells):
        show("reports judge the runs of each version of the code apart: cells trained now get no verdict with those")


def _tell_unchecked_text(cells: list[PlannedCell], show: Callable[[str], None]) -> None:
    """Print the cells that an earlier version began on conversations of which it kept no digest by content."""
    begun = [planned for planned in cells if planned.folder.exists() and not planned.is_done]
    found = [one.cell.id for one in begun if counts_files_by_time(one.folder.config(), one.cell.experiment)]
    if found:
        show(
            f"{first_of(found)}: an earlier version named the conversations by the times of their files: whether the "
            "content of data.mixture has changed since then cannot be checked"
        )


def folder_of(plan: Plan, storage: Path) -> Path:
    """Return the folder of a launch's lock: the grid's folder, or that of the first experiment."""
    return grid_folder(storage, plan.name) if plan.is_grid else storage / plan.cells[0].id


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


def _tell_capacity(capacity: Capacity, show: Callable[[str], None]) -> None:
    asks = "it asks for the token that `ray get-auth-token` prints"
    dashboard = f", dashboard at http://{capacity.dashboard} ({asks})" if capacity.dashboard else ""
    show(f"Ray on {capacity.cluster}, {counted(capacity.concurrency, 'cell')} at once{dashboard}")


# ---- [3] enlist ----


@dataclass(frozen=True)
class _Resolved:
    """Cell that can be trained now, with the config, parent and data of its run."""

    planned: PlannedCell
    config: RunConfig
    link: ParentLink | None
    dataset: dict[str, str]


def _resolved(plan: Plan, storage: Path, prepared: dict[str, Prepared], accept_code: bool) -> list[_Resolved]:
    """Raise `UserError` where a cell exists with other settings, or a parent is not what it was."""
    resolved, found = [], find_cells(plan, storage)
    for planned in found:
        cell, parent = planned.cell, planned.cell.experiment.parent
        link = link_to(storage, parent, cell.experiment.phase, cell.id) if parent else None
        config = run_config(plan, cell, prepared[cell.id], storage, link, _compute_of(planned))
        if planned.folder.exists():
            known = planned.folder.config()
            config = resume_config(known, config, begun=planned.status.step > 0)
            is_text = known.identity["data"] != config.identity["data"]  # then it is that of the other cells too
            beside = [other.cell.id for other in found if is_text and other.folder.exists()]
            check_same(planned, changes(known, config), plan, accept_code, beside)
            config = with_code_of(known, config, planned)
        if not planned.is_done:
            from bwlm.grid.hardware import compiled_if_it_can

            config = compiled_if_it_can(config)
        resolved.append(_Resolved(planned, config, link, _dataset(prepared[cell.id])))
    return resolved


def _compute_of(planned: PlannedCell) -> Compute:
    """Return how a cell computes on its workers; of a cell that is done, how it did: its hardware may be gone."""
    if planned.is_done:
        return planned.folder.config().compute
    from bwlm.grid.hardware import plan_compute

    return plan_compute(planned.cell.experiment, planned.cell.shape, planned.cell.steps)


def _enlist_grid(plan: Plan, storage: Path, tracking: Tracking, first: list[_Resolved]) -> str | None:
    """Write the list of the grid's cells and its grid file; return the grid's MLflow run, the parent of its cells'.

    The report of an earlier launch of other cells is kept. Without a grid there is nothing to write, and no run.
    """
    if plan.grid_text is None:
        return None
    home, ids = folder_of(plan, storage), [cell.id for cell in plan.cells]
    keep_report(storage, plan.name, ids)
    write_cells(storage, plan.name, ids)
    write_text(home / GRID_FILE, plan.grid_text)
    return tracking.parent_run(
        home, plan.name, plan.grid_text, _settings([cell.config for cell in first], len(plan.cells))
    )


def _settings(first: list[RunConfig], cells: int) -> GridSettings:
    """Return what the cells of a grid's first phase share, and the values in which they differ."""
    names = sorted({name for config in first for name in config.identity})
    values = {name: list(dict.fromkeys(str(config.identity.get(name)) for config in first)) for name in names}
    common = {name: found[0] for name, found in values.items() if len(found) == 1}
    return GridSettings(cells, common, {name: ", ".join(found) for name, found in values.items() if len(found) > 1})


def _enlist(cells: list[_Resolved], storage: Path, tracking: Tracking, grid_run: str | None) -> list[str]:
    """Make the folders that do not exist yet, and the MLflow runs outside of a grid; return these runs.

    The MLflow run of a phase after base is a child of its base's run, every other run a child of the grid's.
    """
    runs = []
    for cell in cells:
        folder, done = cell.planned.folder, cell.planned.is_done
        folder.keep_tokenizer(Path(cell.config.tokenizer))
        if not folder.exists():
            folder.create(cell.config, cell.link)
        elif not done and folder.lease_holder() is None:
            folder.reconfigure(cell.config)
            if cell.planned.status.step:
                tracking.resumed(folder, max(checkpoint_steps(folder.checkpoints), default=0))
        base = ExperimentFolder(storage, cell.link.chain[0]) if cell.link else None
        above = (tracking.run_of(base) if base else None) or grid_run
        if grid_run is None:
            runs.append(tracking.child_run(folder, above, cell.dataset))
        else:
            tracking.expect(folder, above or grid_run, cell.dataset)
    return runs


def _dataset(prepared: Prepared) -> dict[str, str]:
    digest = prepared.manifest.digest
    if prepared.manifest.sources:
        parts = [f"{source.name} x {source.weight:g}" for source in prepared.manifest.sources]
        return {"name": "conversations", "digest": digest, "source": ", ".join(parts)}
    if prepared.corpus is None:  # the source is gone: the text was packed before
        return {"name": "text", "digest": digest, "source": str(prepared.folder)}
    first = prepared.corpus.train[0].uri
    return {"name": Path(first).parent.name or "text", "digest": digest, "source": first}


def _introduce(plan: Plan, cells: list[_Resolved], show: Callable[[str], None]) -> None:
    """Print what is about to be trained: the phase of a grid's cells, or all of a single experiment."""
    if not plan.is_grid:
        _introduce_experiment(cells[0].planned, show)
    elif len(cells) < len(plan.cells):
        phase = cells[0].planned.cell.experiment.phase
        show(f"{phase}: {counted(len(cells), 'cell')} of {len(plan.cells)}")


def _introduce_experiment(planned: PlannedCell, show: Callable[[str], None]) -> None:
    """Print what a single experiment is about to do, and how it computes."""
    cell, saved = planned.cell, checkpoint_steps(planned.folder.checkpoints)
    step = planned.status.step
    at = f"resumes from step {saved[-1]:,}" if saved else "begins again: it has no checkpoint yet"
    stopped = "" if saved and saved[-1] == step else f", {planned.status.state} at step {step:,}"
    show(
        f"{cell.id}: {cell.experiment.direction}, depth {cell.experiment.depth}, {cell.parameters:,} parameters, "
        f"{cell.steps:,} steps of {cell.experiment.budget.batch_tokens:,} tokens"
        + (f"{stopped}, {at}" if step and not planned.is_done else "")
    )
    show(f"  {_compute_words(planned.folder.config())}")


def _compute_words(config: RunConfig) -> str:
    """Return how the run computes; `bwlm runs show` has the reasons."""
    compute, resources = config.compute, config.experiment.resources
    device = f"{resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else counted(compute.threads, "thread")
    compiled = "compiled" if compute.compile else "not compiled"
    return f"{compute.precision}, {compute.attention} attention, {compiled}, {device} a worker"


# ---- [4] train ----


def _train(
    plan: Plan,
    part: Plan,
    cells: list[_Resolved],
    capacity: Capacity,
    tracking: Tracking,
    run: str,
    show: Callable[[str], None],
) -> None:
    """Train the cells of a part of the plan; `run` is the MLflow run that gets this machine's system metrics."""
    from bwlm.grid.training import train_cells  # imports Ray Tune, which a launch with nothing to train does not need

    planned = [cell.planned for cell in cells]
    storage = planned[0].folder.path.parent
    everything = find_cells(plan, storage)
    out = without_parent(everything)
    shown = [one for one in everything if one.cell.id not in out]
    train_cells(part, planned, shown, capacity.concurrency, storage, tracking, run, show)


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

    capacity = None
    try:
        if evaluations := unscored(plan, storage):
            show(f"scoring {counted(len(evaluations), 'finished cell')} on tasks")
            capacity = cluster()
            evaluate_on_cluster(evaluations)
    except BwlmError as error:
        show(f"tasks: {error}; the same command tries it again")
    return capacity


# ---- [5] report ----


def _conclude(
    plan: Plan, storage: Path, tracking: Tracking, grid_run: str | None, capacity: Capacity | None
) -> LaunchResult:
    """Write the reports, close the MLflow runs and return the result."""
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
