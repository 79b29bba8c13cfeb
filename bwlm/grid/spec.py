"""The grid file: axes, fixed settings and how to run them, resolved to cells before anything runs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bwlm.config import (
    Depth,
    DirectionName,
    Document,
    Experiment,
    LearningRate,
    Recipe,
    Seed,
    Settings,
    assign,
    field_names,
    load_yaml,
    override,
    validate,
)
from bwlm.errors import UserError, nearest
from bwlm.model.shape import GPTConfig, count_parameters, flops_per_token
from bwlm.paths import check_id


class SchedulerSettings(Settings):
    kind: Literal["fifo", "asha"] = "fifo"
    grace_steps: int = Field(100, ge=1, description="asha: no cell is stopped before this step")
    reduction_factor: int = Field(2, ge=2, description="asha: one in so many goes on at each rung")


class LaunchSettings(Settings):
    concurrency: int | None = Field(
        None, ge=1, description="cells at once; default: as many as the cluster has room for"
    )
    retries: int = Field(2, ge=0, description="how often a cell that crashed is taken up again")
    max_cells: int = Field(1000, ge=1, description="a grid of more cells is refused")
    storage: str | None = None
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
    scheduler: SchedulerSettings = SchedulerSettings()
    launch: LaunchSettings = LaunchSettings()


_GRID_ONLY = ("name", "axes", "also", "scheduler", "launch")
_IN_ID = ("direction", "depth", "lr", "seed")


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
class GridPlan:
    grid: Grid
    cells: tuple[Cell, ...]
    source: str
    """The grid's text as it was resolved, for the record."""


def load_grid(path: Path, settings: list[str]) -> GridPlan:
    """Reads, overrides and resolves a grid file. Raises `UserError` for every fault, before anything is made."""
    document = override(load_yaml(path), settings)
    _check_cap(document)
    grid = validate(Grid, document.content, document)
    check_id(grid.name, document.where("name"))
    cells = list(_cells(document))
    if len(cells) > grid.launch.max_cells:
        raise UserError(
            f"{document.where('axes')}: {len(cells)} cells, more than launch.max_cells={grid.launch.max_cells}: "
            "remove values or raise the cap"
        )
    _check_unique(cells, document)
    return GridPlan(grid, tuple(cells), path.read_text("utf-8"))


def shape_of(experiment: Experiment) -> GPTConfig:
    """Raises ValueError where head_dim, kv_heads and depth do not fit together."""
    model = experiment.model
    return GPTConfig.from_depth(
        experiment.depth, experiment.tokenizer.vocab_size, model.sequence_length, model.head_dim, model.kv_heads
    )


def resolve_steps(experiment: Experiment) -> int:
    """The horizon in steps; tokens per parameter count matrices and output head, as in nanochat."""
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


# ---- axes ----


def _check_cap(document: Document) -> None:
    """Counts the cells before any is built: a slip of the pen can ask for billions."""
    blocks = [document.content.get("axes"), *(document.content.get("also") or [])]
    if not isinstance(blocks[0], dict) or not blocks[0]:
        raise UserError(
            f"{document.where('axes')}: needs at least one axis, for instance direction: [forward, backward]"
        )
    cells = 0
    for block in blocks:
        product = 1
        for values in block.values() if isinstance(block, dict) else []:
            product *= len(values) if isinstance(values, list) else 1
        cells += product
    if cells > 1_000_000:
        raise UserError(f"{document.where('axes')}: {cells} cells are beyond any cluster: remove values")


def _check_axes(axes: Any, where: str, document: Document) -> None:
    known = [name for name in field_names(Experiment) if name not in Experiment.model_fields or name in _IN_ID]
    if not isinstance(axes, dict):
        raise UserError(f"{document.where(where)}: must be a mapping from field to a list of values")
    for name, values in axes.items():
        field = f"{where}.{name}"
        if name not in known:
            raise UserError(f"{document.where(field)}: not a setting of an experiment{nearest(name, known)}")
        if not isinstance(values, list) or not values:
            raise UserError(f"{document.where(field)}: needs a list of values, for instance [1, 2]")
        repeated = [value for index, value in enumerate(values) if value in values[:index]]
        if repeated:
            raise UserError(f"{document.where(field)}: {repeated[0]!r} stands there twice; keep one")


def _cells(document: Document) -> Iterator[Cell]:
    content = document.content
    fixed = {name: value for name, value in content.items() if name not in _GRID_ONLY}
    blocks = [("axes", content["axes"])]
    blocks += [(f"also.{index}", block) for index, block in enumerate(content.get("also") or [])]
    for where, axes in blocks:
        _check_axes(axes, where, document)
        for name in axes:
            if name in fixed:
                raise UserError(
                    f"{document.where(name)}: fixed here and an axis in {where}: keep one (--set {where}.{name}=[..])"
                )
        for values in itertools.product(*axes.values()):
            yield _cell(content["name"], fixed, dict(zip(axes, values, strict=True)), where, document)


def _cell(grid: str, fixed: dict[str, Any], chosen: dict[str, Any], where: str, document: Document) -> Cell:
    content = copy.deepcopy(fixed)
    for name, value in chosen.items():
        assign(content, name, value)
    lines = dict(document.lines) | {name: document.lines.get(f"{where}.{name}", 0) for name in chosen}
    shown = Document(document.name, content, {name: line for name, line in lines.items() if line})
    experiment = validate(Experiment, content, shown)
    try:
        shape_of(experiment)
    except ValueError as error:
        raise UserError(f"{shown.where('model')}: {error}") from None
    _check_batch(experiment, shown)
    return Cell(_cell_id(grid, experiment, chosen), experiment, resolve_steps(experiment))


def _check_batch(experiment: Experiment, document: Document) -> None:
    width, tokens = experiment.model.sequence_length, experiment.budget.batch_tokens
    if tokens % width:
        near = max(1, round(tokens / width)) * width
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {tokens} is not a multiple of "
            f"model.sequence_length={width}: take {near}"
        )
    rows, workers = tokens // width, experiment.resources.workers
    if rows % workers:
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {rows} rows a step cannot be shared by "
            f"resources.workers={workers}: take a multiple of {workers * width}"
        )


def _cell_id(grid: str, experiment: Experiment, chosen: dict[str, Any]) -> str:
    parts = [grid, experiment.direction, f"d{experiment.depth}", f"lr{experiment.lr:g}", f"s{experiment.seed}"]
    parts += [f"{name.rpartition('.')[2]}{value}" for name, value in chosen.items() if name not in _IN_ID]
    return check_id(re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)), "cell id")


def _check_unique(cells: list[Cell], document: Document) -> None:
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise UserError(f"{document.where('also')}: cell {cell.id} is asked for twice; remove one")
        seen.add(cell.id)
