"""Rows of a data set, and their reading from JSON: an object a line, or an array of objects.

A line that cannot be read gives a row with a fault, so that all faults of a file can be told at once. Damage after
which nothing can be read raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import fsspec

import bwlm.text.json_lines as json_lines
from bwlm.errors import Unusable, UserError, first_line, nearest
from bwlm.format import json_kind

MEND = "write the file again, or remove it"
_BLANKS = re.compile(r"[ \t\n\r]*")
_CHARACTERS_AT_ONCE = 2**20
_LONGEST_ELEMENT = 2**26
"""Characters of an array after which an element that did not end yet is taken for damage."""


@dataclass(frozen=True)
class Row:
    """Row of a file. Reading a field of another type raises `UserError` with file, row and field."""

    place: str
    """File, and the row counted from 0 (parquet, JSON array) or the line counted from 1 (JSONL)."""
    values: Mapping[str, Any]
    fault: Unusable | None = None
    """Reason why the row's line could not be read; it has no values then."""

    def get(self, field: str) -> Any:
        """Return the value of a field. Raises `UserError` with the nearest name if the row has no such field."""
        if self.fault:
            raise self.fault
        if field not in self.values:
            raise UserError(
                f"{self.place}: no field {field!r}{nearest(field, self.values)}: it has {', '.join(self.values)}"
            )
        return self.values[field]

    def text(self, field: str) -> str:
        """Return the string in a field."""
        value = self.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, "a string", value)
        return value

    def texts(self, field: str) -> list[str]:
        """Return the list of strings in a field."""
        value = self.get(field)
        if not isinstance(value, list):
            raise self.wrong(field, "a list of strings", value)
        for index, text in enumerate(value):
            if not isinstance(text, str):
                raise self.wrong(f"{field}[{index}]", "a string", text)
        return value

    def integer(self, field: str) -> int:
        """Return the integer in a field; true and false are no integers."""
        value = self.get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(field, "an integer", value)
        return value

    def within(self, field: str) -> Row:
        """Return the object in a field, as a row of its own at the same place."""
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.wrong(field, "an object", value)
        return Row(f"{self.place}: {field}", value)

    def wrong(self, field: str, wanted: str, found: Any) -> UserError:
        """Return the error for a field that holds `found` instead of `wanted`."""
        return UserError(f"{self.place}: {field}: must be {wanted} (found {json_kind(found)})")


def first_of(columns: tuple[str, ...], names: Collection[str]) -> str | None:
    """Return the first of `columns` that is among the names, or None."""
    return next((column for column in columns if column in names), None)


def read_lines(uri: str) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines. Raises `UserError` if it cannot be read to its end."""
    for place, line in json_lines.read_lines(uri, MEND):
        try:
            values = json_lines.parse_line(line, place)
        except Unusable as fault:
            yield Row(place, {}, fault)
        else:
            yield _row(values, place)


def _row(values: Any, place: str) -> Row:
    if isinstance(values, list):  # nanochat writes a conversation as the list of its messages
        values = {"messages": values}
    if not isinstance(values, dict):
        told = f"{place}: must be an object or a list of messages (found {json_kind(values)})"
        return Row(place, {}, Unusable(told, "no list of messages"))
    return Row(place, values)


def begins_array(uri: str) -> bool:
    """Return true for a file that holds a JSON array. Raises `UserError` if it cannot be read."""
    try:
        with fsspec.open(uri, "rt", encoding="utf-8-sig") as file:
            return bool(file.read(_CHARACTERS_AT_ONCE).lstrip().startswith("["))
    except Exception as error:
        raise UserError(f"{uri}: cannot be read ({first_line(error)}): {MEND}") from None


def read_array(uri: str) -> Iterator[Row]:
    """Yield the rows of a JSON array. Raises `UserError` where the text of the array is no JSON."""
    number = 0
    try:
        with fsspec.open(uri, "rt", encoding="utf-8-sig") as file:
            for number, values in enumerate(_elements(file), 1):
                yield _row(values, f"{uri}: row {number - 1}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: row {number}: not valid JSON ({first_line(error)}): {MEND}") from None
    except Exception as error:
        raise UserError(f"{uri}: cannot be read after {number} rows ({first_line(error)}): {MEND}") from None


def _elements(file: TextIO) -> Iterator[Any]:
    """Yield the elements of an array, with no more of the file in memory than one read and one element.

    Raises `ValueError` for text that is not valid JSON. A comma after the last element is let pass.
    """
    decode = json.JSONDecoder().raw_decode
    text = file.read(_CHARACTERS_AT_ONCE)
    at = text.index("[") + 1
    while True:
        try:
            begin = _after_blanks(text, at)
            if text[begin] == "]":
                return
            element, end = decode(text, begin)
            mark = _after_blanks(text, end)
            if text[mark] not in ",]":
                raise ValueError(f"no comma before {text[mark : mark + 20]!r}")
        except (ValueError, IndexError) as error:  # cut off where this read ends, perhaps
            left = len(text) - at
            more = file.read(max(_CHARACTERS_AT_ONCE, left)) if left < _LONGEST_ELEMENT else ""
            if not more:
                told = "the array does not end" if isinstance(error, IndexError) else getattr(error, "msg", str(error))
                raise ValueError(told) from None
            text, at = text[at:] + more, 0
        else:
            yield element
            at = mark + (text[mark] == ",")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found, "no blanks are a match too"
    return found.end()
