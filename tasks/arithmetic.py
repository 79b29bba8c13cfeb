"""`builtin:arithmetic`: every sum, difference and product of two numbers from 0 to 20, verifiable both ways.

    user: 12+7=        assistant: 19
    user: 3-11=        assistant: -8

The numbers are small so that a tiny model learns them within minutes. The tokenizer cuts numbers every two digits:
operands, sums and differences are not cut here, and a product, at most 400, is cut once. The 1,323 problems are few
enough to be seen many times, and enough to hold some back.

About one problem in ten is validation. `3+4=` and `4+3=` are always in the same split, so that neither gives the
other away.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tasks.task import (
    RawConversation,
    SplitName,
    Writes,
    draw,
    exchange,
    given,
    recipe_key,
    refuse_path,
    trimmed,
    truth,
)

FORMAT_VERSION = 1
"""Version of this task, raised whenever the problems, their order, their split or their template change."""

LARGEST = 20
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HELD_OUT = 10
"""Number of problems of which about one is validation."""

_QUESTION = re.compile(r"(?P<left>0|[1-9][0-9]?)(?P<sign>[+*-])(?P<right>0|[1-9][0-9]?)=")
"""Template of a question. Text that it does not match is never evaluated, so no text of a model ever runs."""


@dataclass(frozen=True)
class Problem:
    """Problem of two operands and an operation."""

    left: int
    sign: str
    right: int

    @property
    def question(self) -> str:
        """Question as the user asks it, `12+7=`."""
        return f"{self.left}{self.sign}{self.right}="

    @property
    def answer(self) -> int:
        """Right answer."""
        return OPERATIONS[self.sign](self.left, self.right)

    @property
    def held_out(self) -> bool:
        """True for a problem of the validation split. Sums and products that swap their operands share a split."""
        commutes = self.sign != "-"
        left, right = sorted((self.left, self.right)) if commutes else (self.left, self.right)
        return draw(Problem(left, self.sign, right).question) % HELD_OUT == 0


def parse(question: str) -> Problem | None:
    """Return the problem that a question states; None unless it follows the template, and its range, to the letter."""
    found = _QUESTION.fullmatch(question)
    if not found:
        return None
    problem = Problem(int(found["left"]), found["sign"], int(found["right"]))
    return problem if max(problem.left, problem.right) <= LARGEST else None


@dataclass(frozen=True)
class Arithmetic:
    """Task `builtin:arithmetic`."""

    name: str = "builtin:arithmetic"

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        refuse_path(self.name, path)
        numbers = range(LARGEST + 1)
        problems = [Problem(*choice) for choice in itertools.product(numbers, OPERATIONS, numbers)]
        for problem in sorted(problems, key=lambda problem: draw(problem.question)):
            if problem.held_out == (split == "validation"):
                yield exchange(problem.question, str(problem.answer))

    def key(self, path: str | None = None) -> str:
        refuse_path(self.name, path)
        return recipe_key(self.name, FORMAT_VERSION, LARGEST, list(OPERATIONS), HELD_OUT)

    def reward(self, written: str, conversation: RawConversation, writes: Writes) -> float:
        """Return the reward, 1 or 0.

        An answer earns 1 if it is the right integer and nothing else; a question, if it is any problem in the
        template that has the given answer. A question need not be the conversation's own: `2*6=` earns as much as
        `12+0=`. So the reward checks truth and not variety, and does not keep a model from writing only sums with 0.
        """
        if writes == "answer":
            return float(trimmed(written) == truth(conversation, "answer"))
        problem = parse(trimmed(written))
        return float(problem is not None and str(problem.answer) == given(conversation, "question"))
