"""HTML page of a report, which needs no network and no other file."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
:root{color-scheme:light dark;--text:#1f2430;--page:#fff;--line:#dfe3e8;--code:#f3f4f6}
@media (prefers-color-scheme:dark){:root{--text:#e4e7ec;--page:#14171c;--line:#333a44;--code:#232831}}
body{max-width:1100px;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--text);background:var(--page);overflow-wrap:break-word}
h1{font-size:1.7rem}h2{margin-top:2.2rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left}
td{white-space:nowrap}th{vertical-align:bottom}td:nth-child(2):last-child{white-space:normal;overflow-wrap:anywhere}
img{max-width:100%}code,pre{background:var(--code);border-radius:3px;padding:.1rem .3rem}
pre{padding:.6rem;overflow-x:auto}ul{padding-left:1.4rem}
@media (max-width:700px){.wide>img{max-width:180vw}}
"""
_SCREEN = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_WIDE = re.compile(r"(<table>.*?</table>)|<p>(<img [^>]*>)</p>", re.DOTALL)
"""Tables and pictures, which scroll by themselves on a narrow screen."""
_BROWSER_LINK = re.compile(r" \(\[in the browser\]\([^)]*\)\)")


def to_page(text: str, folder: Path, title: str) -> str:
    """Return Markdown as an HTML page, with its SVG pictures inlined from `folder`."""
    body = MarkdownIt("commonmark").enable("table").render(_BROWSER_LINK.sub("", text))
    body = re.sub(r'src="([\w.-]+\.svg)"', lambda match: f'src="{_inline(folder / match[1])}"', body)
    body = _WIDE.sub(r'<div class="wide">\1\2</div>', body)
    head = f'<meta charset="utf-8">{_SCREEN}<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _inline(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"
