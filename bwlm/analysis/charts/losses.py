"""Charts of losses: over the training, between directions, in both readings."""

from __future__ import annotations

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import PALETTE, SHORT_NUMBER, direction_color, nothing, styled
from bwlm.directions import TEXT_READINGS

VERDICTS = {
    "different": "#d17a00",
    "no difference seen": "#4b5563",
    "too few seeds to tell": "#b4b9c2",
    "too few seeds chose the rate": "#d9c39a",
}

_COLUMNS = 3


def learning_curves(curves: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw smoothed training loss (lines) and validation loss (points) over tokens; a panel for each size.

    `curves` has a row per logged step: run, direction, size, lr, tokens, loss (nats per token) and, if measured,
    val_loss. A thin line is one run; of several learning rates each has its own dashes.
    """
    if curves.empty:
        return nothing("no step has been logged yet", title)
    sizes, rates = list(curves["size"].unique()), sorted(curves["lr"].unique())
    base = alt.Chart(curves).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=4)),
        color=direction_color(curves["direction"]),
    )
    loss = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1, opacity=0.7).encode(y=loss, detail="run:N")
    if len(rates) > 1:
        lines = lines.encode(strokeDash=alt.StrokeDash("lr:N", sort=rates, title="learning rate"))
    points = base.transform_filter("isValid(datum.val_loss)").mark_point(filled=True, size=22, opacity=0.9)
    layered = alt.layer(lines, points.encode(y="val_loss:Q")).properties(width=300, height=240)
    panel = alt.Facet("size:N", title=None, sort=sizes, header=alt.Header(labelFontSize=12, labelLimit=300))
    # each size has its own budget, so its own x axis; the loss axis is shared
    panels = layered.facet(panel, columns=min(_COLUMNS, len(sizes))).resolve_scale(x="independent")
    return styled(panels.properties(title=title))


def comparison_curves(bands: pd.DataFrame, apart: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw mean loss with the range over seeds, a column for each axis; below it how far directions are apart.

    A row for each size. `bands`: axis, x, loss, low, high (nats per token), size, direction, lr. `apart`: tokens,
    difference, low, high (nats per token; the last two may be missing), size, direction, against.
    """
    rates = sorted(bands["lr"].unique())
    base = alt.Chart(bands).encode(
        x=alt.X("x:Q", title=None, axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=4)),
        color=direction_color(bands["direction"]),
        detail="lr:N",
    )
    y = {"title": "loss (nats per token)", "scale": alt.Scale(zero=False)}
    line = base.mark_line(strokeWidth=1.4).encode(y=alt.Y("loss:Q", **y))
    if len(rates) > 1:
        line = line.encode(strokeDash=alt.StrokeDash("lr:N", sort=rates, title="learning rate"))
    band = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    panels = (band + line).properties(width=210, height=180)
    grid = panels.facet(
        column=alt.Column("axis:N", title=None, sort=list(bands["axis"].unique())),
        row=alt.Row("size:N", title=None, header=alt.Header(labelLimit=300)),
    ).resolve_scale(x="independent")
    note = alt.TitleParams(title, subtitle="training loss, averaged along the curve; bands: lowest to highest seed")
    if apart.empty:
        return styled(grid.properties(title=note))
    joined = alt.vconcat(grid, _differences(apart)).resolve_scale(color="shared")
    return styled(joined.properties(title=note))


def _differences(apart: pd.DataFrame) -> alt.TopLevelMixin:
    base = alt.Chart(apart).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=6)),
        color=direction_color(apart["direction"]),
    )
    y = {"title": "nats per token"}
    band = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18)
    line = base.mark_line(strokeWidth=1.4).encode(y=alt.Y("difference:Q", **y))
    zero = alt.Chart().mark_rule(color="#888").encode(y=alt.datum(0))
    layered = alt.layer(zero, band.encode(y=alt.Y("low:Q", **y), y2="high:Q"), line, data=apart)
    against = " or ".join(apart["against"].unique())
    note = alt.TitleParams(
        f"Loss less that of {against} on the same text",
        subtitle="mean over seeds; bands: 95 % over seeds, for each point by itself",
    )
    row = alt.Row("size:N", title=None, header=alt.Header(labelLimit=300))
    panels = layered.properties(width=700, height=180).facet(row=row, title=note)
    return panels.resolve_scale(x="independent", y="independent")


def gap_chart(gaps: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw each pair's gap with its interval over seeds, on the noise floor as a grey band; zero is `no gap`.

    `gaps`: pair, gap, low, high (nats per token; low and high missing with one seed), floor_low, floor, verdict.
    """
    if gaps.empty:
        return nothing("no pair could be compared", title)
    present = [name for name in VERDICTS if name in set(gaps["verdict"])]
    color = alt.Color(
        "verdict:N", scale=alt.Scale(domain=present, range=[VERDICTS[name] for name in present]), title="verdict"
    )
    x = alt.X(
        "gap:Q",
        title="gap in nats per token (right of zero the first direction has the lower loss)",
        scale=alt.Scale(zero=True, padding=16),
        axis=alt.Axis(tickCount=6, labelFlush=False),
    )
    base = alt.Chart(gaps).encode(y=alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=1000)))
    floor = base.mark_bar(color="#e3e3e3", height=18).encode(x=alt.X("floor_low:Q"), x2="floor:Q")
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color="#888").encode(x="zero:Q")
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5)
    point = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, color=color)
    layered = alt.layer(floor, zero, interval.encode(x="low:Q", x2="high:Q", color=color), point)
    notes = alt.TitleParams(title, subtitle="points: gaps; bars: 95 % over seeds; grey: noise floor between seeds")
    return styled(layered.properties(width=460, height=alt.Step(26), title=notes))


def transfer_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw the loss of each direction in each reading, with its interval over seeds; a row per size and learning rate.

    `table`: size, direction, lr, reading, loss, low, high (nats per token).
    """
    table = table.assign(
        model=table["direction"] + " model", row=table["size"] + ", lr " + table["lr"].map("{:g}".format)
    )
    readings = list(TEXT_READINGS)
    base = alt.Chart(table).encode(
        y=alt.Y("model:N", title=None, sort=[f"{name} model" for name in PALETTE]),
        color=alt.Color(
            "reading:N", title="reading", scale=alt.Scale(domain=readings, range=[PALETTE[k] for k in readings])
        ),
    )
    x = alt.X("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False, padding=12))
    bars = (
        base.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=2)
        .encode(x=alt.X("low:Q", title="loss (nats per token)"), x2="high:Q")
    )
    points = base.mark_point(filled=True, size=80, opacity=1).encode(x=x)
    panels = (
        (bars + points)
        .properties(width=420, height=alt.Step(28))
        .facet(
            row=alt.Row("row:N", title=None, header=alt.Header(labelOrient="top", labelAnchor="start", labelLimit=400))
        )
    )
    note = alt.TitleParams(title, subtitle="points: mean over seeds; bars: 95 % over seeds")
    return styled(panels.properties(title=note))
