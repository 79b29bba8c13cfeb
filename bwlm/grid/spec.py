"""What is to be trained: a grid file or the settings of one experiment, resolved to cells before anything runs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from bwlm.config import PHASES, Depth, DirectionName, Experiment, LearningRate, Recipe, Seed, Settings
from bwlm.errors import UserError, nearest
from bwlm.grid.phases import check_phase_names, inherit, phase_content, split_phases, with_defaults
from bwlm.model.shape import GPTConfig, batch_tokens_for, count_parameters, flops_per_token
from bwlm.paths import LONGEST_ID, check_id, storage_root
from bwlm.record.family import check_order
from bwlm.record.lineage import open_finished, shape_of
from bwlm.settings_file import Document, assign, dump_yaml, field_names, holds, load_yaml, override, validate


class SchedulerSettings(Settings):
    kind: Literal["fifo", "asha"] = Field(
        "fifo", description="asha stops cells early, within a direction and depth; fifo none"
    )
    grace_steps: int = Field(100, ge=1, description="asha: no cell is stopped before this step")
    reduction_factor: int = Field(2, ge=2, description="asha: one in so many goes on at each rung")


class LaunchSettings(Settings):
    concurrency: int | None = Field(
        None, ge=1, description="cells at once; default: as many as the cluster has room for"
    )
    retries: int = Field(2, ge=0, description="how often a cell that crashed is taken up again")
    grace_seconds: float = Field(
        20.0, ge=0, description="after SIGTERM, for a step and a checkpoint; what has not ended by then is left behind"
    )
    max_cells: int = Field(1000, ge=1, le=100_000, description="a grid of more cells is refused")
    storage: str | None = Field(None, description="folder of experiments; default: BWLM_STORAGE, else runs/")
    tracking_uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI, else SQLite below the storage")


class Grid(Recipe):
    """A grid file, at its fullest. `lr` multiplies the learning rate of every parameter group."""

    name: str
    axes: dict[str, list[Any]]
    also: list[dict[str, list[Any]]] = Field(default_factory=list)
    direction: DirectionName | None = None
    depth: Depth | None = None
    lr: LearningRate | None = None
    seed: Seed | None = None
    phases: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="what follows each cell: by phase its settings, and axes of its own; its cells are their children",
    )
    scheduler: SchedulerSettings = SchedulerSettings()
    launch: LaunchSettings = LaunchSettings()


_GRID_ONLY = ("name", "axes", "also", "phases", "scheduler", "launch")
_IN_ID = ("direction", "depth", "lr", "seed")
_AXES_BESIDES = (*_IN_ID, "parent")
"""Fields outside of a section that cells can differ in."""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid and what it will cost."""

    id: str
    experiment: Experiment
    steps: int

    @property
    def shape(self) -> GPTConfig:
        return shape_of(self.experiment)

    @property
    def parameters(self) -> int:
        return count_parameters(self.shape).total

    @property
    def tokens(self) -> int:
        return self.steps * self.experiment.budget.batch_tokens

    @property
    def flops(self) -> int:
        return self.tokens * flops_per_token(self.shape)


@dataclass(frozen=True)
class Plan:
    """The cells of a grid, a single experiment or a chain of them, and how they are run."""

    name: str
    """Of the grid, or the experiment's id."""
    cells: tuple[Cell, ...]
    launch: LaunchSettings
    scheduler: SchedulerSettings
    grid_text: str | None
    """The grid file with what `--set` changed, for the record; None for a single experiment."""

    @property
    def is_grid(self) -> bool:
        return self.grid_text is not None


def generations(cells: tuple[Cell, ...]) -> list[tuple[Cell, ...]]:
    """Cells by what must have finished before: those without a parent among them, their children, and so on."""
    number: dict[str, int] = {}
    for cell in cells:  # parents stand before their children
        number[cell.id] = number.get(cell.experiment.parent or "", -1) + 1
    return [tuple(cell for cell in cells if number[cell.id] == n) for n in sorted(set(number.values()))]


def load_grid(path: Path, settings: list[str], storage: str | None = None) -> Plan:
    """Reads, overrides and resolves a grid file; its parents, if it has any, lie in `storage` or where it says.

    Raises `UserError` for every fault, before anything is made.
    """
    document = override(load_yaml(path), settings)
    grid = validate(Grid, *_with_first_values(document))
    check_id(grid.name, document.where("name"))
    blocks = _blocks(document)
    following = _following(document, grid.phase)
    count = sum(map(_product_size, blocks.values())) * _family_size(following, document)
    if count > grid.launch.max_cells:  # counted before any is built: a slip of the pen can ask for billions
        raise UserError(
            f"{document.where('axes')}: {count} cells, more than launch.max_cells={grid.launch.max_cells}: "
            "remove values or raise the cap"
        )
    family = _Family(document, following, storage_root(storage or grid.launch.storage))
    cells = _with_resources(tuple(_cells(blocks, family)), document)
    if grid.scheduler.kind == "asha":
        _check_asha(cells, document)
    text = dump_yaml(document.content) if settings else path.read_text("utf-8")
    return Plan(grid.name, cells, grid.launch, grid.scheduler, text)


def plan_experiment(
    flags: Mapping[str, Any], settings: list[str], chosen_id: str | None, storage: str | None = None
) -> Plan:
    """One experiment from the command line, or with `phase: base,mid,sft` a chain; `settings` go over `flags`.

    Raises `UserError` naming the flag or field.
    """
    first, *following = split_phases(flags["phase"], "--phase")
    flags = dict(flags) | {"phase": first, **({"phases": {phase: {} for phase in following}} if following else {})}
    document = override(Document("--set", flags, {name: f"--{name}" for name in flags}), settings)
    for name in ("direction", "depth"):
        if document.content["phase"] == "base" and name not in document.content:
            raise UserError(f"--{name}: missing: a base run has no parent to take it from")
    blocks = document.content.get("phases", {})
    if isinstance(blocks, dict) and (unknown := set(blocks) - set(following)):
        raise UserError(f"--set phases.{min(unknown)}: not a phase of this command's --phase: add it there")
    following = _following(document, document.content["phase"])
    family = _Family(document, following, storage_root(storage))
    experiment = family.first({name: value for name, value in document.content.items() if name != "phases"}, document)
    usual = f"{experiment.phase}_{date.today():%Y%m%d}_{experiment.direction}_d{experiment.depth}"
    run = check_id(chosen_id or usual, "--id")
    cells = tuple(family.cells(experiment, run, document.content, document))
    return Plan(run, _with_resources(cells, document), LaunchSettings(), SchedulerSettings(), None)


def resolve_steps(experiment: Experiment) -> int:
    """The horizon in steps; tokens per parameter count matrices and output head, as in nanochat.

    Raises `UserError` if the learning rate's way up and down does not fit into it.
    """
    steps, optim = _horizon(experiment), experiment.optim
    down = round(optim.warmdown_ratio * steps)
    if optim.warmup_steps is not None and optim.warmup_steps + down > steps:
        raise UserError(
            f"optim.warmup_steps: {optim.warmup_steps} steps up and {down} down (optim.warmdown_ratio) do not fit into "
            f"a run of {steps} steps: lower one of them"
        )
    return steps


def _horizon(experiment: Experiment) -> int:
    budget, shape = experiment.budget, shape_of(experiment)
    counts = count_parameters(shape)
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        tokens = float(budget.tokens)
    elif budget.flops is not None:
        tokens = budget.flops / flops_per_token(shape)
    else:
        assert budget.tokens_per_parameter is not None
        tokens = budget.tokens_per_parameter * (counts.matrices + counts.lm_head)
    return max(1, round(tokens / budget.batch_tokens))


def _with_resources(cells: tuple[Cell, ...], document: Document) -> tuple[Cell, ...]:
    """A GPU and the threads of a worker, unless they are given: this machine's, where it is not a cluster's.

    A cell alone takes all cores; where cells are many each takes one, which is faster than to share the work of each.
    """
    if os.environ.get("RAY_ADDRESS"):
        return cells
    if not _is_given(document, "gpus_per_worker") and (gpus := available_gpus()):
        cells = tuple(
            _resourced(cell, gpus_per_worker=int(gpus >= cell.experiment.resources.workers)) for cell in cells
        )
    if not _is_given(document, "cpus_per_worker"):
        cores = available_cores()
        beside = max(map(len, generations(cells)), default=1)
        cells = tuple(_with_threads(cell, cores // min(beside, cores)) for cell in cells)
    return cells


def _is_given(document: Document, name: str) -> bool:
    field = f"resources.{name}"
    return holds(document.content, field) or field in document.content.get("axes", {})


def available_gpus() -> int:
    """CUDA devices of this machine. torch is asked only where a driver is: its import takes seconds.

    Raises `UserError` where torch cannot use them: nobody wants to learn that from the speed.
    """
    if not Path("/dev/nvidiactl").exists():
        return 0
    from bwlm.model.compute import can_use_gpus, count_gpus

    found = count_gpus()
    if found and not can_use_gpus():
        raise UserError(
            f"this machine has {found} GPUs that torch cannot use: update the driver, or install a torch that it "
            "can run; resources.gpus_per_worker=0 trains on the CPU"
        )
    return found


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: a batch system or a container may have given it a part of the machine."""
    cores = len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control group (version 2), or `max`: no quota
        microseconds, period = map(int, quota.read_text().split())
        cores = min(cores, microseconds // period)
    return max(1, cores)


def _with_threads(cell: Cell, cores: int) -> Cell:
    resources = cell.experiment.resources
    if resources.gpus_per_worker:
        return cell
    return _resourced(cell, cpus_per_worker=max(1, cores // resources.workers))


def _resourced(cell: Cell, **update: float) -> Cell:
    resources = cell.experiment.resources.model_copy(update=update)
    return replace(cell, experiment=cell.experiment.model_copy(update={"resources": resources}))


def rivals(experiment: Experiment) -> str:
    """Names the cells that compete under ASHA: those that differ in the learning rate alone."""
    return experiment.model_dump_json(exclude={"lr"})


def _check_asha(cells: tuple[Cell, ...], document: Document) -> None:
    """ASHA chooses learning rates by what it sees on the way; among seeds it would keep the lucky ones."""
    where = document.where("scheduler.kind")
    if any(cell.experiment.evaluation.every == 0 for cell in cells):
        raise UserError(f"{where}: asha decides at validations: set evaluation.every")
    if len({cell.experiment.seed for cell in cells}) > 1:
        raise UserError(
            f"{where}: asha with several seeds would stop the unlucky ones and spoil the pairs: "
            "choose the learning rates with one seed, then run the seeds of the best with fifo"
        )


# ---- axes ----


def _with_first_values(document: Document) -> tuple[dict[str, Any], Document]:
    """The grid's content with its dotted axes at their first values: a section may be whole only with them."""
    content, places = copy.deepcopy(document.content), dict(document.places)
    axes = content.get("axes")
    for name, values in axes.items() if isinstance(axes, dict) else []:
        if "." in name and isinstance(values, list) and values and not holds(content, name):
            places[name] = document.place(f"axes.{name}")
            assign(content, name, values[0], places[name])
    return content, Document(document.name, content, places)


def _blocks(document: Document) -> dict[str, dict[str, list[Any]]]:
    """The products that make the grid, by the field that states them: `axes`, `also.0`, `also.1`, .."""
    blocks = {"axes": document.content["axes"]}
    blocks |= {f"also.{index}": axes for index, axes in enumerate(document.content.get("also", []))}
    for where, axes in blocks.items():
        _check_axes(axes, where, document)
    return blocks


def _following(document: Document, first: str) -> list[str]:
    """The phases after the first. Raises `UserError` for one that cannot follow, or has axes that cannot be."""
    following = check_phase_names(document, first)
    for phase in following:
        if axes := _axes_of(phase, document):
            _check_axes(axes, f"phases.{phase}.axes", document, document.content["phases"][phase])
    return following


def _check_axes(
    axes: dict[str, list[Any]], where: str, document: Document, beside: Mapping[str, Any] | None = None
) -> None:
    """`beside` are the settings that the axes would contradict; by default the whole file's."""
    section = where.rpartition("axes")[0]
    known = [name for name in field_names(Experiment) if name not in Experiment.model_fields or name in _AXES_BESIDES]
    if not axes:
        raise UserError(
            f"{document.where(where)}: needs at least one axis, for instance direction: [forward, backward]"
        )
    for name, values in axes.items():
        field = f"{where}.{name}"
        if name not in known:
            raise UserError(f"{document.where(field)}: not a setting that cells can differ in{nearest(name, known)}")
        if holds(document.content if beside is None else beside, name):
            raise UserError(
                f"{document.where(section + name)}: fixed here and an axis in {where}: keep one "
                f"(--set {where}.{name}=[..])"
            )
        if not values:
            raise UserError(f"{document.where(field)}: needs a list of values, for instance [1, 2]")
        repeated = [value for index, value in enumerate(values) if value in values[:index]]
        if repeated:
            raise UserError(f"{document.where(field)}: {repeated[0]!r} appears twice; keep one")


def _axes_of(phase: str, document: Document) -> dict[str, list[Any]]:
    """Those that a phase after the first has of its own."""
    axes = (document.content["phases"][phase] or {}).get("axes", {})
    if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
        raise UserError(f"{document.where(f'phases.{phase}.axes')}: must hold lists of values, field: [1, 2]")
    return axes


def _product_size(axes: dict[str, list[Any]]) -> int:
    return math.prod(len(values) for values in axes.values())


def _family_size(following: list[str], document: Document) -> int:
    """Cells that come of one of the first phase, itself included."""
    sizes = [1, *(_product_size(_axes_of(phase, document)) for phase in following)]
    return sum(itertools.accumulate(sizes, operator.mul))


def _cells(blocks: dict[str, dict[str, list[Any]]], family: _Family) -> Iterator[Cell]:
    """Raises `UserError` if a cell is not valid, or if two have the same id."""
    document = family.document
    fixed = {name: value for name, value in document.content.items() if name not in _GRID_ONLY}
    seen: set[str] = set()
    for where, axes in blocks.items():
        for chosen in _choices(axes):
            content, at = _with_chosen(fixed, chosen, where, document)
            experiment = family.first(content, at)
            for cell in family.cells(experiment, _cell_id(experiment, chosen, document), content, at):
                if cell.id in seen:
                    raise UserError(f"{document.where(where)}: cell {cell.id} is asked for twice; remove one")
                seen.add(cell.id)
                yield cell


def _choices(axes: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _with_chosen(
    fixed: Mapping[str, Any], chosen: dict[str, Any], where: str, document: Document
) -> tuple[dict[str, Any], Document]:
    """Content with one value of each axis, and where each was given."""
    content, places = copy.deepcopy(dict(fixed)), dict(document.places)
    for name, value in chosen.items():
        places[name] = document.place(f"{where}.{name}")
        assign(content, name, value, places[name])
    return content, Document(document.place(where), content, places)


@dataclass(frozen=True)
class _Family:
    """How cells descend from each other: the phases that follow the first, and where parents lie that are no cells."""

    document: Document
    following: list[str]
    storage: Path

    def first(self, content: dict[str, Any], document: Document) -> Experiment:
        """Of the first phase; past base, what it takes from its parent comes from there."""
        phase = content.get("phase", "base")
        if phase not in PHASES or phase == "base":
            if self.following and isinstance(content.get("data"), dict):  # the chain's, whose base reads documents
                content = content | {"data": {k: v for k, v in content["data"].items() if k != "mixture"}}
            return _experiment(content, document)
        run = content.get("parent")
        if not isinstance(run, str):
            raise UserError(f"{document.where('parent')}: missing: name the run that {phase} begins from")
        parent = open_finished(self.storage, run).config().experiment
        check_order(phase, run, parent.phase)
        return _experiment(inherit(with_defaults(content, phase), run, parent, document), document)

    def cells(self, first: Experiment, name: str, content: dict[str, Any], document: Document) -> Iterator[Cell]:
        """The cell of an experiment and all that descend from it, each after its parent."""
        run = f"{name}-{first.phase}" if self.following else name
        cell = Cell(_checked(run, self.document), first, resolve_steps(first))
        yield cell
        yield from self._descendants(cell, name, "", content, document, self.following)

    def _descendants(
        self, parent: Cell, name: str, ending: str, content: dict[str, Any], document: Document, phases: list[str]
    ) -> Iterator[Cell]:
        if not phases:
            return
        phase, *following = phases
        own, at = phase_content(content, phase, Document(document.name, self.document.content, document.places))
        for chosen in _choices(_axes_of(phase, self.document)):
            chosen_content, place = _with_chosen(own, chosen, f"phases.{phase}.axes", at)
            content_of_phase = with_defaults(chosen_content, phase)
            experiment = _experiment(inherit(content_of_phase, parent.id, parent.experiment, place), place)
            longer = ending + "".join(f"_{part}" for part in _parts(chosen))
            run = _checked(re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{phase}{longer}"), self.document)
            cell = Cell(run, experiment, resolve_steps(experiment))
            yield cell
            yield from self._descendants(cell, name, longer, content, document, following)


def _experiment(content: Mapping[str, Any], document: Document) -> Experiment:
    """Raises `UserError` where a field is not valid, or fields do not fit together."""
    experiment = validate(Experiment, content, document)
    try:
        shape_of(experiment)
    except ValueError as error:
        raise UserError(f"{document.where('model')}: {error}: change head_dim or kv_heads") from None
    if not holds(dict(content), "budget.batch_tokens"):
        experiment = _with_batch(experiment)
    _check_batch(experiment, document)
    return experiment


def _with_batch(experiment: Experiment) -> Experiment:
    """nanochat's batch for the depth, in whole rows for every worker."""
    unit = experiment.model.sequence_length * experiment.resources.workers
    tokens = max(1, round(batch_tokens_for(shape_of(experiment)) / unit)) * unit
    budget = experiment.budget.model_copy(update={"batch_tokens": tokens})
    return experiment.model_copy(update={"budget": budget})


def _check_batch(experiment: Experiment, document: Document) -> None:
    width, tokens = experiment.model.sequence_length, experiment.budget.batch_tokens
    workers = experiment.resources.workers
    if experiment.phase == "rl":
        _check_prompts(experiment, document)
    if tokens % width:
        near = max(1, round(tokens / width)) * width
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {tokens} is not a multiple of "
            f"model.sequence_length={width}: take {near}"
        )
    rows = tokens // width
    if rows % workers:
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {rows} rows a step cannot be shared by "
            f"resources.workers={workers}: take a multiple of {workers * width}"
        )


def _check_prompts(experiment: Experiment, document: Document) -> None:
    """Every worker writes for as many prompts; how many they are in all must not depend on the workers."""
    rl, workers, prompts = experiment.rl, experiment.resources.workers, experiment.prompts_per_step
    written = rl.samples * rl.new_tokens
    if prompts < workers and prompts < rl.prompts:
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {experiment.budget.batch_tokens} tokens are too few for "
            f"{workers} x rl.samples={rl.samples} of rl.new_tokens={rl.new_tokens}: take at least {workers * written}"
        )
    if prompts % workers:
        raise UserError(
            f"{document.where('rl.prompts')}: {prompts} prompts a step cannot be shared by {workers} workers: "
            f"take {max(1, prompts // workers) * workers}"
        )


def _cell_id(experiment: Experiment, chosen: dict[str, Any], document: Document) -> str:
    rate = f"{experiment.lr:g}" if float(f"{experiment.lr:g}") == experiment.lr else repr(experiment.lr)
    parts = [document.content["name"], experiment.direction, f"d{experiment.depth}", f"lr{rate}", f"s{experiment.seed}"]
    parts += _parts({name: value for name, value in chosen.items() if name not in _IN_ID})
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def _parts(chosen: dict[str, Any]) -> list[str]:
    """Of an id: what was chosen on axes, the last part of each name."""
    return [f"{name.rpartition('.')[2]}{value}" for name, value in chosen.items()]


def _checked(run: str, document: Document) -> str:
    if len(run) > LONGEST_ID:
        raise UserError(
            f"{document.where('name')}: cell id {run!r} is longer than {LONGEST_ID} characters: "
            "give the grid a shorter name"
        )
    return check_id(run, "cell id")
