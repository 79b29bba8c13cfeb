"""Common options of the commands, and their output to a terminal or a script."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.text_table import Columns, table_lines, width_of
from bwlm.errors import UserError
from bwlm.format import WHOLE_NUMBERS, whole_number, wrapped
from bwlm.paths import relative

if TYPE_CHECKING:
    from rich.console import Console
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
    typer.Option(
        help="Folder of all runs, or a bucket: s3://bucket/prefix. Default: $BWLM_STORAGE, or else runs/.",
        show_default=False,
    ),
]
AcceptCode = Annotated[
    bool,
    typer.Option(
        "--accept-code",
        help="Also resume runs that another version of bwlm's code began. Reports then name both versions.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr.")]


def whole_option(
    help: str, lowest: int | None = None, highest: int | None = None, param: str | None = None, **options: Any
) -> Any:
    """Return an option that takes a whole number in any form, such as 2000, 2_000 or 2e3, between two bounds.

    `param` is its name where that is not the parameter's own.
    """

    def parse(text: Any) -> int:
        number = whole_number(text)
        if not isinstance(number, int):
            raise ValueError(f"must be {WHOLE_NUMBERS} (found {text})")
        if lowest is not None and number < lowest:
            raise ValueError(f"must be at least {lowest} (found {text})")
        if highest is not None and number > highest:
            raise ValueError(f"must be at most {highest} (found {text})")
        return number

    names = [param] if param else []
    # typer only shows `min` and `max` beside a parser: it checks neither
    return typer.Option(*names, parser=parse, metavar="<int>", help=help, min=lowest, max=highest, **options)


def number_option(help: str, **options: Any) -> Any:
    """Return an option that takes a number."""

    def parse(text: Any) -> float:
        try:
            return float(text)
        except ValueError:
            written = text.replace(",", ".", 1)
            point = f": write {written}" if re.fullmatch(r"\d+\.\d+", written) else ""
            raise ValueError(f"must be a number, such as 0.5 (found {text}){point}") from None

    return typer.Option(parser=parse, help=help, **{"metavar": "<float>", **options})


_WIDEST = 1000  # columns
_LEFT = (
    "", "id", "cell", "phase", "parent", "direction", "state", "size", "pair", "verdict", "task", "rule", "reading",
    "form", "does", "next", "held by", "kind", "why", "files", "grid",
)  # fmt: skip
"""Headings of left-aligned columns: words. Figures are aligned on the right."""
_LEADS = {"parent": "child of ", **dict.fromkeys(("id", "cell", "direction", "size", "pair", "verdict", "task"), "")}
"""Words before a value in the title of a row, by heading; elsewhere the heading itself."""


def say(message: str) -> None:
    """Print a message on stderr, on a terminal wrapped between words; elsewhere it is one line for scripts."""
    shown = relative(message)
    print(wrapped(shown, _width_of_stderr()) if sys.stderr.isatty() else shown, file=sys.stderr, flush=True)


class LogLines(logging.Handler):
    """Handler that prints log records as other messages, so that a line of progress on stderr makes room for them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `warning: ..`, with the logger's name where it is another library's."""
        name = "" if record.name.split(".")[0] == "bwlm" else f"{record.name}: "
        lead = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(f"{lead}{name}{self.format(record)}")


def _width_of_stderr() -> int:
    from rich.console import Console

    return Console(stderr=True).width


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
    """Return standard output; 80 columns wide if it is not a terminal and COLUMNS is not set."""
    from rich.console import Console

    return Console(highlight=False)


def show(*lines: str) -> None:
    """Print lines on stdout, unwrapped: a path or a command is copied in one piece."""
    for line in lines:
        print(relative(line))


def show_sentences(*sentences: str) -> None:
    """Print sentences on stdout, wrapped between words; what follows the first line of each is indented."""
    for sentence in sentences:
        print(wrapped(relative(sentence), _console().width))


def show_heading(text: str) -> None:
    """Print a line in bold."""
    console = _console()
    console.print(wrapped(text, console.width, "", ""), style="bold", markup=False, soft_wrap=True)


def show_text(spans: Iterable[tuple[str, bool]]) -> None:
    """Print a text, wrapped between words; `marked_spans` says how the marked ones look."""
    from rich.text import Text

    console, line = _console(), Text()
    for text, is_marked in spans:
        shown = text.replace("\n", "⏎")
        line.append(f"«{shown}»" if is_marked and not _has_colors() else shown, "bold green" if is_marked else "")
    console.print(line)


def marked_spans() -> str:
    """Return how a marked span looks here: green, or without colors between « and »."""
    return "green" if _has_colors() else "between « and »"


def _has_colors() -> bool:
    console = _console()
    return console.is_terminal and not console.no_color


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    names: Sequence[str] = (),
    least: Sequence[str] = (),
) -> None:
    """Print a table that is no wider than the terminal. No cell is cut, and a column without a value is left out.

    Where the table is too wide, its headings are broken into lines. Then the columns `least` go, the first one first.
    At last the columns `names` become a title above each row.
    """
    if title is not None:
        show_heading(title)
    columns = {name: list(cells) for name, *cells in zip(header, *rows, strict=True) if any(cells) or not rows}
    width = _console().width
    head, lines = _narrowed(width, columns, least)
    titled = [name for name in columns if name in names]
    if titled and width_of([*head, *lines]) > width:
        below = {name: cells for name, cells in columns.items() if name not in titled}
        head, lines = _narrowed(width, below, least)
        lines = [line for pair in zip(_titles(columns, titled), lines, strict=True) for line in pair]
    for line in (*head, *lines):
        print(line)


def _narrowed(width: int, columns: Columns, least: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the header and the rows with the most columns that fit, or else the narrowest ones."""
    head, lines = table_lines(columns, _LEFT, broken=False)
    for count in range(len(least) + 1):
        if width_of([*head, *lines]) <= width:
            break
        shown = {name: of for name, of in columns.items() if name not in least[:count]}
        head, lines = table_lines(shown, _LEFT, broken=True)
    return head, lines


def _titles(columns: Columns, names: Sequence[str]) -> list[str]:
    """Return a title for each row, from its cells in the columns `names`."""
    leads = [_LEADS.get(name, f"{name} ") for name in names]
    rows = zip(*(columns[name] for name in names), strict=True)
    titles = (zip(leads, row, strict=True) for row in rows)
    return [", ".join(lead + value.replace("**", "") for lead, value in one if value) for one in titles]


def show_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """Print a title and a line per field: name, value. Long values are wrapped beside their names."""
    show_heading(title)
    width, room = _console().width, max(len(name) for name, _ in fields)
    for name, value in fields:
        print(wrapped(relative(value), width, f"  {name:{room}}  ", " " * (room + 4)))


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
    """Show names with their columns aligned; where the terminal is too narrow for that, these stand below the name.

    Lines of the tree are drawn in ASCII if stdout is not a terminal.
    """
    from rich.tree import Tree

    console, lines = _console(), list(_levels(branches, 0))
    room = max((_GUIDE * level + len(line.name) for level, line in lines if line.columns), default=0)
    widths = [
        max(map(len, column)) for column in zip(*(line.columns for _, line in lines if line.columns), strict=True)
    ]
    aligned = room + sum(width + 2 for width in widths) <= console.width
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
