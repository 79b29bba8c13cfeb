"""Launches a grid, or a single experiment: prepares its text, schedules its cells, keeps MLflow fed, writes the report.

    [1] resolve  ->  [2] prepare  ->  [3] enlist  ->  [4] train  ->  [5] report

What was interrupted goes on with the same command: finished cells are left alone, the others resume from their own
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bwlm.analysis.report import GRID_FILE, REPORT, write_experiment_report, write_grid_report
from bwlm.analysis.stats import counted
from bwlm.analysis.tables import CellRow, load_cells
from bwlm.grid.cells import PlannedCell, check_same, find_cells, going_on, run_config, text_key
from bwlm.grid.spec import Plan
from bwlm.paths import check_writable, exclusive, write_atomic
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.fingerprint import differences
from bwlm.record.lineage import RunConfig, grid_folder, write_cells
from bwlm.record.tracking import Tracking, tracking_uri
from bwlm.text.prepare import Prepared, prepare


@dataclass(frozen=True)
class LaunchResult:
    cells: list[CellRow]
    report: Path
    tracking_uri: str
    dashboard: str | None

    @property
    def complete(self) -> bool:
        return all(cell.state in ("finished", "stopped") for cell in self.cells)


def run_plan(plan: Plan, storage: Path, show: Callable[[str], None]) -> LaunchResult:
    """Runs every cell that is not done. Raises `UserError` before anything is made where it can never work.

    Raises `SystemExit` with `TERMINATED` if this process is asked to end meanwhile.
    """
    check_writable(storage)
    for planned in find_cells(plan, storage):
        check_same(planned, planned.changed, plan)
    from bwlm.grid.cluster import cluster
    from bwlm.grid.training import train_cells
    from bwlm.text.stream import pack_corpus

    texts = {text_key(cell.experiment): cell.experiment for cell in plan.cells}
    uri = tracking_uri(storage, plan.launch.tracking_uri)
    _check_tracking(uri)
    needs = {cell.experiment.resources for cell in plan.cells}
    home = folder_of(plan, storage)
    with cluster(needs, plan.launch.concurrency, len(plan.cells)) as room:
        show(f"Ray on {room.cluster}, {counted(room.concurrency, 'cell')} at once{_dashboard(room.dashboard)}")
        prepared = {key: prepare(recipe, storage, pack_corpus, show) for key, recipe in texts.items()}
        configs = {cell.id: run_config(plan, cell, prepared[text_key(cell.experiment)]) for cell in plan.cells}
        home.mkdir(parents=True, exist_ok=True)
        with exclusive(home / "lock"):  # two launches of one plan make its folders and runs once
            cells, tracking, run = _enlist(plan, storage, uri, configs, prepared)
        if not plan.is_grid:
            _introduce(cells[0], show)
        train_cells(plan, cells, room.concurrency, storage, tracking, run)
        show("writing the report")
        with exclusive(home / "lock"):  # another launch may end at the same moment
            return _conclude(plan, storage, tracking, run, room.dashboard)


def folder_of(plan: Plan, storage: Path) -> Path:
    """Where a launch leaves its report: a grid's folder, or the experiment's own."""
    return grid_folder(storage, plan.name) if plan.is_grid else storage / plan.name


def _check_tracking(uri: str) -> None:
    """A server that does not answer is told before anything is prepared."""
    from bwlm.grid.cluster import check_answers

    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_answers(
            parts.hostname, port, f"tracking: {parts.hostname}:{port}", "start the server, or unset MLFLOW_TRACKING_URI"
        )


def _dashboard(address: str | None) -> str:
    return f", dashboard at http://{address}" if address else ""


# ---- [3] enlist ----


def _enlist(
    plan: Plan, storage: Path, uri: str, configs: dict[str, RunConfig], prepared: dict[str, Prepared]
) -> tuple[list[PlannedCell], Tracking, str]:
    """Makes the folders and the MLflow runs that do not exist yet; gives the run that stands for the whole launch.

    A grid has a run of its own above those of its cells. Raises `UserError` where a cell exists with other settings.
    """
    from bwlm.grid.hardware import compiled_if_it_can

    cells = find_cells(plan, storage)
    for planned in cells:
        asked = configs[planned.cell.id]
        if planned.folder.exists():
            known = planned.folder.config()
            asked = going_on(known, asked, begun=planned.status.step > 0)
            check_same(planned, differences(known.identity, asked.identity), plan)
        if not planned.is_done:
            configs[planned.cell.id] = compiled_if_it_can(asked)
    tracking = Tracking(uri, storage)
    parent = None
    if plan.grid_text is not None:
        home = folder_of(plan, storage)
        write_cells(storage, plan.name, [cell.id for cell in plan.cells])
        write_atomic(home / GRID_FILE, plan.grid_text.encode())
        parent = tracking.parent_run(home, plan.name, plan.grid_text)
    runs = []
    for planned in cells:
        if not planned.folder.exists():
            planned.folder.create(configs[planned.cell.id])
        elif not planned.is_done and planned.folder.lease_holder() is None:
            planned.folder.reconfigure(configs[planned.cell.id])
        runs += [tracking.child_run(planned.folder, parent, _dataset(prepared[text_key(planned.cell.experiment)]))]
    return cells, tracking, parent or runs[0]


def _dataset(prepared: Prepared) -> dict[str, str]:
    first = prepared.corpus.train[0].uri
    return {"name": Path(first).parent.name or "text", "digest": prepared.manifest.digest, "source": first}


def _introduce(planned: PlannedCell, show: Callable[[str], None]) -> None:
    """What a single experiment is about to do, and how."""
    cell, saved = planned.cell, checkpoint_steps(planned.folder.checkpoints)
    step = planned.status.step
    ahead = f"goes on from its checkpoint of step {saved[-1]:,}" if saved else "begins again: it has no checkpoint yet"
    show(
        f"{cell.id}: {cell.experiment.direction}, depth {cell.experiment.depth}, {cell.parameters:,} parameters, "
        f"{cell.steps:,} steps of {cell.experiment.budget.batch_tokens:,} tokens"
        + (f", {planned.status.state} at step {step:,}, {ahead}" if step and not planned.is_done else "")
    )
    for line in _compute_lines(planned.folder.config()):
        show(line)


def _compute_lines(config: RunConfig) -> list[str]:
    """How the run computes on its hardware, and why."""
    return [f"  {choice}: {reason}" for choice, reason in config.compute.reasons.items()]


# ---- [5] report ----


def _conclude(plan: Plan, storage: Path, tracking: Tracking, run: str, dashboard: str | None) -> LaunchResult:
    ids = [cell.id for cell in plan.cells]
    for planned in find_cells(plan, storage):
        if planned.status.step:
            artifacts = write_experiment_report(planned.folder, insides=not plan.is_grid)
            tracking.close_child(planned.folder, planned.status, artifacts)
    home = folder_of(plan, storage)
    result = LaunchResult(load_cells(storage, ids), home / REPORT, tracking.uri, dashboard)
    if plan.is_grid:
        files = write_grid_report(storage, plan.name)
        tracking.close_parent(run, files, result.complete)
    return result
