"""Table as lines of text: aligned columns under a header. Drawn directly, since a list may have thousands of rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.control import strip_control_codes

Columns = dict[str, list[str]]
"""Cells of a table by the headings of its columns."""

_BETWEEN = "  "


def table_lines(columns: Columns, left: Sequence[str], broken: bool) -> tuple[list[str], list[str]]:
    """Return the lines of the header, with the rule below it, and those of the rows; a row is one line.

    Columns that `left` names are aligned on the left, the others on the right. If `broken`, headings are broken into
    lines no wider than the cells need.
    """
    cells = {name: [_plain(cell) for cell in of] for name, of in columns.items()}
    headings = {name: _broken(name, of) if broken else [name] for name, of in cells.items()}
    widths = [max(map(cell_len, [*headings[name], *of])) for name, of in cells.items()]
    height = max(map(len, headings.values()), default=0)
    heads = [[""] * (height - len(lines)) + lines for lines in headings.values()]
    is_left = [name in left for name in cells]
    rule = "─" * (sum(widths) + len(_BETWEEN) * (len(widths) - 1))
    header = [*_aligned(heads, widths, is_left), rule] if cells else []
    return header, _aligned(list(cells.values()), widths, is_left)


def width_of(lines: Sequence[str]) -> int:
    """Return the columns of a terminal that lines take."""
    return max(map(cell_len, lines), default=0)


def _plain(cell: str) -> str:
    """Return a cell in one line, without the marks of bold text and what would move the cursor."""
    return strip_control_codes(" ".join(cell.replace("**", "").splitlines()).expandtabs())


def _broken(name: str, cells: list[str]) -> list[str]:
    return textwrap.wrap(name, max([*map(len, name.split()), *map(len, cells)]))


def _aligned(columns: Sequence[Sequence[str]], widths: Sequence[int], is_left: Sequence[bool]) -> list[str]:
    padded = [
        [_padded(cell, width, left) for cell in of] for of, width, left in zip(columns, widths, is_left, strict=True)
    ]
    return [_BETWEEN.join(row).rstrip() for row in zip(*padded, strict=True)]


def _padded(cell: str, width: int, is_left: bool) -> str:
    blanks = " " * (width - cell_len(cell))
    return f"{cell}{blanks}" if is_left else f"{blanks}{cell}"
