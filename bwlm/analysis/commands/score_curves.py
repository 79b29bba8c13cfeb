"""`bwlm analyze scores ID@all`: accuracy on a task over the checkpoints of runs."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from bwlm.analysis.charts.scores import score_curve_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.commands.scores import interval_words, without_shared
from bwlm.analysis.runs.task_scores import OWN, Wanted, at_best_rates, load_score_curves
from bwlm.directions import is_native, rank
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.score_table import checked_scores
from bwlm.stats.scores import Arm, Scores, measure_arms

_LINE = ["setting", "series"]


def score_curves(folders: list[ExperimentFolder], wanted: Wanted) -> Analysis:
    """Return the accuracy of each direction and reading at each scored checkpoint, with its interval.

    Raises `UserError` if no checkpoint has a result that is asked for.
    """
    rows = load_score_curves(at_best_rates(folders), wanted)
    arms: list[tuple[int, Arm]] = []
    notes: list[str] = []
    for step, of_step in rows.groupby("step"):
        measured, left_out = measure_arms(checked_scores(of_step))
        arms += [(int(str(step)), arm) for arm in measured]
        notes += [f"step {step}: {line}" for line in left_out]
    arms.sort(key=lambda one: (one[1].setting.task, rank(one[1].direction), rank(one[1].setting.reading), one[0]))
    title = ", ".join(dict.fromkeys(folder.config().grid or folder.id for folder in folders))
    return Analysis(
        name="score-curves",
        title=f"{title}: accuracy over checkpoints",
        findings=_findings(_points(arms)) + _single(arms),
        table=_table(arms),
        chart=score_curve_chart(_points(arms), f"{title}: accuracy over checkpoints"),
        notes=notes,
        bounds="95 %",
    )


def _table(arms: list[tuple[int, Arm]]) -> pd.DataFrame:
    """Return a row for each point of each line, at full precision."""
    return pd.DataFrame(
        [
            {
                **arm.setting._asdict(),
                "direction": arm.direction,
                "step": step,
                "seeds": len(arm.seeds),
                "items": arm.items,
                "accuracy": arm.accuracy,
                "interval_low": arm.interval[0],
                "interval_high": arm.interval[1],
                "chance": arm.chance,
            }
            for step, arm in arms
        ]
    )


def _points(arms: list[tuple[int, Arm]]) -> pd.DataFrame:
    """Return the input of the chart: a panel's setting is without the reading, which the series names."""
    plain = [replace(arm, setting=arm.setting._replace(reading="")) for _, arm in arms]
    short, _ = without_shared(Scores(plain, []))
    return pd.DataFrame(
        [
            {
                "setting": str(shown.setting),
                "series": _series(arm),
                "direction": arm.direction,
                "reading": arm.setting.reading,
                "step": step,
                "accuracy": arm.accuracy,
                "low": arm.interval[0],
                "high": arm.interval[1],
                "chance": arm.chance,
            }
            for (step, arm), shown in zip(arms, short.arms, strict=True)
        ]
    )


def _series(arm: Arm) -> str:
    reading = arm.setting.reading
    if reading == OWN:
        return f"{arm.direction}, own reading"
    return f"{arm.direction}, read {reading}" + ("" if is_native(arm.direction, reading) else " (crossed)")


def _findings(points: pd.DataFrame) -> list[str]:
    """Return a sentence for each line: its first, last and highest point."""
    sentences = []
    for (setting, series), line in points.groupby(_LINE, sort=False):
        steps, accuracies = list(line["step"]), list(line["accuracy"])
        interval = interval_words((line["low"].iloc[-1], line["high"].iloc[-1]))
        best = accuracies.index(max(accuracies))
        start = f"{accuracies[0]:.4f} at step {steps[0]:,}, " if len(steps) > 1 else ""
        end = f"{accuracies[-1]:.4f} (95 % {interval}) at step {steps[-1]:,}"
        top = f", highest {accuracies[best]:.4f} at step {steps[best]:,}" if 0 < best < len(steps) - 1 else ""
        sentences.append(f"{setting}, {series}: {start}{end}{top}")
    return sentences


def _single(arms: list[tuple[int, Arm]]) -> list[str]:
    steps = {step for step, _ in arms}
    return ["Only one checkpoint is scored: bwlm eval ID@all --tasks .. scores the others."] if len(steps) == 1 else []
