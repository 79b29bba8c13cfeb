"""Charts of losses: over the training, between directions, in both readings."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import (
    PALETTE,
    SHORT_NUMBER,
    SIZES,
    WIDTHS,
    direction_color,
    direction_size,
    direction_width,
    forward_first,
    nothing,
    panel_title,
    styled,
)
from bwlm.directions import TEXT_READINGS

VERDICTS = {
    "different": "#d17a00",
    "no difference seen": "#4b5563",
    "too few seeds to tell": "#b4b9c2",
    "too few seeds chose the rate": "#d9c39a",
}

_COLUMNS = 3
_POINTS = {name: 2 * size for name, size in SIZES.items()}
"""Area of the points of a chart that has few."""


def learning_curves(curves: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw smoothed training loss (lines) and validation loss (points) over tokens; a panel for each size.

    `curves` has a row per logged step: run, direction, size, lr, tokens, loss (nats per token) and, if measured,
    val_loss. A thin line is one run; of several learning rates each has its own dashes.
    """
    if curves.empty:
        return nothing("no step has been logged yet", title)
    sizes, directions = list(curves["size"].unique()), curves["direction"]
    base = _over_tokens(curves)
    lines = base.mark_line(opacity=0.6).encode(y=_LOSS, detail="run:N", strokeWidth=direction_width(directions))
    return _by_size(alt.layer(_dashed(lines, curves), _validations(base, directions)), sizes, title)


def group_curves(curves: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw `learning_curves` of many runs: a line for each direction and learning rate, the mean over its seeds.

    `curves`: size, direction, lr, tokens, and either loss, low and high, or val_loss (nats per token). Bands reach
    from the lowest to the highest seed.
    """
    if curves.empty:
        return nothing("no step has been logged yet", title)
    drawn, directions = _over_tokens(curves), curves["direction"]
    training = drawn.transform_filter("isValid(datum.loss)")
    lines = training.mark_line(opacity=0.8).encode(y=_LOSS, detail="lr:N", strokeWidth=direction_width(directions))
    band = training.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q", detail="lr:N")
    layers = alt.layer(band, _dashed(lines, curves), _validations(drawn, directions))
    return _by_size(layers, list(curves["size"].unique()), title)


_LOSS = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))


def _over_tokens(curves: pd.DataFrame) -> alt.Chart:
    return alt.Chart(forward_first(curves)).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=4)),
        color=direction_color(curves["direction"]),
    )


def _dashed(lines: alt.Chart, curves: pd.DataFrame) -> alt.Chart:
    """Return the lines, of several learning rates each with its own dashes."""
    return lines.encode(strokeDash=_rate_dash(curves)) if _several_rates(curves) else lines


def _validations(base: alt.Chart, directions: pd.Series[str]) -> alt.Chart:
    points = base.transform_filter("isValid(datum.val_loss)").mark_point(filled=True, opacity=0.9)
    return points.encode(y="val_loss:Q", size=direction_size(directions))


def _by_size(layers: alt.LayerChart, sizes: list[str], title: str) -> alt.TopLevelMixin:
    layered = layers.properties(width=300, height=240)
    panel = alt.Facet("size:N", title=None, sort=sizes, header=alt.Header(labelFontSize=12, labelLimit=300))
    # each size has its own budget, so its own x axis; the loss axis is shared
    panels = layered.facet(panel, columns=min(_COLUMNS, len(sizes))).resolve_scale(x="independent")
    return styled(panels.properties(title=title))


def _several_rates(curves: pd.DataFrame) -> bool:
    """Return whether two learning rates of one size and direction must be told apart."""
    return bool((curves.groupby(["size", "direction"])["lr"].nunique() > 1).any())


def _rate_dash(curves: pd.DataFrame) -> alt.StrokeDash:
    return alt.StrokeDash("lr:N", sort=sorted(curves["lr"].unique()), title="learning rate")


def comparison_curves(bands: pd.DataFrame, apart: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw mean loss with the range over seeds, a column for each axis; below it how far directions are apart.

    A row for each size. `bands`: axis, x, loss, low, high (nats per token), size, direction, lr. `apart`: tokens,
    difference, low, high (nats per token; the last two may be missing), size, direction, against.
    """
    base = alt.Chart(forward_first(bands)).encode(
        x=alt.X("x:Q", title=None, axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=4)),
        color=direction_color(bands["direction"]),
        detail="lr:N",
    )
    y = {"title": "loss (nats per token)", "scale": alt.Scale(zero=False)}
    line = base.mark_line(opacity=0.8).encode(y=alt.Y("loss:Q", **y), strokeWidth=direction_width(bands["direction"]))
    line = _dashed(line, bands)
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
    against = " or ".join(apart["against"].unique())
    y = {"title": "nats per token"}
    band = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18)
    line = base.mark_line(strokeWidth=1.4).encode(y=alt.Y("difference:Q", **y))
    zero = alt.Chart().mark_rule(color="#888").encode(y=alt.datum(0))
    layered = alt.layer(zero, band.encode(y=alt.Y("low:Q", **y), y2="high:Q"), line, data=apart)
    note = alt.TitleParams(
        f"Loss minus that of {against} on the same text: above 0 {against} has the lower loss",
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
        title="gap in nats per token (above 0 the first direction has the lower loss, below 0 the second)",
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
    return styled(layered.properties(width=460, height=alt.Step(26), title=notes), gaps["pair"])


def transfer_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw the loss of each direction in each reading, with its interval over seeds; a panel for each size.

    `table`: size, direction, lr, reading, loss, low, high (nats per token).
    """
    several = table.groupby("size")["lr"].transform("nunique") > 1
    rate = (", lr " + table["lr"].map("{:g}".format)).where(several, "")
    table = forward_first(table.assign(model=table["direction"] + " model" + rate))
    ends = pd.concat([table["loss"], table["low"], table["high"]])
    panels = [_readings(table[table["size"] == size], str(size), ends) for size in sorted(table["size"].unique())]
    note = alt.TitleParams(title, subtitle="points: mean over seeds; bars: 95 % over seeds")
    return styled(alt.vconcat(*panels).properties(title=note), table["model"])


def _readings(table: pd.DataFrame, size: str, ends: pd.Series[float]) -> alt.LayerChart:
    """Draw the readings of one size, a line for each model; `ends` are the losses that the axis must reach."""
    readings = list(TEXT_READINGS)

    def scale(values: Mapping[str, object]) -> alt.Scale:
        return alt.Scale(type="ordinal", domain=readings, range=[values[name] for name in readings])

    base = alt.Chart(table.sort_values("reading", key=lambda names: names.map(readings.index))).encode(
        y=alt.Y("model:N", title=None, sort=list(table["model"].unique())),
        color=alt.Color("reading:N", title="read", scale=scale(PALETTE), legend=alt.Legend(symbolOpacity=1)),
    )
    domain = alt.Scale(zero=False, padding=12, domain=[ends.min(), ends.max()])
    x = {"title": "loss (nats per token)", "scale": domain}
    bars = base.transform_filter("isValid(datum.low)").mark_rule(opacity=0.7)
    bars = bars.encode(
        x=alt.X("low:Q", **x), x2="high:Q", strokeWidth=alt.StrokeWidth("reading:N", scale=scale(WIDTHS), legend=None)
    )
    points = base.mark_point(filled=True, opacity=1)
    points = points.encode(x=alt.X("loss:Q", **x), size=alt.Size("reading:N", scale=scale(_POINTS), legend=None))
    return (bars + points).properties(width=420, height=alt.Step(28), title=panel_title(size))
