"""HTML page of a report, which needs no network and no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Collection
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
:root{color-scheme:light dark;--text:#1f2430;--page:#fff;--line:#dfe3e8;--code:#f3f4f6;--link:#1a5fb4;--edge:#0003}
@media (prefers-color-scheme:dark){:root{--text:#e4e7ec;--page:#14171c;--line:#333a44;--code:#232831}}
@media (prefers-color-scheme:dark){:root{--link:#7db3f5;--edge:#fff4}}
body{max-width:1100px;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--text);background:var(--page);overflow-wrap:break-word}a{color:var(--link)}
nav{line-height:1.8}nav a{margin-right:1.1rem;white-space:nowrap;text-decoration:none}
nav a:hover{text-decoration:underline}
h1{font-size:1.7rem}h2{margin-top:2.2rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
summary{cursor:pointer}summary h2{display:inline-block;width:calc(100% - 1.5rem)}
.wide{overflow-x:auto;margin:1rem 0;background:
linear-gradient(90deg,var(--page) 30%,#0000) 0 0/3rem 100% no-repeat local,
linear-gradient(270deg,var(--page) 30%,#0000) 100% 0/3rem 100% no-repeat local,
linear-gradient(90deg,var(--edge),#0000) 0 0/.7rem 100% no-repeat scroll,
linear-gradient(270deg,var(--edge),#0000) 100% 0/.7rem 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left}
td[style],td:first-child{white-space:nowrap}td{vertical-align:top}th{vertical-align:bottom}
td:nth-child(2):last-child{overflow-wrap:anywhere}
img{max-width:100%}code,pre{background:var(--code);border-radius:3px;padding:.1rem .3rem}
pre{padding:.6rem;overflow-x:auto}ul{padding-left:1.4rem}
@media (max-width:900px){th,td{padding:.25rem .35rem}table{font-size:.8rem}}
@media (max-width:700px){.wide>img{max-width:180vw}}
"""
_SCREEN = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_WIDE = re.compile(r"(<table>.*?</table>)|<p>(<img [^>]*>)</p>", re.DOTALL)
"""Tables and pictures, which scroll by themselves on a narrow screen."""
_REPORT_LINK = re.compile(r'href="([^":]*)\.md"')
"""Links to other reports, of which each is a page too."""
_SECTION = re.compile(r"<h2>(.*?)</h2>(.*?)(?=<h2>|\Z)", re.DOTALL)
_BROWSER_LINK = re.compile(r" \(\[in the browser\]\([^)]*\)\)")


def to_page(text: str, folder: Path, title: str, folded: Collection[str] = ()) -> str:
    """Return Markdown as an HTML page, with its SVG pictures inlined from `folder`.

    Below its title the page links to every section. The sections of the titles in `folded` open at a click.
    """
    body = MarkdownIt("commonmark").enable("table").render(_BROWSER_LINK.sub("", text))
    body = re.sub(r'src="([\w.-]+\.svg)"', lambda match: f'src="{_inline(folder / match[1])}"', body)
    body = _REPORT_LINK.sub(r'href="\1.html"', body)
    body = _WIDE.sub(r'<div class="wide">\1\2</div>', body)
    body = _with_contents(body, folded)
    head = f'<meta charset="utf-8">{_SCREEN}<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _with_contents(body: str, folded: Collection[str]) -> str:
    """Return the body with links to its sections below its title, and with the `folded` ones in `<details>`."""
    titles = [found[1] for found in _SECTION.finditer(body)]
    if not titles:
        return body
    links = "\n".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in titles)
    body = _SECTION.sub(lambda found: _section(found[1], found[2], folded), body)
    return body.replace("</h1>", f"</h1>\n<nav>{links}</nav>", 1)


def _section(title: str, content: str, folded: Collection[str]) -> str:
    heading = f'<h2 id="{_anchor(title)}">{title}</h2>'
    if html.unescape(title) in folded:
        return f"<details><summary>{heading}</summary>{content}</details>\n"
    return heading + content


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _inline(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"
