"""Items of tasks that can be evaluated, and the protocols of these tasks.

A task is one of four kinds, by the protocol that it has: it asks to choose among texts (`ChoiceTask`), to predict one
text word for word (`ContinuationTask`), or to generate an output that the task checks (`CheckedTask`) or runs
(`ExecutedTask`). What the items mean in a direction is decided in `bwlm/evaluate/tasks/`.

`path` names local files or an address instead of the hub's files; generated tasks have none. Every method that reads
raises `UserError` with file, row, field and fix.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from tasks.task import RawConversation

Form = Literal["cloze", "lettered", "generated"]
"""Form of an item's text: choices as answers, choices listed with letters that answer, or a text to generate."""


class Example(NamedTuple):
    """Solved question that stands before an item (a shot)."""

    stem: str
    answer: str


@dataclass(frozen=True)
class ChoiceItem:
    """Question with choices, as texts to score. The text of choice i is `context + stems[i] + choices[i]`."""

    id: str
    """Digest of the row, the same wherever the row stands."""
    place: str
    """File and row, for errors and for `--show`."""
    stems: tuple[str, ...]
    """Text before each choice: the question. The same for all choices, except in schemas (Winograd)."""
    choices: tuple[str, ...]
    """Each choice with the delimiter before it, such as ` the sky`."""
    answer: int
    """Index of the right choice."""
    frame: str = ""
    """Text that is left of a stem without its question, such as `Answer:`; the control `no_context` scores it."""
    context: str = ""
    """Passage before the stem. Its beginning is cut off where the item does not fit."""
    group: str = ""
    """Part of the task that is told apart in results, such as a subject."""
    shots: tuple[Example, ...] = ()
    conversation: RawConversation | None = None
    """Form in which the task is learned, if it can be: it tells whether a model was trained on the item."""


@dataclass(frozen=True)
class ContinuationItem:
    """Context and its one right continuation, which is right if each of its tokens is the likeliest one."""

    id: str
    place: str
    context: str
    """Text before the continuation. Its beginning is cut off where the item does not fit."""
    continuation: str
    """Continuation with the delimiter before it."""
    group: str = ""
    shots: tuple[Example, ...] = ()


@dataclass(frozen=True)
class GeneratedItem:
    """Prompt for an output, in the two forms that models of different phases know."""

    id: str
    place: str
    prompt: str
    """Text that a base model continues."""
    conversation: RawConversation
    """Question and reference answer, for a model that was trained on conversations."""
    group: str = ""
    shots: tuple[Example, ...] = ()
    reference: Any = None
    """Anything else that the check of the task needs."""


@runtime_checkable
class EvaluatedTask(Protocol):
    """Task with a test split."""

    @property
    def name(self) -> str:
        """Name as users write it."""

    @property
    def shots(self) -> int:
        """Number of solved examples before each item, unless the user gives another."""

    def test_source(self, path: str | None = None) -> str:
        """Return the address of the items: a file, a folder, or the name of a generated task."""


@runtime_checkable
class ChoiceTask(EvaluatedTask, Protocol):
    """Task of questions with choices."""

    @property
    def forms(self) -> tuple[Form, ...]:
        """Forms in which the items can be written."""

    def choice_items(self, form: Form, shots: int, path: str | None = None) -> Sequence[ChoiceItem]:
        """Return the items of the test split in a form, each with `shots` examples or as many as there are."""


@runtime_checkable
class ContinuationTask(EvaluatedTask, Protocol):
    """Task of texts to predict word for word."""

    def continuation_items(self, shots: int, path: str | None = None) -> Sequence[ContinuationItem]:
        """Return the items of the test split, each with `shots` examples or as many as there are."""


@runtime_checkable
class GeneratedTask(EvaluatedTask, Protocol):
    """Task whose items ask for an output; one of `CheckedTask` and `ExecutedTask`."""

    @property
    def new_tokens(self) -> int:
        """Most tokens of an output."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the output of a base model ends, which does not end by itself."""

    def generated_items(self, shots: int, path: str | None = None) -> Sequence[GeneratedItem]:
        """Return the items of the test split, each with `shots` examples or as many as there are."""


@runtime_checkable
class CheckedTask(GeneratedTask, Protocol):
    """Task that checks an output by itself."""

    def correct(self, output: str, item: GeneratedItem) -> bool:
        """Return whether an output, in reading order, is right. Any text may come."""


@runtime_checkable
class ExecutedTask(GeneratedTask, Protocol):
    """Task whose outputs are programs: an output is right if its program ends without an error."""

    def program(self, output: str, item: GeneratedItem) -> str:
        """Return the program that tests an output, in reading order. Any text may come."""


@runtime_checkable
class CentredTask(EvaluatedTask, Protocol):
    """Task of a suite."""

    def centred(self, accuracy: float) -> float:
        """Return an accuracy as a share of the way from the task's baseline, which counts as 0, to 1."""


@runtime_checkable
class Suite(Protocol):
    """Tasks that are evaluated together; the score of a suite is the mean of their centred accuracies."""

    @property
    def name(self) -> str:
        """Name as users write it."""

    def tasks(self, path: str | None = None) -> Sequence[CentredTask]:
        """Return the tasks of the suite, whose names begin with the suite's: `core:boolq`."""


AnyItem = ChoiceItem | ContinuationItem | GeneratedItem
Item = TypeVar("Item", bound=AnyItem)


def row_digest(*parts: Any) -> str:
    """Return the digest of an item's content, 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rows_digest(items: Iterable[Item]) -> str:
    """Return the digest of items in their order, so that results of different rows are never compared."""
    return row_digest(*(item.id for item in items))


def with_unique_ids(items: Iterable[Item]) -> list[Item]:
    """Return the items with ids that differ: the second of two equal rows gets `-2` behind its digest, and so on."""
    seen: Counter[str] = Counter()
    unique = []
    for item in items:
        seen[item.id] += 1
        count = seen[item.id]
        unique.append(item if count == 1 else replace(item, id=f"{item.id}-{count}"))
    return unique


def with_shots(items: Sequence[ChoiceItem], pool: Sequence[ChoiceItem], count: int) -> list[ChoiceItem]:
    """Return the items, each with the first `count` items of its group in `pool` as solved examples.

    Items of one group share their examples, which are then read once. An item is never its own example.
    """
    of_group: dict[str, list[ChoiceItem]] = {}
    for solved in pool:
        of_group.setdefault(solved.group, []).append(solved)
    shown = []
    for item in items:
        others = [solved for solved in of_group.get(item.group, [])[: count + 1] if solved.id != item.id][:count]
        shown.append(replace(item, shots=tuple(map(solved_example, others))))
    return shown


def solved_example(item: ChoiceItem) -> Example:
    """Return the item with its right answer."""
    return Example(item.context + item.stems[item.answer], item.choices[item.answer])
