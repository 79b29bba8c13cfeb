"""Charts of the loss by place in the text, and of layers, states and attention inside the models."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from bwlm.analysis.charts.style import SHORT_NUMBER, direction_color, series_in_order, styled

_FEWEST_TOKENS = 30
"""Fewest tokens of a point: a mean over fewer says little, and stands in the table alone."""
_SMALL_NUMBER = "format(datum.value, datum.value < 0.001 ? '.0e' : '~g')"  # 2e-6, 0.01, 3
_WIDEST, _NARROWEST, _ROOM = 200, 90, 720
"""Widths in pixels: the widest and the narrowest panel beside others, and all panels together."""

_BELOW: dict[str, Any] = {"orient": "bottom", "columns": 1}
"""Legends of panels side by side."""


def position_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw loss and accuracy by place, with their ranges over seeds; a row for each kind of place.

    `table`: series, direction, kind, bin, tokens, loss (nats), accuracy (a share), each of the last two with `_low` and
    `_high`.
    """
    table = table[table["tokens"] >= _FEWEST_TOKENS]
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
    line = base.mark_line(strokeWidth=1.4).encode(y=alt.Y(f"{what}:Q", **y))
    points = base.mark_point(filled=True, size=22, opacity=1).encode(y=alt.Y(f"{what}:Q", **y))
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
    kinds, order = list(table["what"].unique()), series_in_order(table)
    width = max(_NARROWEST, min(_WIDEST, _ROOM // len(order)))
    rows = []
    for kind in kinds:
        lines = (
            alt.Chart(table[table["what"] == kind])
            .mark_line(strokeWidth=1.3, point=alt.OverlayMarkDef(size=14))
            .encode(
                x=alt.X(
                    "step:Q",
                    title="step" if kind == kinds[-1] else None,
                    axis=alt.Axis(labelExpr=SHORT_NUMBER, tickCount=3, labels=kind == kinds[-1]),
                ),
                y=alt.Y(
                    "rms:Q",
                    title=kind,
                    scale=alt.Scale(type="log", nice=False, padding=6),
                    axis=alt.Axis(labelExpr=_SMALL_NUMBER, tickCount=4),
                ),
                color=alt.Color("layer:O", title="layer", scale=alt.Scale(scheme="viridis")),
            )
            .properties(width=width, height=100)
        )
        header = alt.Header(title=None, labels=kind == kinds[0], labelLimit=max(width, 150), labelPadding=4)
        rows.append(lines.facet(column=alt.Column("series:N", title=None, sort=order, header=header), spacing=10))
    note = alt.TitleParams(title, subtitle="rms; layer -1: the embedding; mean over seeds")
    return styled(alt.vconcat(*rows, spacing=8).resolve_scale(color="shared").properties(title=note))


def similarity_chart(pairs: pd.DataFrame, heads: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Draw CKA by layer, between seeds and across directions, with ranges; beside it distance and entropy of each head.

    `pairs`: group, pair, direction and reading (empty across directions), layer, cka, low, high. `heads`: group,
    direction, layer, entropy (nats), distance (tokens); it may be empty. A row for each group.
    """
    across = pairs["direction"] == ""
    columns = [_cka(part, name) for part, name in ((pairs[~across], "seeds"), (pairs[across], "across")) if len(part)]
    columns += [] if heads.empty else [_looks(heads)]
    joined = alt.hconcat(*columns).resolve_scale(color="independent", strokeDash="independent", shape="independent")
    note = alt.TitleParams(title, subtitle="lines: mean over pairs, lowest to highest; points on the right: heads")
    return styled(joined.properties(title=note))


def _cka(pairs: pd.DataFrame, between: str) -> alt.TopLevelMixin:
    """Chart CKA between seeds of one direction in its colour, backward readings dashed; or of all other pairs."""
    if between == "seeds":
        readings = sorted(pairs["reading"].unique(), reverse=True)
        color = direction_color(pairs["direction"], **_BELOW)
        legend = alt.Legend(**_BELOW)
        dashes: dict[str, Any] = {"strokeDash": alt.StrokeDash("reading:N", sort=readings, title="read", legend=legend)}
    else:
        legend = alt.Legend(labelLimit=300, symbolOpacity=1, **_BELOW)
        names = list(pairs["pair"].unique())
        color = alt.Color("pair:N", title="pair", sort=names, scale=alt.Scale(scheme="dark2"), legend=legend)
        dashes = {}
    x = alt.X("layer:O", title="layer (-1: embedding)", axis=alt.Axis(labelAngle=0))
    base = alt.Chart(pairs).encode(x=x, color=color, detail="pair:N")
    y = {"title": "CKA", "scale": alt.Scale(domainMax=1, zero=False)}
    curves = base.mark_line(strokeWidth=1.5).encode(y=alt.Y("cka:Q", **y), **dashes)
    points = base.mark_point(filled=True, size=28, opacity=1).encode(y=alt.Y("cka:Q", **y))
    ranges = base.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    title = "CKA between seeds" if between == "seeds" else "CKA across directions"
    return _by_group((ranges + curves + points), title, header=True)


def _looks(heads: pd.DataFrame) -> alt.TopLevelMixin:
    points = (
        alt.Chart(heads)
        .mark_point(filled=True, size=36, opacity=0.6)
        .encode(
            x=alt.X("distance:Q", title="mean distance looked back (tokens)", scale=alt.Scale(zero=False)),
            y=alt.Y("entropy:Q", title="entropy of attention (nats)", scale=alt.Scale(zero=False)),
            color=direction_color(heads["direction"], **_BELOW),
            shape=alt.Shape("layer:O", title="layer", legend=alt.Legend(**_BELOW)),
        )
    )
    return _by_group(points, "Attention heads", header=False)


def _by_group(chart: Any, title: str, header: bool) -> alt.TopLevelMixin:
    named = alt.Header(labels=header, labelLimit=300)
    rows = chart.properties(width=240, height=200).facet(row=alt.Row("group:N", title=None, header=named), title=title)
    return rows.resolve_scale(y="shared")
