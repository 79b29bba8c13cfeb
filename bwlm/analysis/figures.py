"""The pictures of `bwlm analyze`, in the style of `charts.py`."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from bwlm.analysis.charts import direction_color, styled

_SHORT_NUMBER = "format(datum.value, '~s')"
_LAYERS = "viridis"
_FEWEST_TOKENS = 30
"""Under so many a mean loss says little; the table has it."""


def _sorted_directions(table: pd.DataFrame) -> list[str]:
    return list(table["direction"].unique())


def comparison_curves(bands: pd.DataFrame, title: str) -> Any:
    """Mean loss with the range over seeds; a column for each axis, a row for each size.

    `bands`: axis, x, loss, low, high (nats per token), size, direction, lr.
    """
    rates = sorted(bands["lr"].unique())
    base = alt.Chart(bands).encode(
        x=alt.X("x:Q", title=None, axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=4)),
        color=direction_color(_sorted_directions(bands)),
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
    return styled(grid.properties(title=note))


def transfer_chart(table: pd.DataFrame, title: str) -> Any:
    """Loss of each direction in each reading with its interval over seeds; a row for each size and learning rate.

    `table`: size, direction, lr, reading, loss, low, high (nats per token).
    """
    table = table.assign(
        model=table["direction"] + " model", row=table["size"] + ", lr " + table["lr"].map("{:g}".format)
    )
    base = alt.Chart(table).encode(
        y=alt.Y("model:N", title=None, sort=None),
        color=alt.Color(
            "reading:N", title="reading", scale=alt.Scale(domain=["forward", "backward"], range=["#2a6fbb", "#c8553d"])
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
        .facet(row=alt.Row("row:N", title=None, header=alt.Header(labelAngle=0, labelAlign="left", labelLimit=300)))
    )
    note = alt.TitleParams(title, subtitle="points: mean over seeds; bars: 95 % over seeds")
    return styled(panels.properties(title=note))


def position_chart(table: pd.DataFrame, title: str) -> Any:
    """Loss by place, a panel for each kind of place. `table`: direction, kind, bin, tokens, loss (nats)."""
    table = table[table["tokens"] >= _FEWEST_TOKENS]
    kinds = list(table["kind"].unique())
    panels = []
    for kind in kinds:
        is_share = "share" in kind
        scale = alt.Scale(type="log", base=10 if is_share else 2)
        panels.append(
            alt.Chart(table[table["kind"] == kind])
            .mark_line(point=alt.OverlayMarkDef(size=28))
            .encode(
                x=alt.X(
                    "bin:Q", title=kind, scale=scale, axis=alt.Axis(format="~g" if is_share else "~s", tickCount=6)
                ),
                y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
                color=direction_color(_sorted_directions(table)),
            )
            .properties(width=270, height=190)
        )
    note = alt.TitleParams(
        title, subtitle=f"each point: {_FEWEST_TOKENS} tokens or more, from its place to the next power of two"
    )
    return styled(alt.concat(*panels, columns=2).properties(title=note))


def layer_chart(table: pd.DataFrame, title: str) -> Any:
    """Rms over steps, a line for each layer; columns: what is measured, rows: directions.

    `table`: direction, step, layer, what, rms.
    """
    base = alt.Chart(table[table["rms"] > 0])
    lines = (
        base.mark_line(strokeWidth=1.3, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=3)),
            y=alt.Y("rms:Q", title="rms", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=5)),
            color=alt.Color("layer:O", title="layer", scale=alt.Scale(scheme=_LAYERS)),
        )
        .properties(width=150, height=130)
    )
    grid = lines.facet(
        column=alt.Column("what:N", title=None, sort=list(table["what"].unique())),
        row=alt.Row("direction:N", title=None),
    ).resolve_scale(y="shared")
    note = alt.TitleParams(title, subtitle="layer -1: the embedding; mean over the runs of a direction")
    return styled(grid.properties(title=note))


def similarity_chart(pairs: pd.DataFrame, heads: pd.DataFrame, title: str) -> Any:
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
            color=direction_color(_sorted_directions(heads)),
            shape=alt.Shape("layer:O", title="layer"),
        )
        .properties(width=300, height=220)
    )
    joined = alt.hconcat(similarity, seen).resolve_scale(color="independent", shape="independent")
    return styled(joined.properties(title=alt.TitleParams(title, subtitle="points on the right: heads")))
