"""Conversations that files already hold: a user's own, and SmolTalk.

A row has a column `messages`, a list of objects with `role` and `content`; other fields are ignored. A line of JSONL
may also be that list alone, as nanochat writes it. The order of turns is checked where conversations are rendered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bwlm.text.splits import NamedSplits
from tasks.files import DataSet, Row
from tasks.task import RawConversation, RawMessage, SplitName

FORMAT_VERSION = 1
"""Version of this task, raised whenever the same files would give other conversations."""

_COLUMN = "messages"


class FileTask:
    """Conversations of a file, a folder, a glob or a URI, parquet or JSONL (`.jsonl`, `.jsonl.gz`).

    `name` is used in errors and settings; by default it is the path itself, as a mixture names it.
    """

    def __init__(self, path: str, name: str | None = None, subset: str = "") -> None:
        self.name = name or path
        self._data = DataSet(f"tasks.{name}.path" if name else "data.mixture", path, (_COLUMN,), subset)

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        """Return the conversations of a split.

        Reading them raises `UserError` with file, row and field if messages are no list or an entry lacks a string.
        """
        return (messages for _, messages in self.placed(split, path))

    def placed(self, split: SplitName, path: str | None = None) -> Iterator[tuple[str, RawConversation]]:
        """Return the conversations of a split, each with its file and row, for errors about it."""
        return ((row.place, _messages(row)) for row in self._data.rows(split, path))

    def key(self, path: str | None = None) -> str:
        return self._data.key(path, _COLUMN, FORMAT_VERSION)

    def splits(self, path: str | None = None) -> NamedSplits:
        return self._data.splits(path)


def _messages(row: Row) -> RawConversation:
    found = row.get(_COLUMN)
    if not isinstance(found, list):
        raise row.fault(_COLUMN, "a list of messages", found)
    return [_message(row, f"{_COLUMN}[{index}]", entry) for index, entry in enumerate(found)]


def _message(row: Row, field: str, entry: Any) -> RawMessage:
    if not isinstance(entry, dict):
        raise row.fault(field, "an object with role and content", entry)
    fields = Row(f"{row.place}: {field}", entry)
    return {"role": fields.text("role"), "content": fields.text("content")}


SMOLTALK = FileTask("hf://datasets/HuggingFaceTB/smol-smoltalk", "smoltalk", subset="data")
"""SmolTalk for small models: Allal et al. 2025, SmolLM2 (arXiv 2502.02737)."""
