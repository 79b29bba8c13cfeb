"""Multiple choice: the text of a question with its choices, and a task of such questions.

The text is nanochat's (tasks/common.py, `render_mc`): the letter stands behind its choice, without a space before it,
so that it is the same token as in the answer; small models bind the two better that way. Letters follow the order of
the choices, also where the data set numbers them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bwlm.errors import UserError
from bwlm.text.splits import NamedSplits
from tasks.files import DataSet
from tasks.items import ChoiceItem, Form, row_digest, with_shots, with_unique_ids
from tasks.rows import Row
from tasks.task import RawConversation, SplitName, exchange

FORMAT_VERSION = 1
"""Version of the text, raised whenever the same rows would give other conversations."""

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class ChoiceQuestion:
    """Question with its choices."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    place: str = ""
    subject: str = ""

    def prompt(self) -> str:
        """Return the user's message: the question, a line for each choice, and the form of the answer."""
        lines = [f"- {choice}={letter}" for choice, letter in zip(self.choices, LETTERS, strict=False)]
        asked = "Respond only with the letter of the correct answer."
        return "\n".join([f"Multiple Choice question: {self.question}", *lines, "", asked])

    def conversation(self) -> RawConversation:
        """Return the conversation: the prompt, answered by the letter of the right choice."""
        return exchange(self.prompt(), LETTERS[self.answer])

    def item(self, form: Form) -> ChoiceItem:
        """Return the question as texts to score, without white space around question and choices.

        Question: What is blue?        Question: What is blue?
        Answer: the sky                A. grass
                                       B. the sky
                                       Answer: B
        """
        asked, texts = f"Question: {self.question.strip()}\n", [choice.strip() for choice in self.choices]
        frame, answers = "Answer:", texts
        if form == "lettered":
            answers = list(LETTERS[: len(texts)])
            lines = (f"{letter}. {text}\n" for letter, text in zip(answers, texts, strict=True))
            frame = "".join(lines) + frame
        return ChoiceItem(
            id=row_digest(self.question, self.choices, self.answer),
            place=self.place,
            stems=(asked + frame,) * len(texts),
            choices=tuple(f" {answer}" for answer in answers),
            answer=self.answer,
            frame=frame,
            group=self.subject,
            conversation=self.conversation(),
        )


def choice_question(row: Row, question: str, choices: list[str], answer: int, subject: str = "") -> ChoiceQuestion:
    """Return the question of a row. Raises `UserError` unless it has 2 to 26 choices and its answer is one of them."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{row.place}: choices: must be 2 to {len(LETTERS)} (found {len(choices)})")
    if not 0 <= answer < len(choices):
        raise UserError(f"{row.place}: answer: must be the index of one of {len(choices)} choices (found {answer})")
    return ChoiceQuestion(question, tuple(choices), answer, row.place, subject)


@dataclass(frozen=True)
class MultipleChoice:
    """Task of multiple choice; `parse` turns a row of `data` into a question."""

    name: str
    data: DataSet
    parse: Callable[[Row], ChoiceQuestion]
    test_columns: tuple[str, ...] = ()
    """Columns that evaluation reads besides those of training."""
    shots: int = 0
    forms: tuple[Form, ...] = ("cloze", "lettered")

    def questions(self, split: SplitName, path: str | None = None) -> Iterator[ChoiceQuestion]:
        """Return the questions of a split, row by row; reading a row of another schema raises `UserError`."""
        return map(self.parse, self.data.rows(split, path))

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        return map(ChoiceQuestion.conversation, self.questions(split, path))

    def key(self, path: str | None = None) -> str:
        return self.data.key(path, self.name, FORMAT_VERSION)

    def splits(self, path: str | None = None) -> NamedSplits:
        return self.data.splits(path)

    def test_source(self, path: str | None = None) -> str:
        return self._test_data.test_source(path)

    def choice_items(self, form: Form, shots: int, path: str | None = None) -> Sequence[ChoiceItem]:
        def items(rows: Iterator[Row]) -> list[ChoiceItem]:
            return with_unique_ids(self.parse(row).item(form) for row in rows)

        test = items(self._test_data.test_rows(path))
        return with_shots(test, items(self._test_data.example_rows(path)), shots) if shots else test

    @property
    def _test_data(self) -> DataSet:
        return replace(self.data, columns=(*self.data.columns, *self.test_columns))
