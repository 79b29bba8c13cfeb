"""Every chart of reports and analyses, in one look: SVG or PNG for the page and HTML for the browser, by altair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

PALETTE = {"forward": "#2a6fbb", "backward": "#c8553d", "bidirectional": "#5b8c5a", "permuted": "#8a7f98"}
"""One colour a direction, the same in every chart."""

VERDICTS = {"different": "#d17a00", "no difference seen": "#4b5563", "too few seeds to tell": "#b4b9c2"}

_COLUMNS = 3
_FEWEST_TOKENS = 30
"""Under so many a mean loss says little; the table has it."""
_FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
_PADDING = {"left": 16, "right": 28, "top": 8, "bottom": 8}
"""Pixels; a browser without those fonts takes wider ones, and a legend must not lose its last letters."""
_SHORT_NUMBER = "format(datum.value, '~s')"  # 0, 500k, 1.5M; an axis' own format would say 0M


def learning_curves(curves: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Smoothed training loss (lines) and validation loss (points) over tokens; a panel for each size.

    `curves` has a row a logged step: run, direction, size, lr, tokens, loss and, where it was measured,
    val_loss. Thin lines are single runs; where there are several learning rates each has its dashes.
    """
    if curves.empty:
        return _nothing("no step has been logged yet", title)
    sizes, rates = list(curves["size"].unique()), sorted(curves["lr"].unique())
    base = alt.Chart(curves).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=4)),
        color=_direction_color(curves["direction"]),
    )
    loss = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1, opacity=0.7).encode(y=loss, detail="run:N")
    if len(rates) > 1:
        lines = lines.encode(strokeDash=alt.StrokeDash("lr:N", sort=rates, title="learning rate"))
    points = base.transform_filter("isValid(datum.val_loss)").mark_point(filled=True, size=22, opacity=0.9)
    layered = alt.layer(lines, points.encode(y="val_loss:Q")).properties(width=300, height=240)
    panel = alt.Facet("size:N", title=None, sort=sizes, header=alt.Header(labelFontSize=12, labelLimit=300))
    # sizes have budgets of their own, and share the loss axis
    panels = layered.facet(panel, columns=min(_COLUMNS, len(sizes))).resolve_scale(x="independent")
    return _styled(panels.properties(title=title))


def comparison_curves(bands: pd.DataFrame, apart: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Mean loss with the range over seeds, a column for each axis; below it how far directions are apart.

    A row for each size. `bands`: axis, x, loss, low, high (nats per token), size, direction, lr. `apart`: tokens,
    difference, low, high (nats per token; the last two may be missing), size, direction, against.
    """
    rates = sorted(bands["lr"].unique())
    base = alt.Chart(bands).encode(
        x=alt.X("x:Q", title=None, axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=4)),
        color=_direction_color(bands["direction"]),
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
        return _styled(grid.properties(title=note))
    joined = alt.vconcat(grid, _differences(apart)).resolve_scale(color="shared")
    return _styled(joined.properties(title=note))


def _differences(apart: pd.DataFrame) -> alt.TopLevelMixin:
    base = alt.Chart(apart).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=6)),
        color=_direction_color(apart["direction"]),
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
    """Each pair's gap with its interval over seeds, beside the noise floor as a grey band; zero is `no gap`.

    `gaps`: pair, gap, low, high (nats per token; low and high missing with one seed), floor_low, floor, verdict.
    """
    if gaps.empty:
        return _nothing("no pair could be compared", title)
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
    return _styled(layered.properties(width=460, height=alt.Step(26), title=notes))


def scaling_chart(
    points: pd.DataFrame, curves: pd.DataFrame, predicted: pd.DataFrame, x_title: str, title: str, note: str = ""
) -> alt.TopLevelMixin:
    """Loss over size, log-log: a point a run, the fitted law of each direction with its band, the held-out prediction.

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
    color = _direction_color(points["direction"])
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
    notes = alt.TitleParams(title, subtitle=[marks, note] if note else marks)
    return _styled(alt.layer(band, line, reach, mark, runs).properties(width=520, height=320, title=notes))


def transfer_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Loss of each direction in each reading with its interval over seeds; a row for each size and learning rate.

    `table`: size, direction, lr, reading, loss, low, high (nats per token).
    """
    table = table.assign(
        model=table["direction"] + " model", row=table["size"] + ", lr " + table["lr"].map("{:g}".format)
    )
    readings = ["forward", "backward"]
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
    return _styled(panels.properties(title=note))


def position_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Loss by place, a panel for each kind of place. `table`: series, direction, kind, bin, tokens, loss (nats)."""
    table = table[table["tokens"] >= _FEWEST_TOKENS]
    kinds, several = list(table["kind"].unique()), list(table["series"].unique())
    dashes = alt.StrokeDash("series:N", sort=several, legend=alt.Legend(labelLimit=300))
    panels = []
    for kind in kinds:
        is_share = "share" in kind
        scale = alt.Scale(type="log", base=10 if is_share else 2)
        panels.append(
            alt.Chart(table[table["kind"] == kind])
            .mark_line(point=alt.OverlayMarkDef(size=28))
            .encode(
                x=alt.X(
                    "bin:Q", title=kind, scale=scale, axis=alt.Axis(format="~g" if is_share else ",d", tickCount=6)
                ),
                y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
                color=_direction_color(table["direction"]),
                **({"strokeDash": dashes} if len(several) > table["direction"].nunique() else {"detail": "series:N"}),
            )
            .properties(width=270, height=190)
        )
    note = alt.TitleParams(
        title, subtitle=f"each point: {_FEWEST_TOKENS} tokens or more, from its place to the next power of two"
    )
    return _styled(alt.concat(*panels, columns=2).properties(title=note))


def layer_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Rms over steps, a line for each layer; columns: what is measured, rows: series.

    `table`: series, direction, step, layer, what, rms.
    """
    base = alt.Chart(table[table["rms"] > 0])
    lines = (
        base.mark_line(strokeWidth=1.3, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=3)),
            y=alt.Y("rms:Q", title="rms", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=5)),
            color=alt.Color("layer:O", title="layer", scale=alt.Scale(scheme="viridis")),
        )
        .properties(width=150, height=130)
    )
    grid = lines.facet(
        column=alt.Column("what:N", title=None, sort=list(table["what"].unique())),
        row=alt.Row("series:N", title=None, sort=_in_order(table), header=alt.Header(labelLimit=300)),
    ).resolve_scale(y="shared")
    note = alt.TitleParams(title, subtitle="layer -1: the embedding; mean over seeds")
    return _styled(grid.properties(title=note))


def _in_order(table: pd.DataFrame) -> list[str]:
    """The series, forward before backward."""
    order = {name: place for place, name in enumerate(PALETTE)}
    return list(table.sort_values("direction", key=lambda names: names.map(order), kind="stable")["series"].unique())


def similarity_chart(pairs: pd.DataFrame, heads: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """CKA by layer for each kind of pair, with its range; beside it where each head looks.

    `pairs`: pair, layer, cka, min, max. `heads`: direction, layer, entropy (nats), distance (tokens).
    """
    color = alt.Color(
        "pair:N",
        title="pairs of runs",
        sort=list(pairs["pair"].unique()),
        legend=alt.Legend(labelLimit=260, symbolOpacity=1),
    )
    base = alt.Chart(pairs).encode(
        x=alt.X("layer:O", title="layer (0: embedding)", axis=alt.Axis(labelAngle=0)), color=color
    )
    y = {"title": "CKA", "scale": alt.Scale(domainMax=1, zero=False)}
    curves = base.mark_line(point=True).encode(y=alt.Y("cka:Q", **y))
    ranges = base.mark_rule(opacity=0.5).encode(y=alt.Y("min:Q", **y), y2="max:Q")
    similarity = (ranges + curves).properties(width=300, height=220)
    seen = (
        alt.Chart(heads)
        .mark_point(filled=True, size=40, opacity=0.7)
        .encode(
            x=alt.X("distance:Q", title="mean distance looked back (tokens)"),
            y=alt.Y("entropy:Q", title="entropy of attention (nats)", scale=alt.Scale(zero=False)),
            color=_direction_color(heads["direction"]),
            shape=alt.Shape("layer:O", title="layer"),
        )
        .properties(width=300, height=220)
    )
    joined = alt.hconcat(similarity, seen).resolve_scale(color="independent", shape="independent")
    return _styled(joined.properties(title=alt.TitleParams(title, subtitle="points on the right: heads")))


# Files


def save_chart(chart: Any, folder: Path, name: str) -> list[Path]:
    """Writes `name`.svg and `name`.html for a report; returns both paths."""
    return [write_chart(chart, folder / f"{name}{suffix}") for suffix in (".svg", ".html")]


def write_chart(chart: Any, path: Path) -> Path:
    """Writes a chart whole or not at all, as its suffix says: .svg, .png (twice the pixels), .html without network."""
    suffix = path.suffix.lower()
    options: dict[str, dict[str, Any]] = {".html": {"inline": True}, ".png": {"scale_factor": 2}}
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        chart.save(str(temporary), format=suffix[1:], **options.get(suffix, {}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# What charts share


def _direction_color(directions: pd.Series[str]) -> alt.Color:
    present = set(directions)
    shown = [name for name in PALETTE if name in present]
    scale = alt.Scale(domain=shown, range=[PALETTE[name] for name in shown])
    return alt.Color("direction:N", scale=scale, title="direction", legend=alt.Legend(symbolOpacity=1))


def _styled(chart: Any) -> Any:
    """The look that all charts share."""
    return (
        chart.configure(font=_FONT, padding=_PADDING)
        .configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#eee", labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start", offset=12, subtitleColor="#666")
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )


def _nothing(words: str, title: str) -> alt.TopLevelMixin:
    chart = alt.Chart(pd.DataFrame({"words": [words]})).mark_text(fontSize=13, color="#777").encode(text="words:N")
    return _styled(chart.properties(width=300, height=80, title=title))


# Helpers of the scaling chart


def _side_by_side(rows: pd.DataFrame, directions: list[str]) -> pd.DataFrame:
    """Directions a little apart in x, so that none hides another."""
    middle = (len(directions) - 1) / 2
    factor = {name: 1.02 ** (k - middle) for k, name in enumerate(directions)}
    return rows.assign(x=rows["x"] * rows["direction"].map(factor).astype(float))


def _thinned(values: pd.Series[float]) -> list[float]:
    """The distinct values, at most eight of them."""
    distinct = sorted(set(values))
    return distinct[:: math.ceil(len(distinct) / 8)]


def _round_ticks(low: float, high: float) -> list[float]:
    """About six round numbers inside the range, of which a log axis by itself would show only 2, 3, 4, .."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
