"""Charts in altair: an SVG for the page and HTML for the browser, from one specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

PALETTE = {"forward": "#2a6fbb", "backward": "#c8553d", "bidirectional": "#5b8c5a", "permuted": "#8a7f98"}
"""One colour a direction, the same in every chart."""


def direction_color(directions: list[str]) -> alt.Color:
    shown = [name for name in PALETTE if name in directions]
    scale = alt.Scale(domain=shown, range=[PALETTE[name] for name in shown])
    return alt.Color("direction:N", scale=scale, title="direction")


def learning_curves(curves: pd.DataFrame, title: str) -> alt.LayerChart | alt.FacetChart:
    """Smoothed training loss (lines) and validation loss (points) over tokens; a column for each size.

    `curves` has a row a logged step: run, direction, size, lr, tokens, train_loss_smooth and, where it was measured,
    val_loss. Thin lines are single runs.
    """
    directions = list(curves["direction"].unique())
    base = alt.Chart(curves).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", tickCount=4)),
        color=direction_color(directions),
    )
    lines = base.mark_line(strokeWidth=1, opacity=0.55).encode(
        y=alt.Y("train_loss_smooth:Q", title="loss (nats per token)", scale=alt.Scale(zero=False)), detail="run:N"
    )
    points = base.transform_filter("isValid(datum.val_loss)").mark_point(filled=True, size=36, opacity=0.9)
    layered = alt.layer(lines, points.encode(y="val_loss:Q")).properties(width=300, height=240)
    return _styled(layered.facet(column=alt.Column("size:N", title=None)).properties(title=title))


def gap_chart(gaps: pd.DataFrame, title: str) -> alt.LayerChart:
    """Each pair's gap with its interval over seeds, beside the noise floor as a grey band; zero is `no gap`.

    `gaps`: pair, gap, low, high (nats per token; low and high missing with one seed), floor, verdict.
    """
    base = alt.Chart(gaps).encode(y=alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)))
    floor = base.mark_bar(color="#d9d9d9", height=18).encode(
        x=alt.X("floor_low:Q", title="gap in nats per token (second minus first)"), x2="floor:Q"
    )
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color="#888").encode(x="zero:Q")
    interval = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    point = base.mark_point(filled=True, size=80, opacity=1).encode(
        x="gap:Q",
        color=alt.Color(
            "verdict:N",
            scale=alt.Scale(
                domain=["different", "no difference seen", "too few seeds to tell"],
                range=["#c8553d", "#2a6fbb", "#8a7f98"],
            ),
        ),
    )
    return _styled(alt.layer(floor, zero, interval, point).properties(width=460, title=title))


def save_chart(chart: Any, folder: Path, name: str) -> list[Path]:
    """Writes `name`.svg and `name`.html; returns both paths."""
    paths = [folder / f"{name}.svg", folder / f"{name}.html"]
    for path in paths:
        temporary = path.with_name(f".tmp-{path.name}")
        chart.save(str(temporary), **({"inline": True} if path.suffix == ".html" else {}))
        temporary.replace(path)
    return paths


def _styled(chart: Any) -> Any:
    return (
        chart.configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#eee", labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start")
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )
