"""Fields of a grid file, its cells, and the plan that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from bwlm.config import Depth, Experiment, LearningRate, Recipe, ResourceSettings, Seed, Settings
from bwlm.directions import TEXT_READINGS, DirectionName, own_readings
from bwlm.model.shape import GPTConfig, count_parameters, flops_per_token
from bwlm.phases import PHASES
from bwlm.record.checkpoint_name import run_of
from bwlm.record.run_config import shape_of


class SchedulerSettings(Settings):
    """Scheduler of a grid: whether cells are stopped early, and by which rule."""

    kind: Literal["fifo", "asha"] = Field(
        "fifo", description="asha: stops the worse learning rates early; fifo: stops no cell"
    )
    grace_steps: int = Field(100, ge=1, description="asha: no cell is stopped before this step")
    reduction_factor: int = Field(2, ge=2, description="asha: at each rung one of so many cells continues")

    @property
    def stops_early(self) -> bool:
        """True for a scheduler that stops cells by their validations."""
        return self.kind != "fifo"


class LimitSettings(Settings):
    """Limits at which a launch stops: its cells save, and the same command resumes them."""

    hours: float | None = Field(None, gt=0, description="wall time of one launch in hours, then it stops")
    money: float | None = Field(
        None, gt=0, description="cost of all launches of the grid, by launch.price, then a launch stops"
    )


class PriceSettings(Settings):
    """Prices of the workers' time, in any currency."""

    gpu_hour: float = Field(0.0, ge=0, description="price of one GPU for an hour")
    cpu_hour: float = Field(0.0, ge=0, description="price of one CPU for an hour")

    def per_hour(self, resources: ResourceSettings) -> float:
        """Return the price of the workers of one cell for an hour."""
        of_worker = resources.gpus_per_worker * self.gpu_hour + resources.cpus_per_worker * self.cpu_hour
        return resources.fewest * of_worker


class LaunchSettings(Settings):
    """Launch of a grid: cells at once, retries, limits of time and money, notices, storage and tracking."""

    concurrency: int | None = Field(
        None, ge=1, description="cells at once; default: as many as the cluster has room for"
    )
    retries: int = Field(2, ge=0, description="how often a crashed cell is tried again")
    grace_seconds: float = Field(
        20.0,
        ge=0,
        description="seconds after SIGTERM or Ctrl-C in which a cell may finish its step and save",
    )
    ray_start_seconds: float = Field(
        180.0, ge=0, description="time in which Ray must have started on this machine; it is tried again until then"
    )
    limit: LimitSettings = LimitSettings()
    price: PriceSettings = PriceSettings()
    notify: str | None = Field(
        None,
        min_length=1,
        description="URL that gets JSON, or command that reads it: at the end, failures, divergence, stalls",
    )
    stall_minutes: float = Field(30.0, gt=0, description="minutes without a step after which a cell is told as stalled")
    max_cells: int = Field(1000, ge=1, le=100_000, description="a grid of more cells is refused")
    storage: str | None = Field(None, description="folder or bucket of experiments; default: BWLM_STORAGE, else runs/")
    tracking_uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI, else SQLite below the storage")
    experiment: str | None = Field(
        None, min_length=1, description="MLflow experiment of new runs; default: MLFLOW_EXPERIMENT_NAME, else bwlm"
    )


class Grid(Recipe):
    """Content of a grid file. `lr` multiplies the learning rate of every parameter group."""

    name: str
    axes: dict[str, list[Any]]
    also: list[dict[str, list[Any]]] = Field(default_factory=list)
    direction: DirectionName | None = None
    depth: Depth | None = None
    lr: LearningRate | None = None
    seed: Seed | None = None
    phases: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="later phases to train after each cell, with own settings and axes; each one is a child run",
    )
    scheduler: SchedulerSettings = SchedulerSettings()
    launch: LaunchSettings = LaunchSettings()


@dataclass(frozen=True)
class Cell:
    """Cell of a grid, and what it will cost."""

    id: str
    experiment: Experiment
    steps: int

    @property
    def parent(self) -> str | None:
        """Id of the run that it begins from; None for a base run."""
        return run_of(self.experiment.parent)

    @property
    def shape(self) -> GPTConfig:
        """Shape of the model."""
        return shape_of(self.experiment)

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return count_parameters(self.shape).total

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return self.steps * self.experiment.budget.batch_tokens

    @property
    def flops(self) -> int:
        """Training FLOPs of all steps."""
        return self.tokens * flops_per_token(self.shape)

    def flops_until(self, step: int) -> float:
        """Return the FLOPs up to a step: of training, and of the validations in all readings."""
        every, tokens = self.experiment.evaluation.every, self.experiment.evaluation.tokens
        validations = (step // every if every else 0) + (step == self.steps and not (every and step % every == 0))
        readings = len({*TEXT_READINGS, *own_readings(self.experiment.direction)})
        # a forward pass is a third of a training step
        measured = validations * readings * tokens / 3
        return self.flops * (step / self.steps + measured / self.tokens)


@dataclass(frozen=True)
class Plan:
    """Cells of a grid, a single experiment or a chain of them, and how they are run."""

    name: str
    """Name of the grid, or the experiment's id."""
    cells: tuple[Cell, ...]
    launch: LaunchSettings
    scheduler: SchedulerSettings
    grid_text: str | None
    """Grid file with the changes of `--set`, for the record; None for an experiment or a chain."""
    continued: frozenset[str] = frozenset()
    """Cells that the scheduler stopped early, and that this launch trains to their end."""

    @property
    def is_grid(self) -> bool:
        """True for a grid, false for an experiment or a chain."""
        return self.grid_text is not None


def generations(cells: tuple[Cell, ...]) -> list[tuple[Cell, ...]]:
    """Return the cells by generation: cells without a parent among them, then their children, and so on."""
    number: dict[str, int] = {}
    for cell in cells:  # parents stand before their children
        number[cell.id] = number.get(cell.parent or "", -1) + 1
    return [tuple(cell for cell in cells if number[cell.id] == n) for n in sorted(set(number.values()))]


def asha_group(experiment: Experiment) -> str:
    """Return a key that names the cells that compete under ASHA: they differ in the learning rate alone."""
    return experiment.model_dump_json(exclude={"lr"})


def text_key(experiment: Experiment) -> str:
    """Return a key that cells share if they read the same prepared corpus, given a tokenizer."""
    phase = PHASES[experiment.phase]
    if phase.reads_documents:
        data: dict[str, Any] = {"data": {"source", "text_column", "validation", "shuffle"}, "tokenizer": True}
    else:
        data = {"data": {"mixture", "skip_invalid"}, "tasks": True}
    split = "" if phase.reads_documents or phase.packs_whole else " split"
    return experiment.model_dump_json(include=data | {"model": {"sequence_length"}}) + split
