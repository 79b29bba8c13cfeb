"""Scores of a task from its judged items: a score for each form, control and rule, with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bwlm.evaluate.tasks.answers import Attempt
from bwlm.evaluate.tasks.choices import Control, FittedItems, JudgedItem
from bwlm.evaluate.tasks.rules import Rule
from bwlm.stats.proportions import wilson
from tasks import SUITES
from tasks.items import Form

Interval = tuple[float, float]
EXAMPLE_COLUMNS = (
    *("item", "place", "group", "form", "control", "rule", "scores", "answer", "chosen", "correct"),
    *("ids", "output", "attempt", "outcome"),
)
"""Columns of the examples of a result, also of one without examples."""


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of a model on a task by one rule, in one form and reading."""

    id: str
    step: int
    """Step of the model's checkpoint."""
    task: str
    form: Form
    control: Control | None
    direction: str
    """Reading."""
    rule: Rule
    native: bool
    """True if the model was trained to read so."""
    status: Literal["scored", "not_applicable", "does_not_fit"]
    reason: str = ""
    """Reason why there is no score."""
    accuracy: float | None = None
    interval: Interval | None = None
    """Wilson's 95 % interval, over the items alone."""
    chance: float | None = None
    """Expected accuracy of a blind guess."""
    n: int = 0
    """Items that were scored."""
    cut: int = 0
    """Items that lost examples or the beginning of their context."""
    seen: int | None = None
    """Items that the run, or an ancestor, was trained on; None where that cannot be known any more."""
    tied: int = 0
    """Items whose highest score several choices share: each counts for 1/m."""
    not_finite: int = 0
    """Items with a score of NaN, which count as wrong."""
    centred: float | None = None
    """CORE: accuracy as a share of the way from the task's baseline to 1."""
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Accuracy, interval and n of each group of items, such as a subject."""


@dataclass(frozen=True)
class CentredMean:
    """Mean of a model's centred accuracies over the tasks of a suite, by one rule in one reading."""

    id: str
    step: int
    suite: str
    direction: str
    rule: Rule
    centred: float
    tasks: int
    missing: int
    """Tasks of the suite that have no score by this rule."""

    @property
    def words(self) -> str:
        """Return the mean as a sentence."""
        left = f"; {self.missing} without a score" if self.missing else ""
        mean = f"centred mean {self.centred:.4f} over {self.tasks} tasks"
        return f"{self.suite}, {self.direction}, {self.rule}: {mean}{left}"


def centred_means(scores: Iterable[TaskScore]) -> list[CentredMean]:
    """Return the means over the tasks of each suite that was scored, for each checkpoint, reading and rule.

    Continuations have one rule, `exact`, and count in the mean of every other rule.
    """
    by_reading: dict[tuple[str, int, str, str], list[TaskScore]] = {}
    for score in scores:
        suite, colon, _ = score.task.partition(":")
        if colon and suite in SUITES and score.control is None:
            by_reading.setdefault((score.id, score.step, suite, score.direction), []).append(score)
    means = []
    for place, of_reading in by_reading.items():
        tasks = {score.task for score in of_reading}
        found: dict[Rule, dict[str, float]] = {}
        for score in of_reading:
            if score.centred is not None:
                found.setdefault(score.rule, {})[score.task] = score.centred
        exact = found.pop("exact", {})
        for rule, centred in (found or {"exact": {}}).items():
            every = [*centred.values(), *exact.values()]
            if len(tasks) > 1 and every:
                mean = sum(every) / len(every)
                means.append(CentredMean(*place, rule, mean, len(every), len(tasks) - len(every)))
    return means


def score_of(judged: Sequence[JudgedItem]) -> dict[str, Any]:
    """Return accuracy, interval and counts of some items, as fields of a `TaskScore`."""
    return {
        **accuracy_of([(one.item.group, one.judged.correct) for one in judged]),
        "tied": sum(one.judged.is_tied for one in judged),
        "not_finite": sum(not one.judged.is_finite for one in judged),
    }


def accuracy_of(correct: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return accuracy, interval and n of items, given by group and by how far each is right, and of each group."""
    by_group: dict[str, list[float]] = {}
    for group, share in correct:
        by_group.setdefault(group, []).append(share)
    groups = {group: _accuracy(of) for group, of in sorted(by_group.items())}
    return {**_accuracy([share for _, share in correct]), "groups": {} if set(groups) == {""} else groups}


def _accuracy(shares: Sequence[float]) -> dict[str, Any]:
    total = sum(shares)
    return {"accuracy": total / len(shares), "interval": wilson(total, len(shares)), "n": len(shares)}


def by_rule(judged: Iterable[JudgedItem]) -> dict[tuple[Control | None, Rule], list[JudgedItem]]:
    """Return the judged items by control and rule, the scores without a control first."""
    groups: dict[tuple[Control | None, Rule], list[JudgedItem]] = {}
    for one in judged:
        groups.setdefault((one.control, one.rule), []).append(one)
    return dict(sorted(groups.items(), key=lambda group: group[0][0] is not None))


def example_rows(form: Form, judged: Iterable[JudgedItem]) -> list[dict[str, Any]]:
    """Return a row for each judged item. Ids stand in the first row of their layout alone."""
    rows, previous = [], None
    for one in judged:
        layout = (one.item.id, one.control in (None, "shuffled"), one.ids)
        rows.append(
            {
                "item": one.item.id,
                "place": one.item.place,
                "group": one.item.group,
                "form": form,
                "control": one.control,
                "rule": one.rule,
                "scores": list(one.scores),
                "answer": one.answer,
                "chosen": one.judged.chosen,
                "correct": one.judged.correct,
                "ids": None if layout == previous else list(one.ids),
                "output": None,
                "attempt": 0,
                "outcome": None,
            }
        )
        previous = layout
    return rows


def attempt_rows(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    """Return a row for each attempt at a generated item, with the columns of `example_rows`."""
    return [
        {
            "item": one.item.id,
            "place": one.item.place,
            "group": one.item.group,
            "form": "generated",
            "control": None,
            "rule": "pass@1",
            "scores": None,
            "answer": None,
            "chosen": None,
            "correct": float(one.correct),
            "ids": list(one.ids),
            "output": one.output,
            "attempt": one.number,
            "outcome": one.outcome,
        }
        for one in attempts
    ]


def counts_of(items: FittedItems) -> dict[str, int]:
    """Return how many items were changed or left out, by reason."""
    return {
        "cut": items.cut,
        "dropped_shots": sum(one.dropped_shots for one in items.fitted),
        "merged": sum(one.is_merged for one in items.fitted),
        "does_not_fit": len(items.left_out),
        "empty_choice": len(items.empty),
    }
