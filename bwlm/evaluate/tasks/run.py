"""Evaluation of a trained model on tasks, in each reading: from the name of a task to its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bwlm.directions import TEXT_READINGS, is_native
from bwlm.evaluate.tasks.answers import NotApplicable, evaluate_generated
from bwlm.evaluate.tasks.choices import JudgedItem, baselines, chance, fit_items, judge_items
from bwlm.evaluate.tasks.continuations import as_choice, judge_continuations
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.request import Items, LoadedTask, TaskRequest
from bwlm.evaluate.tasks.results import (
    TaskScore,
    accuracy_of,
    attempt_rows,
    by_rule,
    counts_of,
    example_rows,
    score_of,
)
from bwlm.evaluate.tasks.rules import BACKWARD, FORWARD, Rule
from bwlm.trained.load import LoadedModel
from tasks.items import CentredTask, ChoiceItem, ContinuationItem, Form, GeneratedItem, GeneratedTask

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
    result = Evaluated([], {"source": task.source, "rows": task.digest}, [])
    for form, items in task.items.items():
        blank = _blank(loaded, task, form, reading)
        if reading not in TEXT_READINGS:
            result.scores.append(replace(blank, reason=f"a text of a task cannot be read in the order {reading}"))
        elif isinstance(task.task, GeneratedTask):
            _evaluate_outputs(loaded, task, blank, result, progress)
        else:
            _evaluate_texts(loaded, items, blank, result, progress)
    centre = task.task.centred if isinstance(task.task, CentredTask) else None
    scores = [
        replace(one, centred=centre(one.accuracy)) if centre and one.accuracy is not None else one
        for one in result.scores
    ]
    return replace(result, scores=scores)


def _evaluate_texts(loaded: LoadedModel, items: Items, blank: TaskScore, result: Evaluated, progress: ShowDone) -> None:
    """Add the scores of choices, or of continuations."""
    model, reading = loaded.model, blank.direction
    layout = Layout(loaded.tokenizer, loaded.config.experiment.direction, model.config.sequence_length)
    exact = [as_choice(item) for item in items if isinstance(item, ContinuationItem)]
    choices = [item for item in items if isinstance(item, ChoiceItem)]
    if exact and reading != FORWARD:
        reason = "its context would have to be predicted word for word"
        result.scores.append(replace(blank, rule="exact", reason=reason))
        return
    fitted = fit_items(layout, exact or choices, 1 if exact else 2)
    result.about[blank.form] = counts_of(fitted)
    if fitted.refusal:
        result.scores.append(replace(blank, status="does_not_fit", reason=fitted.refusal))
        return
    if exact:
        judged = list(judge_continuations(model, layout, fitted.items, progress))
    else:
        result.about.setdefault("baselines", baselines(choices))
        judged = list(judge_items(model, layout, fitted.items, reading, progress))
    expected = None if exact else chance(fitted.items)
    result.scores.extend(_scores(replace(blank, chance=expected, cut=fitted.cut), judged))
    result.examples.extend(example_rows(blank.form, judged))


def _evaluate_outputs(
    loaded: LoadedModel, task: LoadedTask, blank: TaskScore, result: Evaluated, progress: ShowDone
) -> None:
    """Add the scores of outputs that the model generates."""
    assert isinstance(task.task, GeneratedTask), "another kind of task"
    items = [item for item in task.items["generated"] if isinstance(item, GeneratedItem)]
    blank = replace(blank, rule="pass@1")
    found = evaluate_generated(
        loaded,
        task.task,
        items,
        blank.direction,
        samples=task.request.samples,
        allow_code_execution=task.request.allow_code_execution,
        progress=progress,
    )
    if isinstance(found, NotApplicable):
        result.scores.append(replace(blank, reason=found.reason))
        return
    result.about["generated"] = {
        **found.outcomes,
        "cut": found.cut,
        "dropped_shots": found.dropped_shots,
        "does_not_fit": len(found.left_out),
        "temperature": found.sampling.temperature,
        "new_tokens": found.sampling.new_tokens,
        "isolation": str(found.isolation) if found.isolation else None,
    }
    if found.refusal:
        result.scores.append(replace(blank, status="does_not_fit", reason=found.refusal))
        return
    groups = {item.id: item.group for item in items}
    rules: list[tuple[Rule, int]] = [("pass@1", 1), ("pass@k", task.request.samples)]
    for rule, k in rules if task.request.samples > 1 else rules[:1]:
        shares = [(groups[item], share) for item, share in found.pass_at(k).items()]
        result.scores.append(replace(blank, rule=rule, status="scored", cut=found.cut, **accuracy_of(shares)))
    result.examples.extend(attempt_rows(found.attempts))


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
    if blank.direction == BACKWARD:  # continuations are not read backward
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
    [read] = LoadedTask.read(request)
    results = {}
    for reading in readings:
        evaluated = evaluate_reading(loaded, read, reading)
        rows = [asdict(score) for score in evaluated.scores]
        results[reading] = {**rows[0], "scores": rows, "about": evaluated.about}
    return results
