"""Charts of accuracies: each arm with its interval and its seeds, or over checkpoints; and the chance of a guess."""

from __future__ import annotations

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import OTHER, PALETTE, SHORT_NUMBER, panel_title, styled
from bwlm.directions import TEXT_READINGS


def score_chart(arms: pd.DataFrame, seeds: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw the accuracy of each arm with its interval, and a dot for each seed; a panel for each setting.

    `arms`: setting, direction, accuracy, low, high, chance (may be missing). `seeds`: setting, direction, accuracy, a
    row for each run.
    """
    settings = list(arms["setting"].unique())
    panels = [
        _panel(arms[arms["setting"] == name], seeds[seeds["setting"] == name], name, is_last=name == settings[-1])
        for name in settings
    ]
    note = alt.TitleParams(
        title,
        subtitle=[
            "points: mean over seeds; bars: 95 % over seeds and items (with one seed over items alone)",
            "circles: seeds; dashed: chance",
        ],
    )
    joined = alt.vconcat(*panels, spacing=14).resolve_scale(color="independent")
    return styled(joined.properties(title=note))


def _panel(arms: pd.DataFrame, seeds: pd.DataFrame, setting: str, is_last: bool) -> alt.LayerChart:
    """Draw the arms of one setting; settings differ in difficulty, so each has an axis of its own."""
    names = list(arms["direction"])
    color = alt.Color(
        "direction:N",
        scale=alt.Scale(domain=names, range=[PALETTE.get(name, OTHER) for name in names]),
        legend=None,
    )
    y = alt.Y("direction:N", title=None, sort=names, axis=alt.Axis(labelLimit=300))

    def x(field: str) -> alt.X:
        axis = alt.Axis(tickCount=6, format=".2~f", labelFlush=False)
        return alt.X(
            f"{field}:Q", title="accuracy" if is_last else None, scale=alt.Scale(zero=False, padding=14), axis=axis
        )

    chance = alt.Chart(arms[["chance"]].dropna().drop_duplicates()).mark_rule(color="#888", strokeDash=[4, 3])
    base = alt.Chart(arms).encode(y=y, color=color)
    interval = base.mark_rule(strokeWidth=2.5).encode(x=x("low"), x2="high:Q")
    point = base.mark_point(filled=True, size=90, opacity=1).encode(x=x("accuracy"))
    single = alt.Chart(seeds).mark_point(filled=False, size=24, strokeWidth=1.2, opacity=0.9, yOffset=9)
    single = single.encode(x=x("accuracy"), y=y, color=color)
    layered = alt.layer(chance.encode(x=x("chance")), interval, single, point)
    return layered.properties(width=460, height=alt.Step(34), title=panel_title(setting))


def score_curve_chart(points: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw accuracy over the steps of checkpoints, with its interval as a band; a panel for each setting.

    `points`: setting, series, direction, reading, step, accuracy, low, high, chance (may be missing). A series is a
    direction in a reading.
    """
    series = points[["series", "direction", "reading"]].drop_duplicates()
    colors = [PALETTE.get(name, OTHER) for name in series["direction"]]
    dashes = [_DASHES.get(name, [1, 0]) for name in series["reading"]]
    names = list(series["series"])
    legend = alt.Legend(
        symbolType="stroke",
        symbolOpacity=1,
        symbolStrokeWidth=2.5,
        symbolSize=500,
        labelLimit=400,
        orient="bottom",
        columns=2,
    )
    color = alt.Color("series:N", scale=alt.Scale(domain=names, range=colors), title=None, legend=legend)
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes), title=None, legend=legend)
    settings = list(points["setting"].unique())
    panels = [_curves(points[points["setting"] == name], name, color, dash, name == settings[-1]) for name in settings]
    note = alt.TitleParams(
        title,
        subtitle=[
            "lines: mean over seeds; bands: 95 % over seeds and items (with one seed over items alone)",
            "broken lines: read backward; dotted grey: chance",
        ],
    )
    return styled(alt.vconcat(*panels, spacing=18).properties(title=note))


_DASHES = dict(zip(TEXT_READINGS, ([1, 0], [7, 4]), strict=True))
"""Dashes of a line by reading."""


def _curves(
    points: pd.DataFrame, setting: str, color: alt.Color, dash: alt.StrokeDash, is_last: bool
) -> alt.LayerChart:
    x = alt.X(
        "step:Q",
        title="step of the checkpoint" if is_last else None,
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=6, tickMinStep=1),
    )
    y = {"title": "accuracy", "scale": alt.Scale(zero=False, padding=10), "axis": alt.Axis(format=".2~f", tickCount=6)}
    chance = alt.Chart(points[["chance"]].dropna().drop_duplicates())
    chance = chance.mark_rule(color="#666", strokeWidth=1.2, strokeDash=[3, 3]).encode(y=alt.Y("chance:Q", **y))
    base = alt.Chart(points).encode(x=x, color=color)
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", **y), y2="high:Q", detail="series:N")
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("accuracy:Q", **y), strokeDash=dash)
    point = base.mark_point(filled=True, size=36, opacity=1).encode(y=alt.Y("accuracy:Q", **y))
    return alt.layer(chance, band, line, point).properties(width=520, height=220, title=panel_title(setting))
