"""Conversations that files already hold: a user's own, and SmolTalk.

A row has a column `messages` (or `conversations`, `conversation`): a list of objects with `role` and `content`, or
with `from` and `value` as ShareGPT writes them, or the JSON text of such a list. A line of JSONL may also be that list
alone, as nanochat writes it. Other fields are ignored. `bwlm.text.conversation` checks the order of turns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from bwlm.errors import Unusable, first_line, nearest
from bwlm.format import json_kind
from bwlm.text.splits import NamedSplits
from tasks.files import DataSet
from tasks.rows import Row, first_of
from tasks.task import RawConversation, RawMessage, SplitName

FORMAT_VERSION = 1
"""Version of this task, raised whenever the same files would give other conversations."""

_COLUMNS = ("messages", "conversations", "conversation")
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""Names that others give to the three roles: OpenAI's, ShareGPT's and OpenAssistant's."""
_TOOLS = frozenset(
    f"{what}{sign}{part}" if part else what
    for what in ("tool", "function")
    for part in ("", "call", "response")
    for sign in "_-"
) | {"observation", "ipython"}
_CALLS = ("tool_calls", "function_call")


class FileTask:
    """Conversations of a file, a folder, a glob or a URI: parquet, JSONL (plain, `.gz` or `.zst`) or JSON.

    `name` is used in errors and settings; by default it is the path itself, as a mixture names it.
    """

    def __init__(self, path: str, name: str | None = None, subset: str = "") -> None:
        self.name = name or path
        self._data = DataSet(f"tasks.{name}.path" if name else "data.mixture", path, _COLUMNS, subset, any_of=True)

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        """Return the conversations of a split. Reading a row that holds none raises `Unusable` (`parse_messages`)."""
        return map(parse_messages, self.rows(split, path))

    def rows(self, split: SplitName, path: str | None = None) -> Iterator[Row]:
        """Return the rows of a split, for `parse_messages`."""
        return self._data.rows(split, path)

    def all_rows(self, path: str | None = None) -> Iterator[Row]:
        """Return the rows of both splits, file by file."""
        return self._data.all_rows(path)

    def key(self, path: str | None = None) -> str:
        return self._data.key(path, _COLUMNS[0], FORMAT_VERSION)

    def splits(self, path: str | None = None) -> NamedSplits:
        return self._data.splits(path)


def column_of(names: Collection[str]) -> str:
    """Return the column that holds the messages of a row with these fields."""
    return first_of(_COLUMNS, names) or _COLUMNS[0]


def parse_messages(row: Row) -> RawConversation:
    """Return the messages of a row. Raises `Unusable` with file, row and field for what is no message of text."""
    column = column_of(row.values)
    return [_message(entry, f"{row.place}: {column}[{index}]") for index, entry in enumerate(_entries(row, column))]


def _entries(row: Row, column: str) -> list[Any]:
    if row.fault:
        raise row.fault
    if column not in row.values:
        told = f"no field {' or '.join(map(repr, _COLUMNS))}{nearest(column, row.values)}: it has"
        raise Unusable(f"{row.place}: {told} {', '.join(row.values)}", "no list of messages")
    found = row.values[column]
    if isinstance(found, str):
        found = _decoded(found, f"{row.place}: {column}")
    if not isinstance(found, list):
        told = f"must be a list of messages (found {json_kind(found)})"
        raise Unusable(f"{row.place}: {column}: {told}", "no list of messages")
    return found


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        told = f"{where}: a text that is not the JSON of a list of messages ({first_line(error)})"
        raise Unusable(told, "no list of messages") from None


def _message(entry: Any, where: str) -> RawMessage:
    if not isinstance(entry, dict):
        told = f"{where}: must be an object with role and content (found {json_kind(entry)})"
        raise Unusable(told, "message without a role")
    role_key, text_key = next((keys for keys in _KEYS if entry.get(keys[0]) is not None), _KEYS[0])
    role = entry.get(role_key)
    if not isinstance(role, str):
        raise Unusable(f"{where}: {_missing(role_key, entry)}", "message without a role")
    if role in _TOOLS or any(entry.get(name) for name in _CALLS):
        raise Unusable(f"{where}: calls or answers a tool: bwlm has no tools", "tool turn")
    role = _ROLES.get(role, role)
    if role == "system" and entry.get(text_key) is None:
        return {"role": role, "content": ""}  # counts as none
    return {"role": role, "content": _text(entry, text_key, where)}


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    content = entry.get(key)
    if isinstance(content, list):
        return "".join(_part(part, f"{where}: {key}[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise Unusable(f"{where}: {_missing(key, entry)}", "message without text")
    return content


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        found = f"{kind!r:.40}" if kind else json_kind(part)
        raise Unusable(f"{where}: must be a part of type 'text' with a text (found {found})", "part that is no text")
    return str(part["text"])


def _missing(key: str, entry: dict[str, Any]) -> str:
    if key in entry:
        return f"{key}: must be a string (found {json_kind(entry[key])})"
    return f"no field {key!r}{nearest(key, entry)}: it has {', '.join(entry)}"


SMOLTALK = FileTask("hf://datasets/HuggingFaceTB/smol-smoltalk", "smoltalk", subset="data")
"""SmolTalk for small models: Allal et al. 2025, SmolLM2 (arXiv 2502.02737)."""
