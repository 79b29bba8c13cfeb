"""The protocols of a task: conversations to learn from, and a reward that can be checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from bwlm.errors import UserError
from bwlm.text.splits import NamedSplits

RawMessage = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": str}`"""
RawConversation = list[RawMessage]

SplitName = Literal["train", "validation"]
Writes = Literal["answer", "question"]
"""A forward model writes the assistant's answer; a time-reversed one the user's question, given the answer."""

_ROLES = {"answer": "assistant", "question": "user"}
_SPACE = " \t\r\n"


class Task(Protocol):
    @property
    def name(self) -> str:
        """As users write it: `gsm8k`, `builtin:arithmetic`."""

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        """The conversations of a split, always in the same order.

        `path` names files instead of the task's own on the hub; generated tasks have none. Raises `UserError`, when the
        first is asked for, for a path that is missing, and then for rows of another schema.
        """

    def key(self, path: str | None = None) -> str:
        """Returns a short hash of all that both splits follow from: the generator, or the files."""


@runtime_checkable
class Verifiable(Task, Protocol):
    def reward(self, written: str, conversation: RawConversation, writes: Writes) -> float:
        """From 0 to 1, for any text at all.

        `written` is what a model wrote, in reading order, for the message that `writes` names; `conversation` is one of
        this task's, and holds the truth.
        """


@runtime_checkable
class FromFiles(Task, Protocol):
    def splits(self, path: str | None = None) -> NamedSplits:
        """Returns its files by split, with a line for each that is left out. `path` as in `conversations`."""


def truth(conversation: RawConversation, writes: Writes) -> str:
    """The text of the last message of the role that writes it."""
    found = [message["content"] for message in conversation if message["role"] == _ROLES[writes]]
    if not found:
        raise ValueError(f"a conversation without a message of the {_ROLES[writes]} has no {writes}")
    return found[-1]


def given(conversation: RawConversation, writes: Writes) -> str:
    """What the one who writes was given: the question for an answer, the answer for a question."""
    return truth(conversation, "question" if writes == "answer" else "answer")


def trimmed(written: str) -> str:
    """Without blanks and line breaks at its ends. Other kinds of Unicode space are text that a model chose to write."""
    return written.strip(_SPACE)


def exchange(question: str, answer: str) -> RawConversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def draw(text: str) -> int:
    """A number that looks random and is the text's alone: the first 64 bits of its SHA-256. It orders and it splits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def recipe_key(*recipe: Any) -> str:
    """A short hash of plain values: names what follows from them."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def refuse_path(name: str, path: str | None) -> None:
    """Raises `UserError` if a generated task is given a path."""
    if path is not None:
        raise UserError(f"tasks.{name}.path: {name} is generated and reads no file (found {path}): leave the path out")
