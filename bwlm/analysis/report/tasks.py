"""Section of a report on scores on tasks: accuracies, verdicts, what a reading costs, and what was not scored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts.style import save_chart
from bwlm.analysis.commands.result import markdown_table
from bwlm.analysis.commands.scores import (
    ARM_HEADER,
    ARM_NAMES,
    PAIR_HEADER,
    arm_columns,
    arm_sentences,
    interval_words,
    pair_columns,
    score_analysis,
    without_shared,
)
from bwlm.analysis.runs.task_findings import CONTROLS, TaskFindings, is_main
from bwlm.analysis.runs.task_scores import OWN
from bwlm.directions import is_native, own_readings
from bwlm.format import counted
from bwlm.record.metrics import task_metric
from bwlm.stats.score_readings import ReadingCost
from bwlm.stats.scores import Arm, Scores

BY_RULE = "Tasks by every rule"
_COST_HEADER = [
    *("task", "size", "direction", "seeds", "native accuracy", "cross-direction accuracy", "direction gap"),
    *("bidirectional balance", "95 %"),
]
_NAMES = ("task", "size", "direction", "reading", "form", "rule")
"""First columns of the tables of accuracies."""


def tasks_section(found: TaskFindings | None, home: Path, name: str) -> tuple[list[str], list[Path]]:
    """Return the section and its chart, which is written below `home`; nothing if no run has scores.

    `name` is the grid or the run as a person would type it.
    """
    if found is None:
        return [], []
    parts, pictures = ["## Tasks"], list[Path]()
    compared, _ = without_shared(found.compared)
    if compared.arms:
        settings = dict.fromkeys(arm.setting for arm in compared.arms)
        parts += [_listed([line for setting in settings for line in arm_sentences(compared, setting)])]
    parts += [_listed(compared.left_out)] if compared.left_out else []
    parts += [_arm_table(found, found.main_arms()), _ACCURACY] if found.main_arms() else []
    if compared.arms:
        pictures = save_chart(score_analysis(compared, name).chart, home, "tasks")
        parts += ["![accuracies](tasks.svg) ([in the browser](tasks.html))"]
    parts += _pairs(compared)
    parts += [_cost_table(found.costs), _COST] if found.costs else []
    parts += ["Not scored:", _listed(left)] if (left := _not_scored(found.results)) else []
    parts += [f"The comparison alone: `bwlm analyze scores {name}`."]
    parts += [f"## {BY_RULE}", _arm_table(found, found.other_arms())] if found.other_arms() else []
    return parts, pictures


def tasks_summary(found: TaskFindings | None) -> list[str]:
    """Return the verdicts and what a reading costs, as Markdown for a reader who has not opened the report."""
    if found is None:
        return []
    parts = [*_pairs(without_shared(found.compared)[0]), *([_cost_table(found.costs)] if found.costs else [])]
    return ["Tasks", *parts] if parts else []


def task_metrics(found: TaskFindings | None) -> dict[str, float]:
    """Return what readings cost as metrics of the grid: `tasks/arc_easy/native/d4_forward`, .. /direction_gap/.."""
    metrics: dict[str, float] = {}
    for one in found.costs if found else []:
        gap = "bidirectional_balance" if one.is_balance else "direction_gap"
        figures = {"native": one.native, "crossed": one.crossed, gap: one.difference.difference}
        name = re.sub(r"[^\w.-]", "_", f"{one.setting.size}_{one.direction}")
        named = {task_metric(one.setting.task, f"{figure}/{name}"): value for figure, value in figures.items()}
        metrics |= {metric: value for metric, value in named.items() if value is not None}
    return metrics


def _pairs(compared: Scores) -> list[str]:
    if not compared.differences:
        return []
    return [_table(PAIR_HEADER, [pair_columns(one) for one in compared.differences]), _DIFFERENCE]


def _arm_table(found: TaskFindings, arms: list[Arm]) -> str:
    header = [*_NAMES, *ARM_HEADER[len(ARM_NAMES) :], *(control.replace("_", " ") for control in CONTROLS)]
    return _table(header, [_columns(found, arm) for arm in arms])


def _columns(found: TaskFindings, arm: Arm) -> list[str]:
    columns = dict(zip(ARM_HEADER, arm_columns(arm), strict=True)) | {"reading": _reading(arm)}
    columns["form"] = "" if is_main(arm) else arm.setting.form  # the rule tells it
    names, figures = ([columns[name] for name in wanted] for wanted in (_NAMES, ARM_HEADER[len(ARM_NAMES) :]))
    return [*names, *figures, *(_share(found.control(arm, control)) for control in CONTROLS)]


def _reading(arm: Arm) -> str:
    """Return the reading of an arm in words: `forward`, `both`, `backward (crossed)`."""
    if arm.setting.reading == OWN:
        own = own_readings(arm.direction)
        return own[0] if len(own) == 1 else "both"
    return arm.setting.reading + ("" if is_native(arm.direction, arm.setting.reading) else " (crossed)")


def _cost_table(costs: list[ReadingCost]) -> str:
    return _table(_COST_HEADER, [_cost_columns(one) for one in costs])


def _cost_columns(one: ReadingCost) -> list[str]:
    difference = f"{one.difference.difference:+.4f}"
    gap, balance = ("", difference) if one.is_balance else (difference, "")
    accuracies = f"{one.native:.4f}", _share(one.crossed)
    seeds, ends = str(len(one.difference.seeds)), interval_words(one.difference.interval, "+")
    return [one.setting.task, str(one.setting.size), one.direction, seeds, *accuracies, gap, balance, ends]


def _not_scored(results: pd.DataFrame) -> list[str]:
    """Return a line for each reason why something has no score, and for each task that lost items."""
    lines = []
    unscored = results[results["status"].ne("scored")]
    for (status, reason), rows in unscored.groupby(["status", "reason"], sort=False):
        what = rows["task"] + ", " + rows["reading"] + ", " + rows["rule"]
        runs = counted(rows["run"].nunique(), "run")
        lines.append(f"{str(status).replace('_', ' ')}: {reason} ({runs}: {'; '.join(dict.fromkeys(what))})")
    most = results.groupby(["task", "form"], sort=False, as_index=False)["left_out"].max()
    left_out = most[most["left_out"] > 0].itertuples(index=False)
    return lines + [
        f"{one.task}, {one.form}: {counted(int(one.left_out), 'item')} longer than a row" for one in left_out
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table without the columns that are empty, and without a size that all rows share."""
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    kept = {
        name: cells
        for name, cells in columns.items()
        if any(cells) and not (name in ("size", "form") and len(set(cells)) == 1)
    }
    return markdown_table(list(kept), ([cell or "–" for cell in row] for row in zip(*kept.values(), strict=True)))


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


_ACCURACY = """Mean over seeds, each direction at its best learning rate. The reading is the model's own, or `crossed`:
the one that it was not trained in. 95 % intervals are over seeds and items, with one seed over items alone. `shuffled`
judges the same scores by the answers of other items and must be at chance; `no context` has no question, `prior` the
choice alone."""

_DIFFERENCE = """A difference is the second direction's accuracy minus the first's, each in its own reading. `different`
is said only if p, Holm-adjusted over all pairs of this table, is below 0.05. `seen from` is the smallest true
difference that a further study like this one would call different with 80 % power."""

_COST = """The direction gap is the native minus the cross-direction accuracy of the same models; of bidirectional
models, which own both readings, the balance is the accuracy read forward minus the accuracy read backward. Intervals
are over seeds and items, each of one row by itself."""
