"""HTML page of a report, which needs no network and no other file."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
body{max-width:1100px;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif;color:#1f2430}
h1{font-size:1.7rem}h2{margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:.85rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e5e7eb;text-align:left;white-space:nowrap}
img{max-width:100%}code,pre{background:#f3f4f6;border-radius:3px;padding:.1rem .3rem}pre{padding:.6rem;overflow-x:auto}
"""
_BROWSER_LINK = re.compile(r" \(\[in the browser\]\([^)]*\)\)")


def to_page(text: str, folder: Path, title: str) -> str:
    """Return Markdown as an HTML page, with its SVG pictures inlined from `folder`."""
    body = MarkdownIt("commonmark").enable("table").render(_BROWSER_LINK.sub("", text))
    body = re.sub(r'src="([\w.-]+\.svg)"', lambda match: f'src="{_inline(folder / match[1])}"', body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _inline(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"
