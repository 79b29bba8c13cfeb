"""Evaluation of runs on tasks, with the results in their folders: what was scored is not scored again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bwlm.directions import evaluated_readings
from bwlm.errors import UserError
from bwlm.evaluate.tasks.request import LoadedTask, TaskRequest
from bwlm.evaluate.tasks.results import TaskScore
from bwlm.evaluate.tasks.run import Evaluated, ShowDone, evaluate_reading
from bwlm.evaluate.tasks.seen import count_seen
from bwlm.progress import track, working
from bwlm.record.checkpoint import weights_digest
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, open_experiment
from bwlm.record.task_results import HARNESS_VERSION, TaskResult, find_result, result_name, write_result
from bwlm.trained.load import LoadedModel, load_model


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluation of one checkpoint on some tasks."""

    storage: Path
    checkpoint: str
    """`ID`, `ID@STEP` or `ID@best`."""
    requests: tuple[TaskRequest, ...]
    readings: tuple[str, ...] | None = None
    """None: forward and backward, and a permuted model's own."""

    def scores(
        self, read: Callable[[TaskRequest], LoadedTask] = LoadedTask.read, progress: ShowDone = lambda items: None
    ) -> list[TaskScore]:
        """Return the scores, and save them in the run's folder; scores that are there are read.

        Raises `UserError` if there is no such run or checkpoint, if the run has not finished and no checkpoint is
        named, and if a task cannot be read.
        """
        name = CheckpointName.parse(self.checkpoint)
        folder = open_experiment(self.storage, name.run)
        state = folder.status().state
        if state != "finished" and not name.which:
            raise UserError(
                f"{folder.id} is {state}, not finished: finish it first, or name a checkpoint as in {folder.id}@best"
            )
        config, step = folder.config(), name.step_in(folder)
        weights = weights_digest(folder.checkpoints, step)
        model = _Lazily(self.storage, f"{name.run}@{step}")
        scores: list[TaskScore] = []
        for request in self.requests:
            own = config.experiment.tasks.get(request.name.partition(":")[0])
            task = read(request if request.path or not own else request.with_path(own.path))
            for reading in self.readings or evaluated_readings(config.experiment.direction):
                at = None if step == config.steps else step
                where = folder.evaluation(config.experiment.phase, reading)
                file = result_name(task.request.name, at, request.settings)
                key = {"harness": HARNESS_VERSION, "weights": weights, "reading": reading, **task.key}
                known = find_result(where, file, key)
                if known is None:
                    known = _evaluate(model, folder, task, reading, key, where, file, progress)
                scores += [TaskScore(**score) for score in known.scores]
        return scores


@dataclass
class _Lazily:
    """Model that is loaded when the first score has to be made."""

    storage: Path
    checkpoint: str
    _loaded: LoadedModel | None = None

    def __call__(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load_model(self.storage, self.checkpoint)
        return self._loaded


def _evaluate(
    model: Callable[[], LoadedModel],
    folder: ExperimentFolder,
    task: LoadedTask,
    reading: str,
    key: Mapping[str, Any],
    where: Path,
    file: str,
    progress: ShowDone,
) -> TaskResult:
    loaded = model()
    evaluated = evaluate_reading(loaded, task, reading, progress)
    seen = count_seen(folder, loaded.tokenizer, task.conversations)
    scores = [asdict(score) | {"seen": seen} for score in evaluated.scores]
    result = TaskResult(key, scores, evaluated.about)
    with folder.lease():
        write_result(where, file, result, _columns(evaluated), folder.check_lease)
    return result


def _columns(evaluated: Evaluated) -> dict[str, list[Any]]:
    names = evaluated.examples[0] if evaluated.examples else {}
    return {name: [row[name] for row in evaluated.examples] for name in names}


def evaluate_checkpoints(
    storage: Path, checkpoints: Sequence[str], requests: Sequence[TaskRequest], readings: tuple[str, ...] | None
) -> list[TaskScore]:
    """Return the scores of some checkpoints, one after the other, with the time left on stderr."""
    read = _read_once()
    return [
        score
        for checkpoint in track(checkpoints, "evaluating", "models")
        for score in _scores_of(RunEvaluation(storage, checkpoint, tuple(requests), readings), read)
    ]


def _scores_of(evaluation: RunEvaluation, read: Callable[[TaskRequest], LoadedTask]) -> list[TaskScore]:
    done = 0

    def progress(items: int) -> None:
        nonlocal done
        done += items

    with working(f"scoring {evaluation.checkpoint}", "texts", 0, lambda: done):
        return evaluation.scores(read, progress)


def _read_once() -> Callable[[TaskRequest], LoadedTask]:
    """Return a reader of tasks that reads each one once, for several runs."""
    read: dict[TaskRequest, LoadedTask] = {}

    def reader(request: TaskRequest) -> LoadedTask:
        if request not in read:
            read[request] = LoadedTask.read(request)
        return read[request]

    return reader
