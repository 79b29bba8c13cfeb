"""Cells and their folders: comparison with the plan, and the config of a new or resumed run."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlm.config import Experiment, TaskSettings
from bwlm.errors import UserError
from bwlm.model.compute import Compute
from bwlm.phases import PHASES
from bwlm.plan.spec import Cell, Plan
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.code import IDENTITY_VERSION, changed_modules
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import INHERITED, differences, identity, inherited, modules_of
from bwlm.record.lineage import ParentLink
from bwlm.record.run_config import RunConfig

if TYPE_CHECKING:
    from bwlm.text.prepare import Prepared


@dataclass(frozen=True)
class PlannedCell:
    """Cell of a plan, with its folder and the state of the run in it."""

    cell: Cell
    folder: ExperimentFolder
    status: Status
    changed: list[str]
    """Settings in which the run in the folder differs; the digest of its text is compared once the text is prepared."""
    other_code: str = ""
    """Difference between today's code and the code that trained the run; '' if they agree."""

    @property
    def other_text(self) -> str:
        """The text that the run in the folder read, where the plan names another; '' if it names the same."""
        read = text_of(self.folder.config().experiment) if self.folder.exists() else ""
        return read if read != text_of(self.cell.experiment) else ""

    @property
    def is_done(self) -> bool:
        """True for a cell that a launch leaves as it is: finished, or stopped by the scheduler."""
        return self.status.ended and self.status.state != "failed"

    @property
    def has_begun(self) -> bool:
        """True if training resumes from a checkpoint."""
        return not self.is_done and bool(checkpoint_steps(self.folder.checkpoints))


def find_cells(plan: Plan, storage: Path) -> list[PlannedCell]:
    """Return the cells of a plan with what is in their folders; prepares and starts nothing.

    A cell that the plan continues is one that was interrupted.
    """
    return [_find_cell(cell, ExperimentFolder(storage, cell.id), cell.id in plan.continued) for cell in plan.cells]


def waiting_cells(planned: list[PlannedCell]) -> int:
    """Return how many cells could not begin, without those whose ancestor was stopped early."""
    out = without_parent(planned)
    return sum(not one.folder.exists() and one.cell.id not in out for one in planned)


def without_parent(planned: list[PlannedCell]) -> set[str]:
    """Return the cells whose ancestor was stopped early by the scheduler: they will not run."""
    stopped, out = set[str](), set[str]()
    for one in planned:  # parents stand before their children
        if one.cell.parent in stopped | out:
            out.add(one.cell.id)
        elif one.is_done and one.status.state == "stopped":
            stopped.add(one.cell.id)
    return out


def _find_cell(cell: Cell, folder: ExperimentFolder, is_continued: bool) -> PlannedCell:
    if not folder.exists():
        return PlannedCell(cell, folder, Status(), [])
    status = folder.status()
    if is_continued and status.state == "stopped":
        status = replace(status, reason="")
    known = folder.config().identity
    precision = cell.experiment.compute.precision
    planned = identity(
        cell.experiment,
        data=known["data"],
        tokenizer=known["tokenizer"],
        precision=known["precision"] if precision == "auto" else precision,
        steps=cell.steps,
        parent={name: value for name, value in known.items() if name in INHERITED},
    )
    return PlannedCell(
        cell, folder, status, other_settings(known, planned), folder.config().other_code(cell.experiment)
    )


def other_settings(known: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """List the fields besides the code in which two identities differ."""
    return differences({**known, "code": ""}, {**planned, "code": ""})


def changes(known: RunConfig, requested: RunConfig) -> list[str]:
    """List the fields besides the code in which a launch differs from an existing run, its text by name.

    The tokenizer of another text is another one, and is not listed beside it.
    """
    one, other = known.identity, requested.identity
    if one["data"] == other["data"]:
        return [re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", field) for field in other_settings(one, other)]
    places = [text_of(config.experiment) for config in (known, requested)]
    digests = f"digest {one['data'][:12]} -> {other['data'][:12]}"
    text = f"text: {' -> '.join(places)}" if places[0] != places[1] else f"text of {places[0]}: {digests}"
    return [text, *other_settings(one | {"data": "", "tokenizer": ""}, other | {"data": "", "tokenizer": ""})]


def text_of(experiment: Experiment) -> str:
    """Return the places of a run's text, as its settings name them."""
    if PHASES[experiment.phase].reads_documents:
        return ", validation ".join(filter(None, [experiment.data.source, experiment.data.validation]))
    return ", ".join(f"{name} x {weight:g}" for name, weight in experiment.data.mixture.items())


def check_same(
    planned: PlannedCell, changed: list[str], plan: Plan, accept_code: bool, beside: Sequence[str] = ()
) -> None:
    """Raise `UserError` if the cell's folder holds a run with other settings, or one that other code has begun.

    `beside` are the ids of other cells that have changed too: the message says how to delete all of them.

    `accept_code` lets today's code resume a run that other code has begun. A run that other code finished stays as it
    is, and a run without a checkpoint is trained by today's code: neither is an error.
    """
    ids = [planned.cell.id, *(other for other in beside if other != planned.cell.id)]
    is_whole = plan.is_grid and {*ids} == {cell.id for cell in plan.cells}
    delete = f"delete {'it' if len(ids) == 1 else 'them'}: bwlm runs delete {plan.name if is_whole else ' '.join(ids)}"
    if not changed:
        if planned.other_code and planned.has_begun and not accept_code:
            how = planned.other_code.removeprefix("code: ")
            raise UserError(
                f"{plan.name}: {planned.cell.id} was begun by other code ({how}): go back to that code, resume with "
                f"this one by --accept-code, after which no report compares it with runs of one version, or {delete}"
            )
        return
    if plan.is_grid:
        raise UserError(
            f"{plan.name}: {_cells_of(ids)} with other settings ({'; '.join(changed)}): "
            f"give the grid another name, or {delete}"
        )
    raise UserError(f"{plan.name}: exists with other settings ({'; '.join(changed)}): take another --id, or {delete}")


def _cells_of(ids: list[str]) -> str:
    return f"cell {ids[0]} exists" if len(ids) == 1 else f"cell {ids[0]} and {len(ids) - 1} more exist"


def resume_config(known: RunConfig, requested: RunConfig, begun: bool = True) -> RunConfig:
    """Return the config of an existing run, with what this launch may set: where and how fast it resumes, its tasks.

    Kernels, batch size and compilation were chosen when the run was planned, maybe on another machine. Unless this
    launch sets `compute` otherwise, they stay once the run has begun, or if this machine would choose another
    precision. Precision is part of the run's identity: it stays unless this launch names one.
    """
    settings = requested.experiment
    changing = ("resources", "checkpoint", "compute", "evaluation", "tasks")
    update = {name: getattr(settings, name) for name in changing}
    # batch size and kernels are chosen for a precision: a choice for another precision does not fit this run
    stays = begun or requested.compute.precision != known.compute.precision
    compute = known.compute if stays and settings.compute == known.experiment.compute else requested.compute
    identity = dict(requested.identity)
    if settings.compute.precision == "auto":
        compute = replace(compute, precision=known.compute.precision)
        identity["precision"] = known.identity["precision"]
    version = requested.identity_version
    if counts_files_by_time(known, settings):  # for the launches after this one too
        identity["data"], version = known.identity["data"], known.identity_version
    compute = compute.with_threads(settings.resources.cpus_per_worker)
    return replace(
        known,
        experiment=known.experiment.model_copy(update=update),
        identity=identity,
        compute=compute,
        corpus=requested.corpus,  # the same text, in another folder if it had to be prepared again
        tokenizer=requested.tokenizer,
        identity_version=version,
        modules=requested.modules,
    )


def counts_files_by_time(known: RunConfig, settings: Experiment) -> bool:
    """Return true for a run of the same mixture and files whose digest of rows holds the times of its files.

    Before identity version 3 the ids of conversations held those times. The ids order no rows and are no targets, so
    they change no result. Nothing says whether the files still hold what they held then.
    """
    one, other = ((of.data.mixture, of.data.skip_invalid, _files_read(of)) for of in (settings, known.experiment))
    return known.identity_version < 3 and bool(settings.data.mixture) and one == other


def _files_read(experiment: Experiment) -> dict[str, TaskSettings]:
    """Return the files of the tasks that are trained on: those of tasks that score a run are another thing."""
    return {name: files for name, files in experiment.tasks.items() if name in experiment.data.mixture}


def with_code_of(known: RunConfig, config: RunConfig, planned: PlannedCell) -> RunConfig:
    """Return `config`, this launch's config of an existing run, with the code that trained the run so far.

    A run without a checkpoint begins again, so only today's code trains it. If other code resumes the run, the config
    records that code and the step from which it trains.
    """
    if not planned.is_done and not planned.has_begun:
        return config
    accepted = list(known.accepted_code)
    if planned.has_begun and planned.other_code:
        accepted.append(
            {
                "step": checkpoint_steps(planned.folder.checkpoints)[-1],
                "time": time.time(),
                "code": config.identity["code"],
                "modules": changed_modules(known.modules, config.modules),
            }
        )
    return replace(
        config,
        identity=config.identity | {"code": known.identity["code"]},
        identity_version=known.identity_version,
        modules=config.modules if planned.has_begun else known.modules,
        accepted_code=accepted,
    )


def run_config(
    plan: Plan, cell: Cell, prepared: Prepared, storage: Path, link: ParentLink | None, compute: Compute
) -> RunConfig:
    """Return the config of a new run of the cell; its parent, if it has one, has finished."""
    fields = identity(
        cell.experiment,
        data=prepared.manifest.digest,
        tokenizer=prepared.tokenizer.digest,
        precision=compute.precision,
        steps=cell.steps,
        parent=inherited(ExperimentFolder(storage, link.parent).config().compared, link) if link else None,
    )
    return RunConfig(
        id=cell.id,
        experiment=cell.experiment,
        identity=fields,
        steps=cell.steps,
        compute=compute,
        corpus=str(prepared.folder),
        tokenizer=str(prepared.tokenizer_folder),
        grid=plan.name if plan.is_grid else None,
        identity_version=IDENTITY_VERSION,
        modules=modules_of(cell.experiment),
    )
