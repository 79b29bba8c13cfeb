"""Evaluation of a trained model on tasks, in each reading: from the name of a task to its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bwlm.directions import TEXT_READINGS, is_native
from bwlm.errors import UserError, nearest
from bwlm.evaluate.tasks.choices import JudgedItem, baselines, chance, fit_items, judge_items
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.results import TaskScore, by_rule, counts_of, example_rows, score_of
from bwlm.trained.load import LoadedModel
from tasks import find_evaluated
from tasks.items import ChoiceItem, ChoiceTask, EvaluatedTask, Form, Item, rows_digest
from tasks.task import draw

ShowDone = Callable[[int], object]


@dataclass(frozen=True)
class TaskRequest:
    """What to evaluate on."""

    name: str
    """Name of a task, or `task:group`."""
    path: str | None = None
    """Local files or address instead of the task's own."""
    max_examples: int | None = None
    shots: int | None = None
    """Solved examples before each item; None: the task's own number."""


@dataclass(frozen=True)
class LoadedTask:
    """Items of a task, read and checked."""

    request: TaskRequest
    task: EvaluatedTask
    source: str
    items: dict[Form, Sequence[ChoiceItem]]
    """Items by form: the same ones in each form."""

    @classmethod
    def read(cls, request: TaskRequest) -> LoadedTask:
        """Read the test split. Raises `UserError` for an unknown task or group, and for files that cannot be read."""
        task, group = find_evaluated(request.name)
        assert isinstance(task, ChoiceTask)
        shots = task.shots if request.shots is None else request.shots
        items = {form: task.choice_items(form, shots, request.path) for form in task.forms}
        chosen = {
            form: sample(of_group(every, group, request.name), request.max_examples) for form, every in items.items()
        }
        return cls(request, task, task.test_source(request.path), chosen)

    @property
    def digest(self) -> str:
        """Digest of the items."""
        return rows_digest(next(iter(self.items.values())))


@dataclass(frozen=True)
class Evaluated:
    """Scores of a model on a task in one reading, with every example."""

    scores: list[TaskScore]
    about: dict[str, Any]
    examples: list[dict[str, Any]] = field(repr=False)


def of_group(items: Sequence[Item], group: str, name: str) -> Sequence[Item]:
    """Return the items of a group, or all where no group is named. Raises `UserError` for a group without items."""
    if not group:
        return items
    known = sorted({item.group for item in items})
    if group not in known:
        raise UserError(f"--tasks: {name}: no group {group!r}{nearest(group, known)}: name one of {', '.join(known)}")
    return [item for item in items if item.group == group]


def sample(items: Sequence[Item], count: int | None) -> Sequence[Item]:
    """Return `count` items, the same ones in whatever order the items come, or all."""
    if count is None or count >= len(items):
        return items
    drawn = {item.id for item in sorted(items, key=lambda item: (draw(item.id), item.id))[:count]}
    return [item for item in items if item.id in drawn]


def evaluate_reading(
    loaded: LoadedModel, task: LoadedTask, reading: str, progress: ShowDone = lambda items: None
) -> Evaluated:
    """Return the scores of a model on a task in one reading. `progress` is called with numbers of items done."""
    layout = Layout(loaded.tokenizer, loaded.config.experiment.direction, loaded.model.config.sequence_length)
    about = {"source": task.source, "rows": task.digest, "baselines": baselines(next(iter(task.items.values())))}
    scores, examples = [], []
    for form, items in task.items.items():
        fitted, blank = fit_items(layout, items), _blank(loaded, task, form, reading)
        about[form] = counts_of(fitted)
        if reading not in TEXT_READINGS:
            scores.append(replace(blank, reason=f"a question cannot be read in the order {reading}"))
        elif fitted.refusal:
            scores.append(replace(blank, status="does_not_fit", reason=fitted.refusal))
        else:
            judged = list(judge_items(loaded.model, layout, fitted.items, reading, progress))
            scores += _scores(replace(blank, chance=chance(fitted.items), cut=fitted.cut), judged)
            examples += example_rows(form, judged)
    return Evaluated(scores, about, examples)


def _blank(loaded: LoadedModel, task: LoadedTask, form: Form, reading: str) -> TaskScore:
    """Return a score without a figure."""
    return TaskScore(
        id=loaded.config.id,
        step=loaded.step,
        task=task.request.name,
        form=form,
        control=None,
        direction=reading,
        rule="conditional",
        native=is_native(loaded.config.experiment.direction, reading),
        status="not_applicable",
    )


def _scores(blank: TaskScore, judged: Sequence[JudgedItem]) -> list[TaskScore]:
    """Return a score for each control and rule."""
    scores = [
        replace(blank, control=control, rule=rule, status="scored", **score_of(of))
        for (control, rule), of in by_rule(judged).items()
    ]
    if blank.direction == "backward":
        scores.append(replace(blank, rule="answer_first", reason="backward, conditional reads the answer first anyway"))
    return scores


def evaluate_task(
    loaded: LoadedModel,
    task: str | TaskRequest,
    readings: Sequence[str] = TEXT_READINGS,
) -> dict[str, dict[str, Any]]:
    """Return the accuracy of a model on a task by reading, with its interval.

        {"forward": {"accuracy": 0.31, "interval": (0.29, 0.33), "chance": 0.25, "n": 2376, "native": True, ..}, ..}

    The figures are those of the rule `conditional` in the task's first form; `scores` holds every form, rule and
    control. Raises `UserError` for an unknown task, and for files that cannot be read.
    """
    request = task if isinstance(task, TaskRequest) else TaskRequest(task)
    read = LoadedTask.read(request)
    results = {}
    for reading in readings:
        evaluated = evaluate_reading(loaded, read, reading)
        rows = [asdict(score) for score in evaluated.scores]
        results[reading] = {**rows[0], "scores": rows, "about": evaluated.about}
    return results
