"""Reward, length and entropy over the steps of RL, by direction and by the settings that differ."""

from __future__ import annotations

import pandas as pd

from bwlm.analysis.charts.rewards import reward_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.labels import series
from bwlm.analysis.runs.losses import load_curves
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.phases import PHASES
from bwlm.record.experiment import ExperimentFolder

FIGURES = ("reward", "sample_tokens", "finished", "entropy")
_ENDS = 10
"""Steps that count as the beginning and the end of a run, at most half of the shortest run each."""


def rewards(folders: list[ExperimentFolder]) -> Analysis:
    """Return the mean reward of each step's samples, and of greedy answers to validation problems.

    Raises `UserError` if no run of the rl phase has logged a reward.
    """
    chosen = [folder for folder in folders if PHASES[folder.config().experiment.phase].has_reward]
    parts = [part for folder in chosen if not (part := _of_run(folder)).empty]
    if not parts:
        raise UserError("analyze rewards: no run of phase rl among these has logged a reward: name one that has")
    table = pd.concat(parts, ignore_index=True)
    table["series"] = table["run"].map(series(chosen))
    steps = max(1, min(_ENDS, int(table.groupby("run").size().min()) // 2))
    ends = _ends(table, steps)
    title = "Reward over the steps of RL"
    others = len(folders) - len(chosen)
    notes = [f"left out: {counted(others, 'run')} of other phases"] if others else []
    return Analysis("rewards", title, _sentences(ends, steps), table, reward_chart(table, title), notes, shown=ends)


def _of_run(folder: ExperimentFolder) -> pd.DataFrame:
    """Return a row per step: step, the figures, and val_reward (NaN without a validation)."""
    curves = load_curves(folder)
    if "reward" not in curves:
        return pd.DataFrame()
    experiment = folder.config().experiment
    kept = ["step", *FIGURES, "val_reward"]
    return curves.reindex(columns=kept).assign(run=folder.id, direction=experiment.direction, seed=experiment.seed)


def _ends(table: pd.DataFrame, ends: int) -> pd.DataFrame:
    """Return a row per run: its reward over the first and the last steps, and at its last validation."""
    rows = []
    for run, part in table.groupby("run", sort=False):
        steps = part.sort_values("step")
        validated = steps["val_reward"].dropna()
        rows.append(
            {
                "run": run,
                "series": steps["series"].iloc[0],
                "reward at first": steps["reward"].head(ends).mean(),
                "reward at last": steps["reward"].tail(ends).mean(),
                "validation": validated.iloc[-1] if len(validated) else None,
                "finished": steps["finished"].tail(ends).mean(),
                "steps": int(steps["step"].max()),
            }
        )
    return pd.DataFrame(rows)


def _sentences(ends: pd.DataFrame, steps: int) -> list[str]:
    sentences = []
    for name, part in ends.groupby("series", sort=False):
        first, last = part["reward at first"], part["reward at last"]
        change = f"{first.mean():.3f} over the first {counted(steps, 'step')}, {last.mean():.3f} over the last {steps}"
        rose = f"it rose in {(last > first).sum()} of {counted(len(part), 'run')}"
        sentences.append(f"{name}: mean reward {change}; {rose}")
    return sentences
