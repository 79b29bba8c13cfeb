"""What the commands share: their common options, and how they speak to a terminal or a script."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, dotted: --set budget.steps=100. Repeatable."),
]
Storage = Annotated[
    str | None, typer.Option(help="Folder of experiments; default: BWLM_STORAGE, else runs/.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]

_WIDEST = 1000  # columns


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def busy(doing: str) -> AbstractContextManager[Any]:
    """Says on a terminal, and nowhere else, what is being done while the block lasts."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(escape(f"{doing} .."))


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def show(*renderables: Any) -> None:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for renderable in renderables:
        # a figure or an id that is cut off is worth nothing: a narrow terminal wraps the line instead
        needed = Measurement.get(console, console.options.update(max_width=_WIDEST), renderable).maximum
        console.width = max(console.width, needed)
        console.print(renderable, soft_wrap=isinstance(renderable, str))


def table(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    from rich import box
    from rich.markup import escape  # a name from a file may look like [b]markup
    from rich.table import Table

    title = escape(title) if title is not None else None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left", title_style="bold")
    for column in header:
        table.add_column(
            column,
            justify="left"
            if column in ("id", "cell", "direction", "state", "size", "pair", "verdict", "reason")
            else "right",
        )
    for row in rows:
        table.add_row(*[escape(cell.replace("**", "")) for cell in row])
    return table
