"""Rows of packed text, position by position: the token that a model reads, and its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bwlm.cli.terminal import show_heading
from bwlm.format import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from bwlm.text.tokenizer import Tokenizer

NO_TARGET = "·"
LEGEND = f"read -> target at each position; {NO_TARGET} is no target; ␣ a space, ⏎ a line break"
_WIDEST = 20
"""Most characters of a token that are shown."""
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def show_positions(title: str, row: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Print a row as `inspect_rows` gives it: its segments, with several positions a line on a terminal, else one."""
    from rich.cells import cell_len
    from rich.console import Console

    console = Console(highlight=False)
    segments = counted(len(row["segments"]), "segment")
    show_heading(f"{title}: {len(row['ids'])} positions, {segments}")
    read = [_visible(tokenizer, token) for token in row["ids"]]
    targets = [NO_TARGET if token < 0 else _visible(tokenizer, token) for token in row["targets"]]
    room = max(map(cell_len, read)), max(map(cell_len, targets))
    end = _end(row["ids"], tokenizer.pad)
    for number, (first, last) in enumerate(pairwise([*row["segments"], end]), start=1):
        console.print(f"segment {number}, {_span(first, last)}", style="dim", soft_wrap=True)
        cells = [_cell(at, read[at], targets[at], room, tokenizer) for at in range(first, last)]
        for line in _lines(cells, console):
            console.print(line, soft_wrap=True)
    if end < len(row["ids"]):
        console.print(f"padding, {_span(end, len(row['ids']))}", style="dim", soft_wrap=True)


def _span(first: int, end: int) -> str:
    return f"position {first}" if end == first + 1 else f"positions {first} to {end - 1}"


def _end(ids: list[int], pad: int) -> int:
    """Return the first position of the padding at the end of a row."""
    return next(at for at in range(len(ids), 0, -1) if ids[at - 1] != pad)


def _visible(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as it can be printed in one line: bytes that are no character of their own as `\\xe2`."""
    text = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" in text and token < len(tokenizer.tokens):
        text = tokenizer.tokens[token].decode("utf-8", "backslashreplace")
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text.translate(_VISIBLE))
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 1]}…"


def _cell(at: int, read: str, target: str, room: tuple[int, int], tokenizer: Tokenizer) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    def styled(text: str) -> tuple[str, str]:
        return text, "dim" if text == NO_TARGET else "bold cyan" if text in tokenizer.specials else ""

    left, right = (" " * (wide - cell_len(text)) for wide, text in zip(room, (read, target), strict=True))
    return Text.assemble((f"{at:5} ", "dim"), left, styled(read), " -> ", styled(target), right)


def _lines(cells: list[Text], console: Console) -> Iterator[Text]:
    from rich.text import Text

    columns = max(1, (console.width + 1) // (cells[0].cell_len + 1)) if console.is_terminal else 1
    for start in range(0, len(cells), columns):
        line = Text(" ").join(cells[start : start + columns])
        line.rstrip()
        yield line
