"""Evaluation of a trained model on tasks, in each reading: from the name of a task to its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bwlm.directions import TEXT_READINGS, is_native
from bwlm.evaluate.tasks.choices import JudgedItem, baselines, chance, fit_items, judge_items
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.request import LoadedTask, TaskRequest
from bwlm.evaluate.tasks.results import TaskScore, by_rule, counts_of, example_rows, score_of
from bwlm.trained.load import LoadedModel
from tasks.items import Form

ShowDone = Callable[[int], object]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a model on a task in one reading, with every example."""

    scores: list[TaskScore]
    about: dict[str, Any]
    examples: list[dict[str, Any]] = field(repr=False)


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
