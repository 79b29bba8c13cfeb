"""Counts and lists in words, and numbers as people write them."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable
from typing import Any

WHOLE_NUMBERS = "a whole number, such as 2000, 2_000 or 2e3"
"""Words that tell a person which values `whole_number` reads."""


def whole_number(value: Any) -> Any:
    """Return the integer that a float or a text stands for: 1e9, 1.5e6, 1_000_000; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
        with contextlib.suppress(ValueError):
            return int(number) if (number := float(value)).is_integer() else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}


def json_kind(value: object) -> str:
    """Return what JSON calls a value, for a message that says what a file holds: `a list`; a number as it stands."""
    return _JSON_KINDS.get(type(value), f"{value!r:.40}")


def counted(number: int, noun: str) -> str:
    """Return `1 cell` or `3 cells`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_of(names: list[str]) -> str:
    """Return the first name and the number of the others: `a and 2 more`."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def short_number(value: float) -> str:
    """Return three digits with a suffix: 1234567 -> 1.23M."""
    for bound, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{suffix}"
    return f"{value:g}"


def file_size(size: int) -> str:
    """Return a size in decimal units: 1234567 -> 1.2 MB."""
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= bound:
            return f"{size / bound:.1f} {unit}"
    return f"{size} B"


def clock(seconds: float) -> str:
    """Return a duration as a clock shows it: 3:07, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which there are two: `12 minutes`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def listed(items: Iterable[object]) -> str:
    """Return the distinct items in a fixed order, numbers first: `2, 10, a, b`."""
    return ", ".join(map(str, sorted(set(items), key=lambda item: (isinstance(item, str), item))))


def wrapped(text: str, width: int, first: str = "", others: str = "  ") -> str:
    """Return a text in lines of at most `width` columns, with no word cut; `first` and `others` begin the lines.

    Lines that the text has already stay apart, each with its own indentation.
    """
    lines = []
    for line in text.split("\n"):
        margin = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            width,
            initial_indent=first,
            subsequent_indent=margin + others,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def visible(text: str) -> str:
    """Return a text in which control characters are pictures of themselves: a model's text steers no terminal."""
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F or code > 0x9F:
        return character
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"
