"""Charts of loss and gap over model size."""

from __future__ import annotations

import math

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import direction_color, styled

_WIDTH = 520
_COLOR = "#4b5563"


def scaling_chart(law: alt.TopLevelMixin, gaps: alt.TopLevelMixin | None, title: str) -> alt.TopLevelMixin:
    """Stack the chart of the law on the chart of the gap over size, if there is one."""
    return styled((law if gaps is None else alt.vconcat(law, gaps)).properties(title=title))


def law_chart(
    points: pd.DataFrame, curves: pd.DataFrame, predicted: pd.DataFrame, x_title: str, note: str = ""
) -> alt.TopLevelMixin:
    """Draw loss over size, log-log: runs as points, each direction's law with its band, and held-out predictions.

    `points`: direction, run, x, loss; `curves` and `predicted`: direction, x, loss, low, high (the last two may be
    missing). `note` follows the explanation of the marks.
    """
    losses = pd.concat([points["loss"], curves["low"], curves["high"], predicted["low"], predicted["high"]])
    y = alt.Y(
        "loss:Q",
        title="loss (nats per token)",
        scale=alt.Scale(type="log", zero=False, nice=False, padding=8),
        axis=alt.Axis(values=_round_ticks(losses.min(), losses.max()), format="~r"),
    )
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(values=_thinned(points["x"]), format=".3~s", labelOverlap="greedy"),
    )
    directions = list(points["direction"].unique())
    color = direction_color(points["direction"])
    band = alt.Chart(curves).mark_area(opacity=0.18).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color)
    line = alt.Chart(curves).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color)
    runs = (
        alt.Chart(_side_by_side(points, directions))
        .mark_point(filled=True, size=26, opacity=0.7)
        .encode(x=x, y=y, color=color)
    )
    held = alt.Chart(_side_by_side(predicted, directions)).encode(x=x, color=color)
    reach = held.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q")
    mark = held.mark_point(shape="diamond", size=90, strokeWidth=1.6, fill="white", opacity=1).encode(y=y)
    marks = "points: runs; lines and bands: law, 95 % over seeds; diamonds: largest size predicted from the others"
    notes = alt.TitleParams("Loss", subtitle=[marks, note] if note else marks)
    return alt.layer(band, line, reach, mark, runs).properties(width=_WIDTH, height=320, title=notes)


def gap_trend_chart(gaps: pd.DataFrame, trends: pd.DataFrame) -> alt.TopLevelMixin:
    """Draw the gap of each pair over parameters, with its interval over seeds, and the line through the gaps.

    `gaps`: gap (the pair), parameters, nats, low, high (nats per token; the last two may be missing). `trends`: gap,
    parameters, nats.
    """
    x = alt.X(
        "parameters:Q",
        title="parameters (blocks and output layer)",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(values=_thinned(gaps["parameters"]), format=".3~s", labelOverlap="greedy"),
    )
    y = alt.Y("nats:Q", title="nats per token", axis=alt.Axis(tickCount=5))
    of = alt.Chart().encode(x=x)
    is_end = alt.datum.fitted
    zero = alt.Chart().mark_rule(color="#888").encode(y=alt.datum(0))
    line = of.transform_filter(is_end).mark_line(strokeWidth=1.2, color=_COLOR).encode(y=y)
    reach = of.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, color=_COLOR)
    point = of.transform_filter(~is_end).mark_point(filled=True, size=50, color=_COLOR, opacity=1).encode(y=y)
    data = pd.concat([gaps.assign(fitted=False), trends.assign(fitted=True)], ignore_index=True)
    layers = alt.layer(zero, line, reach.encode(y=alt.Y("low:Q"), y2="high:Q"), point, data=data)
    row = alt.Row("gap:N", title=None, sort=list(gaps["gap"].unique()), header=alt.Header(labelLimit=300))
    notes = alt.TitleParams("Gap", subtitle="points and bars: gaps, 95 % over seeds; lines: the fitted trend")
    panels = layers.properties(width=_WIDTH, height=130).facet(row=row, title=notes)
    return panels.resolve_scale(y="independent")


def _side_by_side(rows: pd.DataFrame, directions: list[str]) -> pd.DataFrame:
    """Return the rows with directions a little apart in x, so that none hides another."""
    middle = (len(directions) - 1) / 2
    factor = {name: 1.02 ** (k - middle) for k, name in enumerate(directions)}
    return rows.assign(x=rows["x"] * rows["direction"].map(factor).astype(float))


def _thinned(values: pd.Series[float]) -> list[float]:
    """Return the distinct values, at most eight of them."""
    distinct = sorted(set(values))
    return distinct[:: math.ceil(len(distinct) / 8)]


def _round_ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers in the range; a log axis by itself would show only 2, 3, 4, .."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
