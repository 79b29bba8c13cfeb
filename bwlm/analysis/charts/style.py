"""Colours, fonts and files of all charts: SVG or PNG for a page, HTML for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

PALETTE = {"forward": "#2a6fbb", "backward": "#c8553d", "bidirectional": "#5b8c5a", "permuted": "#8a7f98"}
"""Colour of each direction, the same in every chart."""

SHORT_NUMBER = "format(datum.value, '~s')"
"""Label expression of an axis: 0, 500k, 1.5M; the axis' own format would say 0M."""

_FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
_PADDING = {"left": 16, "right": 28, "top": 8, "bottom": 8}
"""Padding in pixels: a browser without these fonts takes wider ones, and a legend must not lose its last letters."""


def direction_color(directions: pd.Series[str], **legend: Any) -> alt.Color:
    """Return the colour encoding of directions, with a legend in their order."""
    shown = in_order(directions)
    scale = alt.Scale(domain=shown, range=[PALETTE[name] for name in shown])
    return alt.Color("direction:N", scale=scale, title="direction", legend=alt.Legend(symbolOpacity=1, **legend))


def in_order(directions: pd.Series[str]) -> list[str]:
    """Return the directions that occur, forward before backward."""
    present = set(directions)
    return [name for name in PALETTE if name in present]


def series_in_order(table: pd.DataFrame) -> list[str]:
    """Return the values of the column `series`, forward ones first."""
    order = {name: place for place, name in enumerate(PALETTE)}
    return list(table.sort_values("direction", key=lambda names: names.map(order), kind="stable")["series"].unique())


def styled(chart: Any) -> Any:
    """Return a chart with the common fonts, grid and margins."""
    return (
        chart.configure(font=_FONT, padding=_PADDING)
        .configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#eee", labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start", offset=12, subtitleColor="#666")
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )


def nothing(words: str, title: str) -> alt.TopLevelMixin:
    """Draw a chart that says, in `words`, why there is nothing to draw."""
    chart = alt.Chart(pd.DataFrame({"words": [words]})).mark_text(fontSize=13, color="#777").encode(text="words:N")
    return styled(chart.properties(width=300, height=80, title=title))


def save_chart(chart: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.svg and `name`.html for a report; returns both paths."""
    return [write_chart(chart, folder / f"{name}{suffix}") for suffix in (".svg", ".html")]


def write_chart(chart: Any, path: Path) -> Path:
    """Write a chart whole or not at all, as its suffix says: .svg, .png (twice the pixels), .html without network."""
    suffix = path.suffix.lower()
    options: dict[str, dict[str, Any]] = {".html": {"inline": True}, ".png": {"scale_factor": 2}}
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        chart.save(str(temporary), format=suffix[1:], **options.get(suffix, {}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
