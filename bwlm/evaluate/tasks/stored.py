"""Evaluation of runs on tasks, with the results in their folders: what was scored is not scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bwlm.directions import evaluated_readings
from bwlm.errors import UserError
from bwlm.evaluate.tasks.choices import count_passes
from bwlm.evaluate.tasks.directions import DirectionMetrics, direction_metrics
from bwlm.evaluate.tasks.request import Items, LoadedTask, TaskRequest, path_of, read_tasks
from bwlm.evaluate.tasks.results import EXAMPLE_COLUMNS, TaskScore
from bwlm.evaluate.tasks.run import Evaluated, ShowDone, evaluate_reading
from bwlm.evaluate.tasks.seen import count_seen
from bwlm.progress import working
from bwlm.record.bucket import fetch_weights
from bwlm.record.checkpoint import weights_digest
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, open_experiment
from bwlm.record.run_config import RunConfig
from bwlm.record.task_results import (
    HARNESS_VERSION,
    TaskResult,
    find_result,
    read_examples,
    result_name,
    write_result,
)
from bwlm.text.tokenizer import Tokenizer
from bwlm.trained.load import LoadedModel, load_model
from tasks.items import ChoiceItem


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluation of one checkpoint on some tasks."""

    storage: Path
    checkpoint: str
    """`ID`, `ID@STEP` or `ID@best`."""
    requests: tuple[TaskRequest, ...]
    readings: tuple[str, ...] | None = None
    """None: forward and backward, and a permuted model's own."""
    held: ExperimentFolder | None = None
    """Folder of the run, if this process holds its lease already."""

    def scores(self, progress: ShowDone = lambda items: None) -> list[TaskScore]:
        """Return the scores, and save them in the run's folder; scores that are there are read.

        Raises `UserError` if there is no such run or checkpoint, if the run has not finished and no checkpoint is
        named, and if a task cannot be read.
        """
        model = _Lazily(self.storage, self._checkpoint)
        scores: list[TaskScore] = []
        for one in self._parts():
            result = one.known() or one.evaluate(model, progress)
            scores += [TaskScore(**score) for score in result.scores]
        return scores

    def texts(self) -> int:
        """Return the number of texts that are left to score, over all passes."""
        return sum(one.texts() for one in self._parts() if one.known() is None)

    def shown(self, count: int) -> list[ShownItem]:
        """Return the first items of each task, form and reading as the model read them, from saved results."""
        tokenizer = Tokenizer.load(Path(self.folder.config().tokenizer))
        return [item for one in self._parts() for item in one.shown(count, tokenizer)]

    def direction_metrics(self) -> list[DirectionMetrics]:
        """Return how the saved scores of each task differ between the two readings of its text."""
        examples: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for one in self._parts():
            examples.setdefault(one.task.request.name, {})[one.reading] = one.examples()
        direction = self.folder.config().experiment.direction
        return [one for task, of in examples.items() for one in direction_metrics(task, direction, of)]

    @cached_property
    def folder(self) -> ExperimentFolder:
        """Folder of the run. Raises `UserError` if there is none."""
        return self.held or open_experiment(self.storage, CheckpointName.parse(self.checkpoint).run)

    @property
    def _checkpoint(self) -> str:
        return f"{self.folder.id}@{self._step}"

    @cached_property
    def _step(self) -> int:
        name, state = CheckpointName.parse(self.checkpoint), self.folder.status().state
        if state != "finished" and not name.which:
            raise UserError(
                f"{self.folder.id} is {state}, not finished: finish it first, or name a checkpoint as in "
                f"{self.folder.id}@best"
            )
        return name.step_in(self.folder)

    def _parts(self) -> Iterator[_Part]:
        config = self.folder.config()
        for request in self.requests:
            path = request.path or path_of(config.experiment, request.name)
            for task in read_tasks(request.with_path(path)):
                for reading in self.readings or evaluated_readings(config.experiment.direction):
                    yield _Part(self.folder, config, self._step, task, reading)


@dataclass(frozen=True)
class ShownItem:
    """Item as a model reads it, with the scores of its choices."""

    title: str
    """Task, form, reading and place of the item."""
    text: str
    """Row with the right choice, as it is read."""
    choices: tuple[str, ...]
    answer: int
    scores: Mapping[str, tuple[float, ...]]
    """Scores of the choices by rule."""
    outputs: tuple[str, ...] = ()
    """Generated outputs, each with what became of it."""


@dataclass(frozen=True)
class _Part:
    """Evaluation of a checkpoint on one task in one reading: one result."""

    run: ExperimentFolder
    config: RunConfig
    step: int
    task: LoadedTask
    reading: str

    def known(self) -> TaskResult | None:
        return find_result(self._folder, self._name, self._key)

    def evaluate(self, model: Callable[[], LoadedModel], progress: ShowDone) -> TaskResult:
        loaded = model()
        evaluated = evaluate_reading(loaded, self.task, self.reading, progress)
        seen = count_seen(self.run, loaded.tokenizer, self.task.conversations)
        scores = [asdict(score) | {"seen": seen} for score in evaluated.scores]
        result = TaskResult(self._key, scores, evaluated.about)
        with nullcontext() if self.run.held else self.run.lease(trains=False):
            write_result(self._folder, self._name, result, _columns(evaluated), self.run.check_lease)
        return result

    def texts(self) -> int:
        return sum(self._passes(items) for items in self.task.items.values())

    def _passes(self, items: Items) -> int:
        choices = [item for item in items if isinstance(item, ChoiceItem)]
        return len(choices) * count_passes(choices, self.reading) if choices else len(items)

    def examples(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read_examples(self._folder, self._name).to_pylist()
        return rows

    def shown(self, count: int, tokenizer: Tokenizer) -> Iterator[ShownItem]:
        rows = [row for row in self.examples() if row["control"] is None]
        for form, items in self.task.items.items():
            for item in items[:count]:
                mine = [row for row in rows if (row["item"], row["form"]) == (item.id, form)]
                if not mine:
                    continue  # it did not fit
                choices, answer = (item.choices, item.answer) if isinstance(item, ChoiceItem) else ((), 0)
                yield ShownItem(
                    title=f"{self.task.request.name}, {form}, {self.reading}: {item.place}",
                    text="".join(tokenizer.decode([token]) for token in mine[0]["ids"]),
                    choices=choices,
                    answer=answer,
                    scores={row["rule"]: tuple(row["scores"] or ()) for row in mine},
                    outputs=tuple(f"{row['outcome']}: {row['output']}" for row in mine if row["output"] is not None),
                )

    @property
    def _folder(self) -> Path:
        return self.run.evaluation(self.config.experiment.phase, self.reading)

    @property
    def _name(self) -> str:
        at = None if self.step == self.config.steps else self.step
        return result_name(self.task.request.name, at, self.task.request.settings)

    @cached_property
    def _key(self) -> dict[str, Any]:
        fetch_weights(self.run, self.step)
        weights = weights_digest(self.run.checkpoints, self.step)
        return {"harness": HARNESS_VERSION, "weights": weights, "reading": self.reading, **self.task.key}


@dataclass
class _Lazily:
    """Model that is loaded when the first score has to be made."""

    storage: Path
    checkpoint: str
    _loaded: LoadedModel | None = None

    def __call__(self) -> LoadedModel:
        if self._loaded is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = load_model(self.storage, self.checkpoint, device)
        return self._loaded


def _columns(evaluated: Evaluated) -> dict[str, list[Any]]:
    return {name: [row[name] for row in evaluated.examples] for name in EXAMPLE_COLUMNS}


def evaluate_here(evaluation: RunEvaluation) -> list[TaskScore]:
    """Return the scores of a checkpoint, made by this process, and show on stderr how far it is."""
    done = 0

    def progress(items: int) -> None:
        nonlocal done
        done += items

    with working(f"scoring {evaluation.checkpoint}", "texts", evaluation.texts(), lambda: done):
        return evaluation.scores(progress)
