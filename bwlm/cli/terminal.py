"""Common options of the commands, and their output to a terminal or a script."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field by its dotted name: --set budget.steps=100. Repeatable. Fields: docs/grids.md.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(help="Folder of all runs. Default: $BWLM_STORAGE, or else runs/.", show_default=False),
]
AcceptCode = Annotated[
    bool,
    typer.Option(
        "--accept-code",
        help="Also resume runs that another version of bwlm's code began. Reports then name both versions.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr.")]

_WIDEST = 1000  # columns
_LEFT = ("id", "cell", "phase", "parent", "direction", "state", "size", "pair", "verdict", "reason")
"""Headers of left-aligned columns: words. Figures are aligned on the right."""


def say(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)


def busy(doing: str) -> AbstractContextManager[Any]:
    """Return a context that shows on stderr what is being done, if that is a terminal, until the block ends."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(escape(f"{doing} .."))


def print_json(content: Any) -> None:
    """Print a document; a figure that is not finite is null, since JSON has no NaN."""
    print(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def confirmed(question: str) -> bool:
    """Ask a person. Raises `UserError` where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError("cannot ask for a confirmation, as this is no terminal: add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _needed(console: Console, renderable: Any) -> int:
    """Return the width in columns at which nothing is wrapped or cut off."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=_WIDEST), renderable).maximum


def fits(renderable: Any) -> bool:
    """Return whether something is no wider than the terminal; without a terminal everything fits."""
    console = _console()
    return not console.is_terminal or _needed(console, renderable) <= console.width


def show(*renderables: Any) -> None:
    """Print tables and lines on stdout, without markup."""
    console = _console()
    for renderable in renderables:
        # a figure or id that is cut off is useless: a narrow terminal wraps the line instead
        console.width = max(console.width, _needed(console, renderable))
        is_text = isinstance(renderable, str)  # a user's text may hold [brackets]
        console.print(renderable, soft_wrap=is_text, markup=not is_text)


def show_heading(text: str) -> None:
    """Print a line in bold."""
    _console().print(text, style="bold", markup=False, soft_wrap=True)


def table(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """Return a table for the terminal."""
    from rich import box
    from rich.markup import escape  # a name from a file may look like [b]markup
    from rich.table import Table

    title = escape(title) if title is not None else None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left", title_style="bold")
    for column in header:
        table.add_column(
            column,
            justify="left" if column in _LEFT else "right",
        )
    for row in rows:
        table.add_row(*[escape(cell.replace("**", "")) for cell in row])
    return table


def show_under_titles(table: Table, titles: Sequence[str]) -> None:
    """Print a table with a title above each of its rows."""
    console = _console()
    console.width = max(console.width, _needed(console, table))
    lines = ["".join(segment.text for segment in line) for line in console.render_lines(table, pad=False)]
    head, rule, *rows = [line.rstrip() for line in lines if line.strip()]
    for line in (head, rule, *(line for pair in zip(titles, rows, strict=True) for line in pair)):
        console.print(line, markup=False, soft_wrap=True)


def show_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """Print a title and a line per field: name, value. A terminal wraps long values beside their names."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not console.is_terminal:  # one line a field, for scripts
        room = max(len(name) for name, _ in fields)
        for name, value in fields:
            print(f"  {name:{room}}  {value}")
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields:
        grid.add_row(Text(f"  {name}"), Text(value))
    console.print(grid)


@dataclass(frozen=True)
class Branch:
    """Line of a tree, and the lines below it."""

    name: str
    columns: list[str] = field(default_factory=list)
    note: str = ""
    """Note under the line."""
    children: list[Branch] = field(default_factory=list)


_GUIDE = 4
"""Columns by which rich indents a child."""


def show_tree(branches: list[Branch]) -> None:
    """Show names with their columns aligned; where a terminal is too narrow for that, these stand below the name.

    Lines of the tree are drawn in ASCII if stdout is not a terminal.
    """
    from rich.tree import Tree

    console, lines = _console(), list(_levels(branches, 0))
    room = max((_GUIDE * level + len(line.name) for level, line in lines if line.columns), default=0)
    widths = [
        max(map(len, column)) for column in zip(*(line.columns for _, line in lines if line.columns), strict=True)
    ]
    aligned = not console.is_terminal or room + sum(width + 2 for width in widths) <= console.width
    top = Tree("", hide_root=True)
    for branch in branches:
        _grow(top, branch, [room, *widths] if aligned else [])
    # an id that rich cuts in two is useless: a narrow terminal wraps the line instead
    console.width = max([console.width, *(_GUIDE * level + len(line.name) for level, line in lines)])
    options = console.options
    if not console.is_terminal:
        options.encoding = "ascii"
    for line in console.render_lines(top, options, pad=False):
        console.print("".join(segment.text for segment in line).rstrip(), markup=False, soft_wrap=True)


def _levels(branches: list[Branch], level: int) -> Iterator[tuple[int, Branch]]:
    for branch in branches:
        yield level, branch
        yield from _levels(branch.children, level + 1)


def _grow(tree: Tree, branch: Branch, widths: list[int]) -> None:
    """Add a branch to a tree, with columns of these `widths`, the name's first; without widths, columns go below it."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    name, below = branch.name, [branch.note]
    if widths and branch.columns:
        columns = zip([branch.name, *branch.columns], widths, strict=True)
        name = "  ".join(column.ljust(width) for column, width in columns)
    else:
        below.insert(0, ", ".join(filter(None, branch.columns)))
    child = tree.add(Group(Text(name), *(Padding(Text(line), (0, 0, 0, 2)) for line in below if line)))
    for other in branch.children:
        _grow(child, other, [widths[0] - _GUIDE, *widths[1:]] if widths else [])
