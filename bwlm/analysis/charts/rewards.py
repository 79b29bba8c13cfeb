"""Chart of the rewards of RL."""

from __future__ import annotations

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import direction_color, styled


def reward_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw the reward of each step (thin lines), its mean over runs, and validations (points); a panel per series.

    `table` has a row per step of a run: run, series, direction, step, reward and, after a validation, val_reward.
    """
    base = alt.Chart(table).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5)), color=direction_color(table["direction"])
    )
    y = {"title": "mean reward", "scale": alt.Scale(domain=[0, 1])}
    runs = base.mark_line(strokeWidth=0.7, opacity=0.35).encode(y=alt.Y("reward:Q", **y), detail="run:N")
    mean = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean(reward):Q", **y))
    points = base.transform_filter("isValid(datum.val_reward)").mark_point(filled=True, size=28, opacity=0.8)
    layered = alt.layer(runs, mean, points.encode(y=alt.Y("val_reward:Q", **y))).properties(width=300, height=220)
    header = alt.Header(labelFontSize=12, labelLimit=300)
    facet = alt.Facet("series:N", title=None, sort=list(table["series"].unique()), header=header)
    panels = layered.facet(facet, columns=3)
    subtitle = "lines: samples of a step, each run and their mean; points: greedy answers to validation problems"
    return styled(panels.properties(title=alt.TitleParams(title, subtitle=subtitle)))
