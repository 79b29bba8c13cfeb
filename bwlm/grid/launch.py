"""Launches a grid: prepares its text once, schedules its cells with Ray Tune, keeps MLflow fed, ends with the report.

    [1] resolve  ->  [2] prepare  ->  [3] enlist  ->  [4] train  ->  [5] report

A grid that was interrupted goes on with the same command: finished cells are left alone, the others resume from their
own checkpoints. Tune's own state lies in a scratch folder and is never restored.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bwlm.analysis.report import write_experiment_report, write_grid_report
from bwlm.analysis.tables import CellRow, load_cells
from bwlm.config import Recipe
from bwlm.errors import UserError
from bwlm.grid.progress import GridProgress
from bwlm.grid.spec import Cell, GridPlan, rivals
from bwlm.paths import check_writable, exclusive, write_json
from bwlm.record.fingerprint import differences, identity
from bwlm.record.lineage import ExperimentFolder, RunConfig, Status
from bwlm.record.tracking import Tracking, tracking_uri
from bwlm.text.prepare import Prepared, prepare

log = logging.getLogger(__name__)

_DELIVERY_SECONDS = 3.0


@dataclass(frozen=True)
class GridResult:
    cells: list[CellRow]
    report: Path
    tracking_uri: str
    dashboard: str | None

    @property
    def complete(self) -> bool:
        return all(cell.state in ("finished", "stopped") for cell in self.cells)


@dataclass(frozen=True)
class PlannedCell:
    """A cell, its folder, and what was found there."""

    cell: Cell
    folder: ExperimentFolder
    status: Status
    changed: list[str]
    """Settings in which the run that is there differs; its text may differ besides, once that is prepared."""

    @property
    def is_done(self) -> bool:
        return self.status.ended and self.status.state != "failed"


def grid_folder(storage: Path, name: str) -> Path:
    return storage / "grids" / name


def find_cells(plan: GridPlan, storage: Path) -> list[PlannedCell]:
    """What is already there, without preparing or starting anything."""
    return [_find_cell(cell, ExperimentFolder(storage, cell.id)) for cell in plan.cells]


def _find_cell(cell: Cell, folder: ExperimentFolder) -> PlannedCell:
    if not folder.exists():
        return PlannedCell(cell, folder, Status(), [])
    known = folder.config().identity
    precision = cell.experiment.compute.precision
    planned = identity(
        cell.experiment,
        data=known["data"],
        tokenizer=known["tokenizer"],
        precision=known["precision"] if precision == "auto" else precision,
        steps=cell.steps,
    )
    return PlannedCell(cell, folder, folder.status(), differences(known, planned))


def run_grid(plan: GridPlan, storage: Path, show: Callable[[str], None]) -> GridResult:
    """Runs every cell that is not done. Raises `UserError` before anything is made where it can never work."""
    check_writable(storage)
    from bwlm.grid import session  # sets Ray's environment, hence before ray
    from bwlm.text.stream import pack_corpus

    recipes = _recipes(plan)
    uri = tracking_uri(storage, plan.grid.launch.tracking_uri)
    _check_tracking(uri)
    needs = {cell.experiment.resources for cell in plan.cells}
    with session.cluster(needs, plan.grid.launch.concurrency, len(plan.cells)) as room:
        show(f"Ray on {room.cluster}, {room.concurrency} cells at once" + _dashboard_line(room.dashboard))
        prepared = {key: prepare(recipe, storage, pack_corpus, show) for key, recipe in recipes.items()}
        configs = {cell.id: _run_config(plan, cell, prepared[_recipe_key(cell.experiment)]) for cell in plan.cells}
        cells, tracking, parent = _enlist(plan, storage, uri, configs, prepared)
        _train(plan, storage, cells, room, tracking, parent)
        show("writing reports")
        with exclusive(grid_folder(storage, plan.grid.name) / "lock"):  # another launch may end at the same moment
            return _conclude(plan, storage, tracking, parent, room.dashboard)


def _check_tracking(uri: str) -> None:
    """A server that does not answer is told before anything is prepared."""
    from bwlm.grid.session import check_answers

    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_answers(
            parts.hostname, port, f"tracking: {parts.hostname}:{port}", "start the server, or unset MLFLOW_TRACKING_URI"
        )


def _dashboard_line(dashboard: str | None) -> str:
    return f", dashboard at http://{dashboard}" if dashboard else ""


# ---- [2] prepare ----


def _recipe_key(recipe: Recipe) -> str:
    """Cells that agree in these share a prepared corpus."""
    return recipe.model_dump_json(include={"data": True, "tokenizer": True, "model": {"sequence_length"}})


def _recipes(plan: GridPlan) -> dict[str, Recipe]:
    return {_recipe_key(cell.experiment): cell.experiment for cell in plan.cells}


def _dataset(prepared: Prepared) -> dict[str, str]:
    first = prepared.corpus.train[0].uri
    return {"name": Path(first).parent.name or "text", "digest": prepared.manifest.digest, "source": first}


# ---- [3] enlist ----


def _enlist(
    plan: GridPlan,
    storage: Path,
    uri: str,
    configs: dict[str, RunConfig],
    prepared: dict[str, Prepared],
) -> tuple[list[PlannedCell], Tracking, str]:
    """Makes the folders and the MLflow runs that do not exist yet; two launches of one grid make them once.

    Raises `UserError` where a cell exists with other settings.
    """
    folder = grid_folder(storage, plan.grid.name)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock"):
        cells = find_cells(plan, storage)
        for planned in cells:
            _check_identity(planned, configs[planned.cell.id], plan)
        tracking = Tracking(uri, storage)
        write_json(folder / "grid.json", {"name": plan.grid.name, "cells": [cell.id for cell in plan.cells]})
        parent = tracking.parent_run(folder, plan.grid.name, plan.source)
        for planned in cells:
            if not planned.folder.exists():
                planned.folder.create(configs[planned.cell.id])
            tracking.child_run(planned.folder, parent, _dataset(prepared[_recipe_key(planned.cell.experiment)]))
    return cells, tracking, parent


def _run_config(plan: GridPlan, cell: Cell, prepared: Prepared) -> RunConfig:
    experiment = cell.experiment
    precision = _precision(experiment.compute.precision, experiment.resources.gpus_per_worker)
    fields = identity(
        experiment,
        data=prepared.manifest.digest,
        tokenizer=prepared.tokenizer.digest,
        precision=precision,
        steps=cell.steps,
    )
    return RunConfig(
        id=cell.id,
        experiment=experiment,
        identity=fields,
        steps=cell.steps,
        precision=precision,
        corpus=str(prepared.folder),
        tokenizer=str(prepared.tokenizer_folder),
        grid=plan.grid.name,
    )


def _precision(asked: str, gpus: int) -> str:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if asked != "auto":
        return asked
    if gpus:
        return "bfloat16"
    import torch

    capability = torch.cpu.get_capabilities()
    return "bfloat16" if capability.get("avx512_bf16") or capability.get("amx_bf16") else "float32"


def _check_identity(planned: PlannedCell, config: RunConfig, plan: GridPlan) -> None:
    if not planned.folder.exists():
        return
    changed = differences(planned.folder.config().identity, config.identity)
    if changed:
        raise UserError(
            f"{plan.grid.name}: cell {planned.cell.id} exists with other settings ({'; '.join(changed)}): "
            f"give the grid another name, or remove {planned.folder.path}"
        )


# ---- [4] train ----


def _train(plan: GridPlan, storage: Path, cells: list[PlannedCell], room: Any, tracking: Tracking, parent: str) -> None:
    unfinished = [planned for planned in cells if not planned.is_done]
    if not unfinished:
        return
    # the longest first: what is left at the end is short, so workers do not idle
    unfinished.sort(key=lambda planned: -planned.cell.flops)
    scratch = Path(tempfile.mkdtemp(prefix="bwlm-tune-"))
    monitor = tracking.monitor_system(parent)
    try:
        with (
            GridProgress(plan.cells, {p.cell.id: p.status for p in cells}, storage) as progress,
            _delivery(tracking, unfinished),
        ):
            _tune(plan, storage, unfinished, room.concurrency, scratch, progress)
    except KeyboardInterrupt:
        tracking.interrupted([planned.folder for planned in unfinished], parent)
        raise
    finally:
        monitor.finish()
        shutil.rmtree(scratch, ignore_errors=True)


def _tune(
    plan: GridPlan,
    storage: Path,
    unfinished: list[PlannedCell],
    concurrency: int,
    scratch: Path,
    progress: GridProgress,
) -> None:
    import ray.tune
    from ray.tune.tune_config import TuneConfig

    from bwlm.grid.scheduling import CellStates, make_scheduler
    from bwlm.grid.session import train_cell, trial_resources

    shared = {"storage": str(storage), "scratch": str(scratch)}
    resources = {planned.cell.id: planned.cell.experiment.resources for planned in unfinished}
    strata = {planned.cell.id: rivals(planned.cell.experiment) for planned in unfinished}
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(train_cell, lambda config: trial_resources(resources[config["cell"]])),
        param_space={**shared, "cell": ray.tune.grid_search([planned.cell.id for planned in unfinished])},
        tune_config=TuneConfig(
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            scheduler=make_scheduler(plan.grid.scheduler, max(p.cell.steps for p in unfinished), strata),
        ),
        run_config=ray.tune.RunConfig(
            name=plan.grid.name,
            storage_path=str(scratch),
            failure_config=ray.tune.FailureConfig(max_failures=plan.grid.launch.retries),
            callbacks=[CellStates(storage, progress)],
            verbose=0,
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def _delivery(tracking: Tracking, cells: list[PlannedCell]) -> Iterator[None]:
    """Feeds MLflow from the journals, in the background, for the time of the block."""
    done = threading.Event()

    def deliver() -> None:
        while not done.wait(_DELIVERY_SECONDS):
            for planned in cells:
                if done.is_set() or not tracking.try_deliver(planned.folder):
                    break

    thread = threading.Thread(target=deliver, name="mlflow-delivery", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ---- [5] report ----


def _conclude(plan: GridPlan, storage: Path, tracking: Tracking, parent: str, dashboard: str | None) -> GridResult:
    ids = [cell.id for cell in plan.cells]
    for planned in find_cells(plan, storage):
        if planned.status.step:
            artifacts = write_experiment_report(planned.folder)
            tracking.close_child(planned.folder, planned.status, artifacts)
    rows = load_cells(storage, ids)
    folder = grid_folder(storage, plan.grid.name)
    files = write_grid_report(folder, plan.grid.name, storage, ids)
    result = GridResult(rows, files[0], tracking.uri, dashboard)
    tracking.close_parent(parent, files, result.complete)
    return result
