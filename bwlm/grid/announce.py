"""Lines that a launch prints on its cells, on the cluster, and on what it leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bwlm.format import counted, first_of
from bwlm.grid.cells import PlannedCell, counts_files_by_time
from bwlm.grid.enlist import ResolvedCell
from bwlm.plan.spec import Plan
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.run_config import RunConfig

if TYPE_CHECKING:
    from bwlm.cluster.capacity import Capacity


def over_words(plan: Plan, planned_cells: list[PlannedCell]) -> str:
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


def tell_other_code(cells: list[PlannedCell], show: Callable[[str], None]) -> None:
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


def tell_unchecked_text(cells: list[PlannedCell], show: Callable[[str], None]) -> None:
    """Print the cells that an earlier version began on conversations of which it kept no digest by content."""
    begun = [planned for planned in cells if planned.folder.exists() and not planned.is_done]
    found = [one.cell.id for one in begun if counts_files_by_time(one.folder.config(), one.cell.experiment)]
    if found:
        show(
            f"{first_of(found)}: an earlier version named the conversations by the times of their files: whether the "
            "content of data.mixture has changed since then cannot be checked"
        )


def tell_capacity(capacity: Capacity, show: Callable[[str], None]) -> None:
    """Print what trains the cells, and where its dashboard is."""
    asks = "it asks for the token that `ray get-auth-token` prints"
    dashboard = f", dashboard at http://{capacity.dashboard} ({asks})" if capacity.dashboard else ""
    show(f"Ray on {capacity.cluster}, {counted(capacity.concurrency, 'cell')} at once{dashboard}")


def introduce(plan: Plan, cells: list[ResolvedCell], show: Callable[[str], None]) -> None:
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
