"""Scores of tasks in a terminal: a table for each run and task, and items as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from bwlm.cli.terminal import show_heading, show_sentences, show_table

if TYPE_CHECKING:
    from bwlm.evaluate.tasks.choices import Control
    from bwlm.evaluate.tasks.results import TaskScore
    from bwlm.evaluate.tasks.stored import ShownItem

HEADLINES = ("conditional", "pass@1")
"""Rules of the sentences on directions."""
_MOST_GROUPS = 20
"""Most groups of items that get a table."""
CONTROLS: tuple[Control, ...] = ("shuffled", "no_context", "prior")


def show_scores(scores: Sequence[TaskScore]) -> None:
    """Print a table for each run and task: a row for each form, direction and rule, the controls beside it."""
    for (run, step, task), group in groupby(scores, key=lambda score: (score.id, score.step, score.task)):
        of_task = list(group)
        controls = {(s.form, s.direction, s.rule, s.control): s for s in of_task if s.control}
        rows, notes = [], []
        for score in of_task:
            if score.control:
                continue
            if score.accuracy is None or score.interval is None:
                notes.append(
                    f"{score.form}, {score.direction}, {score.rule}: {score.status.replace('_', ' ')}: {score.reason}"
                )
                continue
            beside = [controls.get((score.form, score.direction, score.rule, name)) for name in CONTROLS]
            rows.append(
                [
                    score.form,
                    score.direction + ("" if score.native else " (crossed)"),
                    score.rule,
                    f"{score.accuracy:.1%}",
                    f"{score.interval[0]:.1%} .. {score.interval[1]:.1%}",
                    *(f"{one.accuracy:.1%}" if one and one.accuracy is not None else "" for one in beside),
                ]
            )
        scored = [score for score in of_task if score.accuracy is not None]
        title = f"{run}, step {step:,}: {task}"
        if scored:
            title += f", {scored[0].n:,} items"
        if scored and scored[0].chance is not None:
            title += f", chance {scored[0].chance:.1%}"
        header = ["form", "direction", "rule", "accuracy", "95 %", "shuffled", "no context", "prior"]
        if rows:
            show_table(header, rows, title, names=("form", "direction"), least=("prior", "no context", "shuffled"))
        show_sentences(*notes, *_counts(scored))
        _show_groups(task, [score for score in scored if score.control is None])


def _show_groups(task: str, scored: Sequence[TaskScore]) -> None:
    """Print a table of the groups of a task's items; of many groups the way to see them."""
    groups = list(dict.fromkeys(group for score in scored for group in score.groups))
    if not groups:
        return
    if len(groups) > _MOST_GROUPS:
        show_sentences(f"{len(groups)} groups of {task}: --json has them, and bwlm analyze scores RUN --by-group.")
        return
    rows = [
        [group, str(of["n"]), score.form, score.direction, score.rule, f"{of['accuracy']:.1%}"]
        for group in groups
        for score in scored
        if score.native and (of := score.groups.get(group))
    ]
    header = ["group", "items", "form", "direction", "rule", "accuracy"]
    show_table(header, rows, f"{task} by group, in the model's own direction", names=("group",))


def _counts(scored: Sequence[TaskScore]) -> list[str]:
    """Return a sentence for each thing that happened to some items."""
    sentences = []
    if cut := max((score.cut for score in scored), default=0):
        sentences.append(f"{cut:,} items lost examples or the beginning of their context, to fit into a row.")
    if seen := max((score.seen or 0 for score in scored), default=0):
        sentences.append(f"{seen:,} items stand in the conversations that the run, or an ancestor, was trained on.")
    if tied := max((score.tied for score in scored if not score.control), default=0):
        sentences.append(f"Up to {tied:,} items have choices that share the highest score; each counts for its share.")
    if broken := max((score.not_finite for score in scored), default=0):
        sentences.append(f"{broken:,} items have a score that is not a number; they count as wrong.")
    return sentences


def show_items(items: Sequence[ShownItem]) -> None:
    """Print items as a model reads them, with the scores of their choices; the right choice is marked."""
    for item in items:
        show_heading(item.title)
        show_sentences("read as: " + item.text.replace("\n", "⏎"))
        if item.outputs:
            show_sentences(*(output.replace("\n", "⏎") for output in item.outputs))
        if not item.choices:
            continue
        header = ["choice", *item.scores]
        rows = [
            [("* " if n == item.answer else "  ") + str(n + 1), *(f"{of[n]:.2f}" for of in item.scores.values())]
            for n in range(len(item.choices))
        ]
        show_table(header, rows)
        show_sentences(*(f"{n}: {choice.strip()}" for n, choice in enumerate(item.choices, 1)))
