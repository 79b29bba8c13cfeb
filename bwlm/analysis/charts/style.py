"""Colours, fonts and files of all charts: SVG or PNG for a page, HTML for a browser."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from bwlm.record.storage_cache import StorageCache

PALETTE = {"forward": "#2a6fbb", "backward": "#c8553d", "bidirectional": "#5b8c5a", "permuted": "#8a7f98"}
"""Colour of each direction, the same in every chart."""

OTHER = "#4b5563"
"""Colour of an arm that is none of these directions."""

WIDTHS = {"forward": 3.2, "backward": 1.2, "bidirectional": 1.2, "permuted": 1.2}
"""Width of each direction's lines in pixels: forward is drawn first, and shows on both sides of a line on top of it."""
SIZES = {"forward": 70, "backward": 20, "bidirectional": 20, "permuted": 20}
"""Area of each direction's points in square pixels, for the same reason."""

SHORT_NUMBER = "datum.value && abs(datum.value) < 1 ? format(datum.value, '~g') : format(datum.value, '~s')"
"""Label expression of an axis: 0, 0.5, 500k, 1.5M; the axis' own format would say 0M, and 500m for a half."""

EMBEDDING, OUTPUT = "embedding", "output"
"""Names of what stands before the first layer and after the last."""

_DARK = {
    "white": "#14171c", "#000": "#e4e7ec", "#eee": "#2a2f37", "#ddd": "#3a404a", "#e3e3e3": "#3a414c",
    "#666": "#a4acb8", "#777": "#a4acb8", "#888": "#8a92a0", "#4b5563": "#b9c2cf", "#b4b9c2": "#7c8491",
    "#2a6fbb": "#5fa3ea", "#c8553d": "#e9806a", "#5b8c5a": "#84bd82", "#8a7f98": "#b3a8c4",
}  # fmt: skip
"""Colours on a dark screen, by the colours that a chart is drawn in."""

_FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
_PADDING = {"left": 16, "right": 28, "top": 8, "bottom": 8}
"""Padding in pixels: a browser without these fonts takes wider ones, and a legend must not lose its last letters."""
_WIDER = 1.3
"""Pixels by which a letter of a label is wider in such a browser, at most: the label begins as much further left."""


def direction_color(directions: pd.Series[str], **legend: Any) -> alt.Color:
    """Return the colour encoding of directions, with a legend in their order."""
    shown = in_order(directions)
    scale = alt.Scale(domain=shown, range=[PALETTE[name] for name in shown])
    return alt.Color("direction:N", scale=scale, title="direction", legend=alt.Legend(symbolOpacity=1, **legend))


def direction_width(directions: pd.Series[str]) -> alt.StrokeWidth:
    """Return the encoding of line widths by direction; lay the rows out by `forward_first`."""
    shown = in_order(directions)
    scale = alt.Scale(type="ordinal", domain=shown, range=[WIDTHS[name] for name in shown])
    return alt.StrokeWidth("direction:N", scale=scale, legend=None)


def direction_size(directions: pd.Series[str]) -> alt.Size:
    """Return the encoding of point sizes by direction; lay the rows out by `forward_first`."""
    shown = in_order(directions)
    scale = alt.Scale(type="ordinal", domain=shown, range=[SIZES[name] for name in shown])
    return alt.Size("direction:N", scale=scale, legend=None)


def forward_first(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the order in which they are drawn: what comes later lies on top."""
    order = {name: place for place, name in enumerate(PALETTE)}
    return table.sort_values("direction", key=lambda names: names.map(order), kind="stable")


def in_order(directions: pd.Series[str]) -> list[str]:
    """Return the directions that occur, forward before backward."""
    present = set(directions)
    return [name for name in PALETTE if name in present]


def series_in_order(table: pd.DataFrame) -> list[str]:
    """Return the values of the column `series`, forward ones first."""
    return list(forward_first(table)["series"].unique())


def layers_in_order(layers: pd.Series[str]) -> list[str]:
    """Return the layers that occur, as they follow each other in the model: the embedding, 0, 1, .., the output."""
    place = {EMBEDDING: -1.0, OUTPUT: float("inf")}
    return sorted(set(layers), key=lambda layer: place[layer] if layer in place else float(layer))


def styled(chart: Any, labels: Iterable[str] = ()) -> Any:
    """Return a chart with the common fonts, grid and margins; `labels` are the texts left of its first axis."""
    longest = max(map(len, labels), default=0)
    return (
        chart.configure(font=_FONT, padding={**_PADDING, "left": max(_PADDING["left"], _WIDER * longest)})
        .configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#eee", labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start", offset=12, subtitleColor="#666")
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )


def _dark_style() -> str:
    """Return CSS by which the colours of a chart follow a reader's dark mode."""
    rules = [f'[{what}="{light}"]{{{what}:{dark}}}' for light, dark in _DARK.items() for what in ("fill", "stroke")]
    return f"<style>@media (prefers-color-scheme:dark){{{''.join(rules)}}}</style>"


def _dark_svg(text: str) -> str:
    head, rest = text.split(">", 1)  # the tag of the picture
    return f"{head}>{_dark_style()}{rest}"


def _page_head() -> str:
    body = "body{background:white}@media (prefers-color-scheme:dark){body{background:#14171c}}" + _FITTED
    head = '<meta charset="UTF-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'{head}<meta name="color-scheme" content="light dark"><style>{body}</style>{_dark_style()}'


_FITTED = "svg.marks{background:none!important;max-width:100%;height:auto}"
"""CSS by which a chart shows the page behind it, and is no wider than the window; Vega sets styles of its own."""


def panel_title(text: str, offset: int = 4) -> alt.TitleParams:
    """Return the title of one panel of several, above its left edge."""
    return alt.TitleParams(text, fontSize=12, fontWeight="normal", offset=offset, frame="group")


def nothing(words: str, title: str) -> alt.TopLevelMixin:
    """Draw a chart that says, in `words`, why there is nothing to draw."""
    chart = alt.Chart(pd.DataFrame({"words": [words]})).mark_text(fontSize=13, color="#777").encode(text="words:N")
    return styled(chart.properties(width=300, height=80, title=title))


def save_chart(chart: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.svg and `name`.html for a report; returns both paths."""
    return [write_chart(chart, folder / f"{name}{suffix}") for suffix in (".svg", ".html")]


_PAGE = """<!DOCTYPE html>
<html>
<head>{head}<style>#vis.vega-embed{{width:100%;display:flex}}</style><script>{vega}</script></head>
<body>
<div class="vega-visualization" id="vis"></div>
<script>vegaEmbed('#vis', {spec}, {{"mode": "vega-lite", "renderer": "svg"}}).catch(console.error);</script>
</body>
</html>
"""


def _page(chart: Any) -> str:
    """Return a chart as a page that needs no network and no other file."""
    with alt.data_transformers.disable_max_rows():
        spec = chart.to_json(indent=None).replace("</", "<\\/")  # a text in the chart cannot end the script
    return _PAGE.format(head=_page_head(), vega=_prepared_vega(), spec=spec)


_prepared: list[tuple[threading.Thread, Path]] = []


def prepare_pages(storage: Path) -> None:
    """Begin to make the JavaScript of pages, while something else is done; it is kept in the cache of the storage."""
    if not _prepared:
        _prepared.append((threading.Thread(target=_vega, args=(storage,), daemon=True), storage))
        _prepared[0][0].start()


def _prepared_vega() -> str:
    for thread, storage in _prepared:
        thread.join()
        return _vega(storage)
    return _vega(None)


@cache
def _vega(storage: Path | None) -> str:
    """Return vega, vega-lite and vega-embed in one text. To bundle it takes a second, so a storage keeps it."""
    schema = "_".join(alt.SCHEMA_VERSION.split(".")[:2])
    kept, name = storage and StorageCache(storage, "vega", 1), f"{schema}-{version('vl-convert-python')}.js"
    if kept and (content := kept.read(name)):
        return content.decode()
    bundle: str = vl_convert.javascript_bundle(vl_version=schema)  # type: ignore[call-arg]  # its stub has no default
    if kept:
        kept.write(name, bundle.encode())
    return bundle


def write_chart(chart: Any, path: Path) -> Path:
    """Write a chart whole or not at all, as its suffix says: .svg, .png (twice the pixels), .html without network."""
    suffix = path.suffix.lower()
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        if suffix == ".html":
            temporary.write_text(_page(chart), encoding="utf-8")
        else:
            chart.save(str(temporary), format=suffix[1:], **({"scale_factor": 2} if suffix == ".png" else {}))
        if suffix == ".svg":
            temporary.write_text(_dark_svg(temporary.read_text(encoding="utf-8")), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
