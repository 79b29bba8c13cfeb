"""Cells on their way to training: their configs, folders and MLflow runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bwlm.grid.cells import PlannedCell, changes, check_same, find_cells, resume_config, run_config, with_code_of
from bwlm.model.compute import Compute
from bwlm.paths import write_text
from bwlm.plan.spec import Plan
from bwlm.record.bucket import fetch_named_weights
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.grids import GRID_FILE, grid_folder, keep_report, write_cells
from bwlm.record.lineage import ParentLink
from bwlm.record.mlflow_view import GridSettings
from bwlm.record.parent import link_to
from bwlm.record.run_config import RunConfig
from bwlm.record.tracking import Tracking
from bwlm.text.prepare import Prepared


def folder_of(plan: Plan, storage: Path) -> Path:
    """Return the folder of a launch's lock: the grid's folder, or that of the first experiment."""
    return grid_folder(storage, plan.name) if plan.is_grid else storage / plan.cells[0].id


@dataclass(frozen=True)
class ResolvedCell:
    """Cell that can be trained now, with the config, parent and data of its run."""

    planned: PlannedCell
    config: RunConfig
    link: ParentLink | None
    dataset: dict[str, str]


def resolved_cells(plan: Plan, storage: Path, prepared: dict[str, Prepared], accept_code: bool) -> list[ResolvedCell]:
    """Return the cells of a plan with their configs.

    Raises `UserError` where a cell exists with other settings, or a parent is not what it was.
    """
    resolved, found = [], find_cells(plan, storage)
    for planned in found:
        cell, parent = planned.cell, planned.cell.experiment.parent
        if parent:
            fetch_named_weights(storage, parent)
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
        resolved.append(ResolvedCell(planned, config, link, _dataset(prepared[cell.id])))
    return resolved


def _compute_of(planned: PlannedCell) -> Compute:
    """Return how a cell computes on its workers; of a cell that is done, how it did: its hardware may be gone."""
    if planned.is_done:
        return planned.folder.config().compute
    from bwlm.grid.hardware import plan_compute

    return plan_compute(planned.cell.experiment, planned.cell.shape, planned.cell.steps)


def enlist_grid(plan: Plan, storage: Path, tracking: Tracking, first: list[ResolvedCell]) -> str | None:
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


def enlist_cells(cells: list[ResolvedCell], storage: Path, tracking: Tracking, grid_run: str | None) -> list[str]:
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
