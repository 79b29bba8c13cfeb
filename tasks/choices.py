"""Multiple choice: the text of a question with its choices, and a task of such questions.

The text is nanochat's (tasks/common.py, `render_mc`): the letter stands behind its choice, without a space before it,
so that it is the same token as in the answer; small models bind the two better that way. Letters follow the order of
the choices, also where the data set numbers them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bwlm.errors import UserError
from bwlm.text.splits import NamedSplits
from tasks.files import DataSet
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

    def prompt(self) -> str:
        """Return the user's message: the question, a line for each choice, and the form of the answer."""
        lines = [f"- {choice}={letter}" for choice, letter in zip(self.choices, LETTERS, strict=False)]
        asked = "Respond only with the letter of the correct answer."
        return "\n".join([f"Multiple Choice question: {self.question}", *lines, "", asked])

    def conversation(self) -> RawConversation:
        """Return the conversation: the prompt, answered by the letter of the right choice."""
        return exchange(self.prompt(), LETTERS[self.answer])


def choice_question(row: Row, question: str, choices: list[str], answer: int) -> ChoiceQuestion:
    """Return the question of a row. Raises `UserError` unless it has 2 to 26 choices and its answer is one of them."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{row.place}: choices: must be 2 to {len(LETTERS)} (found {len(choices)})")
    if not 0 <= answer < len(choices):
        raise UserError(f"{row.place}: answer: must be the index of one of {len(choices)} choices (found {answer})")
    return ChoiceQuestion(question, tuple(choices), answer)


@dataclass(frozen=True)
class MultipleChoice:
    """Task of multiple choice; `parse` turns a row of `data` into a question."""

    name: str
    data: DataSet
    parse: Callable[[Row], ChoiceQuestion]

    def questions(self, split: SplitName, path: str | None = None) -> Iterator[ChoiceQuestion]:
        """Return the questions of a split, row by row; reading a row of another schema raises `UserError`."""
        return map(self.parse, self.data.rows(split, path))

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        return map(ChoiceQuestion.conversation, self.questions(split, path))

    def key(self, path: str | None = None) -> str:
        return self.data.key(path, self.name, FORMAT_VERSION)

    def splits(self, path: str | None = None) -> NamedSplits:
        return self.data.splits(path)
