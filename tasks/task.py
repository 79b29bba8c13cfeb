"""Protocols of a task: conversations to learn from, and a reward that can be checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from bwlm.errors import UserError
from bwlm.text.splits import NamedSplits

RawMessage = dict[str, str]
"""Message: `{"role": "system" | "user" | "assistant", "content": str}`."""
RawConversation = list[RawMessage]

SplitName = Literal["train", "validation"]
Writes = Literal["answer", "question"]
"""Part that a model writes.

A forward model writes the assistant's answer; a time-reversed model writes the user's question, given the answer.
"""

_ROLES = {"answer": "assistant", "question": "user"}
_SPACE = " \t\r\n"


class Task(Protocol):
    """Data set as conversations."""

    @property
    def name(self) -> str:
        """Name as users write it: `gsm8k`, `builtin:arithmetic`."""

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        """Return the conversations of a split, always in the same order.

        `path` names files instead of the task's own on the hub; generated tasks have none. Raises `UserError` for a
        missing path when the first conversation is asked for, and later for rows of another schema.
        """

    def key(self, path: str | None = None) -> str:
        """Return a short hash of everything that both splits follow from: the generator, or the files."""


@runtime_checkable
class Verifiable(Task, Protocol):
    """Task whose conversations come with a reward that a program can check."""

    def reward(self, written: str, conversation: RawConversation, writes: Writes) -> float:
        """Return the reward of a written text, from 0 to 1, for any text at all.

        `written` is what a model wrote, in reading order, for the message that `writes` names; `conversation` is one
        of this task's, and holds the truth.
        """


@runtime_checkable
class FromFiles(Task, Protocol):
    """Task whose conversations come from files."""

    def splits(self, path: str | None = None) -> NamedSplits:
        """Return the task's files by split, and a line for each file that is left out; `path` as in `conversations`."""


def truth(conversation: RawConversation, writes: Writes) -> str:
    """Return the text of the last message of the role that writes it. Raises `ValueError` if there is none."""
    found = [message["content"] for message in conversation if message["role"] == _ROLES[writes]]
    if not found:
        raise ValueError(f"a conversation without a message of the {_ROLES[writes]} has no {writes}")
    return found[-1]


def given(conversation: RawConversation, writes: Writes) -> str:
    """Return the text that the writer was given: the question for an answer, the answer for a question."""
    return truth(conversation, "question" if writes == "answer" else "answer")


def trimmed(written: str) -> str:
    """Return a text without blanks and line breaks at its ends. Other Unicode spaces are part of the text."""
    return written.strip(_SPACE)


def exchange(question: str, answer: str) -> RawConversation:
    """Return a conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def draw(text: str) -> int:
    """Return the first 64 bits of a text's SHA-256, a number that looks random. It orders items, and splits them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def recipe_key(*recipe: Any) -> str:
    """Return a short hash of plain values, which names everything that follows from them."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def refuse_path(name: str, path: str | None) -> None:
    """Raise `UserError` if a generated task is given a path."""
    if path is not None:
        raise UserError(f"tasks.{name}.path: {name} is generated and reads no file (found {path}): leave the path out")
