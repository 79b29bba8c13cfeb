"""Charts of the loss by place in the text, and of layers, states and attention inside the models."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import (
    SHORT_NUMBER,
    direction_color,
    direction_size,
    direction_width,
    forward_first,
    layers_in_order,
    nothing,
    panel_title,
    series_in_order,
    styled,
)

_FEWEST_TOKENS = 30
"""Fewest tokens of a point: a mean over fewer says little, and stands in the table alone."""
_SMALL_NUMBER = "format(datum.value, datum.value < 0.001 ? '.0e' : '~g')"  # 2e-6, 0.01, 3
_MOST_TICKS = 5
_WIDEST, _NARROWEST, _ROOM = 200, 90, 720
"""Widths in pixels: the widest and the narrowest panel beside others, and all panels together."""

_BELOW: dict[str, Any] = {"orient": "bottom", "columns": 1}
"""Legends of panels side by side."""


def position_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw loss and accuracy by place, with their ranges over seeds; a row for each kind of place.

    `table`: series, direction, kind, bin, tokens, loss (nats), accuracy (a share), each of the last two with `_low` and
    `_high`.
    """
    table = forward_first(table[table["tokens"] >= _FEWEST_TOKENS])
    if table.empty:
        return nothing(f"fewer than {_FEWEST_TOKENS} tokens at every place: the table has them", title)
    table = table.assign(of=table["series"].str.partition(", ")[2])  # size and learning rate, if there are several
    panels = [
        alt.hconcat(*(_by_place(table[table["kind"] == kind], kind, what) for what in ("loss", "accuracy")))
        for kind in table["kind"].unique()
    ]
    each = f"each point: {_FEWEST_TOKENS} tokens or more, from its place to the next power of two"
    note = alt.TitleParams(title, subtitle=f"{each}; bands: lowest to highest seed")
    return styled(alt.vconcat(*panels).properties(title=note))


def _by_place(rows: pd.DataFrame, kind: str, what: str) -> Any:
    is_share = "share" in kind
    axis = alt.Axis(format=".3~r" if is_share else ",d", tickCount=6, labelSeparation=6)
    scale = alt.Scale(type="log", base=10 if is_share else 2, nice=False)
    y = {
        "title": "loss (nats)" if what == "loss" else "accuracy",
        "scale": alt.Scale(zero=False),
        "axis": alt.Axis(format=".3~r" if what == "loss" else "~%", tickCount=5),
    }
    base = alt.Chart(rows).encode(
        x=alt.X("bin:Q", title=kind, scale=scale, axis=axis),
        color=direction_color(rows["direction"]),
        detail="series:N",
    )
    line = base.mark_line(opacity=0.8).encode(y=alt.Y(f"{what}:Q", **y), strokeWidth=direction_width(rows["direction"]))
    points = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y(f"{what}:Q", **y), size=direction_size(rows["direction"])
    )
    if rows["of"].nunique() > 1:
        legend = alt.Legend(labelLimit=300)
        line = line.encode(
            strokeDash=alt.StrokeDash("of:N", title="runs", sort=sorted(rows["of"].unique()), legend=legend)
        )
    band = base.mark_area(opacity=0.15).encode(y=alt.Y(f"{what}_low:Q", **y), y2=f"{what}_high:Q")
    return (band + line + points).properties(width=290, height=150)


def layer_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw rms over steps, a line for each layer; a row for each `what`, with its own axis; a column for each series.

    `table`: series, direction, step, layer, what, rms.
    """
    table = table[table["rms"] > 0]
    if table.empty:
        return nothing("all values are zero", title)
    layers = layers_in_order(table["layer"])
    viridis = alt.Scale(domain=layers, scheme=alt.SchemeParams("viridis", extent=[0.25, 0.9]))  # seen on white and dark
    kinds, order = list(table["what"].unique()), series_in_order(table)
    width = max(_NARROWEST, min(_WIDEST, _ROOM // len(order)))
    rows = []
    for kind in kinds:
        of_kind = table[table["what"] == kind]
        lines = (
            alt.Chart(of_kind)
            .mark_line(strokeWidth=1.3, point=alt.OverlayMarkDef(size=14))
            .encode(
                x=alt.X(
                    "step:Q",
                    title="step" if kind == kinds[-1] else None,
                    axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=3, labels=kind == kinds[-1]),
                ),
                y=alt.Y(
                    "rms:Q",
                    title=None,
                    scale=alt.Scale(type="log", nice=False, padding=6),
                    axis=alt.Axis(labelExpr=_SMALL_NUMBER, values=_log_ticks(of_kind["rms"])),
                ),
                color=alt.Color("layer:N", title="layer", sort=layers, scale=viridis),
            )
            .properties(width=width, height=100)
        )
        header = alt.Header(title=None, labels=kind == kinds[0], labelLimit=max(width, 150), labelPadding=4)
        column = alt.Column("series:N", title=None, sort=order, header=header)
        rows.append(lines.facet(column=column, spacing=10, title=panel_title(kind, offset=2)))
    note = alt.TitleParams(title, subtitle="rms, mean over seeds; layers are counted from 0")
    return styled(alt.vconcat(*rows, spacing=8).resolve_scale(color="shared").properties(title=note))


def _log_ticks(values: pd.Series[float]) -> list[float]:
    """Return few round numbers in the range of the values; a log axis by itself would show all of 1, 2, .., 9."""
    low, high = values.min(), values.max()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= _MOST_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


def similarity_chart(pairs: pd.DataFrame, heads: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw CKA by layer, between seeds and across directions, with ranges; beside it distance and entropy of each head.

    `pairs`: group, pair, direction and reading (empty across directions), layer, cka, low, high. `heads`: group,
    direction, layer, entropy (nats), distance (tokens); it may be empty. A row for each group.
    """
    across = pairs["direction"] == ""
    columns = [_cka(part, name) for part, name in ((pairs[~across], "seeds"), (pairs[across], "across")) if len(part)]
    columns += [] if heads.empty else [_looks(heads)]
    own = dict.fromkeys(("color", "strokeDash", "strokeWidth", "shape"), "independent")
    joined = alt.hconcat(*columns).resolve_scale(**own)
    note = alt.TitleParams(title, subtitle="lines: mean over pairs, lowest to highest; points on the right: heads")
    return styled(joined.properties(title=note))


def _cka(pairs: pd.DataFrame, between: str) -> alt.TopLevelMixin:
    """Chart CKA between seeds of one direction in its colour, backward readings dashed; or of all other pairs."""
    if between == "seeds":
        readings = sorted(pairs["reading"].unique(), reverse=True)
        color = direction_color(pairs["direction"], **_BELOW)
        legend = alt.Legend(**_BELOW)
        dash = alt.StrokeDash("reading:N", sort=readings, title="read", legend=legend)
        dashes: dict[str, Any] = {"strokeDash": dash, "strokeWidth": direction_width(pairs["direction"])}
    else:
        legend = alt.Legend(labelLimit=300, symbolOpacity=1, **_BELOW)
        names = list(pairs["pair"].unique())
        color = alt.Color("pair:N", title="pair", sort=names, scale=alt.Scale(scheme="dark2"), legend=legend)
        dashes = {}
    order = layers_in_order(pairs["layer"])
    x = alt.X("layer:N", title="states after layer", sort=order, axis=alt.Axis(labelAngle=0))
    base = alt.Chart(forward_first(pairs)).encode(x=x, color=color, detail="pair:N")
    y = {"title": "CKA", "scale": alt.Scale(domainMax=1, zero=False)}
    curves = base.mark_line(strokeWidth=1.5, opacity=0.8).encode(y=alt.Y("cka:Q", **y), **dashes)
    points = base.mark_point(filled=True, size=28, opacity=1).encode(y=alt.Y("cka:Q", **y))
    ranges = base.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    title = "CKA between seeds" if between == "seeds" else "CKA across directions"
    return _by_group((ranges + curves + points), title)


def _looks(heads: pd.DataFrame) -> alt.TopLevelMixin:
    heads = heads.assign(layer=heads["layer"].astype(str))
    layers = layers_in_order(heads["layer"])
    points = (
        alt.Chart(heads)
        .mark_point(filled=True, size=36, opacity=0.6)
        .encode(
            x=alt.X("distance:Q", title="mean distance looked back (tokens)", scale=alt.Scale(zero=False)),
            y=alt.Y("entropy:Q", title="entropy of attention (nats)", scale=alt.Scale(zero=False)),
            color=direction_color(heads["direction"], **_BELOW),
            shape=alt.Shape("layer:N", title="layer", sort=layers, legend=alt.Legend(orient="right")),
        )
    )
    return _by_group(points, "Attention heads")


def _by_group(chart: Any, title: str) -> alt.TopLevelMixin:
    named = alt.Header(labelLimit=300)
    rows = chart.properties(width=240, height=200).facet(row=alt.Row("group:N", title=None, header=named), title=title)
    return rows.resolve_scale(y="shared")
