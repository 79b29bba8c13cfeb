"""Verifiable tasks as tasks that are evaluated: an output is right if its reward as an answer is 1.

A base model is given `Question: ..`, `Answer:`, after solved examples in the same form. A generated task has no test
split: its validation split, which nothing is trained on, is evaluated, and examples come from its training split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tasks.arithmetic import Arithmetic
from tasks.files import DataSet
from tasks.gsm8k import DATA, GSM8K, conversation_of
from tasks.items import Example, GeneratedItem, row_digest, with_unique_ids
from tasks.rows import Row
from tasks.spelling import Spelling
from tasks.task import RawConversation, Verifiable, given, refuse_path, trimmed, truth

Solved = tuple[str, RawConversation]
"""Place of a conversation, and the conversation."""


@dataclass(frozen=True)
class AnsweredTask:
    """Verifiable task whose answers are evaluated; one of `CheckedTask`."""

    task: Verifiable
    new_tokens: int
    shots: int
    data: DataSet | None = None
    """Files of the task; None for a generated task."""
    parse: Callable[[Row], RawConversation] | None = None
    """Conversation of a row of `data`."""
    stops: tuple[str, ...] = ("\n\nQuestion:",)

    @property
    def name(self) -> str:
        return self.task.name

    def test_source(self, path: str | None = None) -> str:
        if self.data is None:
            refuse_path(self.name, path)
            return self.name
        return self.data.test_source(path)

    def generated_items(self, shots: int, path: str | None = None) -> Sequence[GeneratedItem]:
        examples = [_item(*solved) for solved in islice(self._examples(path), shots + 1)] if shots else []
        return with_unique_ids(_with_shots(_item(*solved), examples, shots) for solved in self._test(path))

    def correct(self, output: str, item: GeneratedItem) -> bool:
        return self.task.reward(output, item.conversation, "answer") == 1

    def _test(self, path: str | None) -> Iterator[Solved]:
        if self.data is None:
            return self._numbered(self.task.conversations("validation", path), "validation")
        return self._parsed(self.data.test_rows(path))

    def _examples(self, path: str | None) -> Iterator[Solved]:
        if self.data is None:
            return self._numbered(self.task.conversations("train", path), "train")
        return self._parsed(self.data.example_rows(path))

    def _parsed(self, rows: Iterator[Row]) -> Iterator[Solved]:
        assert self.parse is not None, "a task of files can read their rows"
        for row in rows:
            yield row.place, self.parse(row)

    def _numbered(self, conversations: Iterator[RawConversation], split: str) -> Iterator[Solved]:
        for number, conversation in enumerate(conversations):
            yield f"{self.name}: {split}: {number}", conversation


def _item(place: str, conversation: RawConversation) -> GeneratedItem:
    question = trimmed(given(conversation, "answer"))
    digest = row_digest(question, truth(conversation, "answer"))
    return GeneratedItem(digest, place, f"Question: {question}\nAnswer:", conversation)


def _with_shots(item: GeneratedItem, examples: Sequence[GeneratedItem], count: int) -> GeneratedItem:
    """Return the item with `count` solved examples; an item is never its own example."""
    others = [solved for solved in examples if solved.id != item.id][:count]
    shots = tuple(Example(solved.prompt, f" {truth(solved.conversation, 'answer')}") for solved in others)
    return GeneratedItem(item.id, item.place, item.prompt, item.conversation, shots=shots)


ANSWERED = (
    AnsweredTask(GSM8K(), new_tokens=512, shots=5, data=DATA, parse=conversation_of),
    AnsweredTask(Arithmetic(), new_tokens=32, shots=5),
    AnsweredTask(Spelling(), new_tokens=64, shots=5),
)
"""Verifiable tasks that are evaluated."""
