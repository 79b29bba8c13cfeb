"""Charts in altair: SVG or PNG for the page and HTML for the browser, from one specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

PALETTE = {"forward": "#2a6fbb", "backward": "#c8553d", "bidirectional": "#5b8c5a", "permuted": "#8a7f98"}
"""One colour a direction, the same in every chart."""

VERDICTS = {"different": "#d17a00", "no difference seen": "#4b5563", "too few seeds to tell": "#b4b9c2"}

_COLUMNS = 3
_SHORT_NUMBER = "format(datum.value, '~s')"  # 0, 500k, 1.5M; an axis' own format would say 0M


def direction_color(directions: list[str]) -> alt.Color:
    shown = [name for name in PALETTE if name in directions]
    scale = alt.Scale(domain=shown, range=[PALETTE[name] for name in shown])
    return alt.Color("direction:N", scale=scale, title="direction", legend=alt.Legend(symbolOpacity=1))


def learning_curves(curves: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Smoothed training loss (lines) and validation loss (points) over tokens; a panel for each size.

    `curves` has a row a logged step: run, direction, size, lr, tokens, train_loss_smooth and, where it was measured,
    val_loss. Thin lines are single runs; where there are several learning rates each has its dashes.
    """
    if curves.empty:
        return _nothing("no step has been logged yet", title)
    sizes, rates = list(curves["size"].unique()), sorted(curves["lr"].unique())
    base = alt.Chart(curves).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=_SHORT_NUMBER, tickCount=4)),
        color=direction_color(list(curves["direction"].unique())),
    )
    loss = alt.Y("train_loss_smooth:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1, opacity=0.7).encode(y=loss, detail="run:N")
    if len(rates) > 1:
        lines = lines.encode(strokeDash=alt.StrokeDash("lr:N", sort=rates, title="learning rate"))
    points = base.transform_filter("isValid(datum.val_loss)").mark_point(filled=True, size=22, opacity=0.9)
    layered = alt.layer(lines, points.encode(y="val_loss:Q")).properties(width=300, height=240)
    panel = alt.Facet("size:N", title=None, sort=sizes, header=alt.Header(labelFontSize=12, labelLimit=300))
    # sizes have budgets of their own, and share the loss axis
    panels = layered.facet(panel, columns=min(_COLUMNS, len(sizes))).resolve_scale(x="independent")
    return styled(panels.properties(title=title))


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
    return styled(layered.properties(width=460, height=alt.Step(26), title=notes))


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


def _nothing(words: str, title: str) -> alt.TopLevelMixin:
    chart = alt.Chart(pd.DataFrame({"words": [words]})).mark_text(fontSize=13, color="#777").encode(text="words:N")
    return styled(chart.properties(width=300, height=80, title=title))


def styled(chart: Any) -> Any:
    """The look that all charts share."""
    return (
        chart.configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#eee", labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start", offset=12, subtitleColor="#666")
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )
