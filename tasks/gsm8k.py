"""GSM8K: word problems of grade school with worked solutions (Cobbe et al. 2021, arXiv 2110.14168).

An answer ends with `#### N`. The calculator's annotations in it, `<<48/2=24>>`, are removed from the text that a
model reads: there is no calculator here, and a model would learn to write each result twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from bwlm.text.splits import NamedSplits
from tasks.files import DataSet
from tasks.rows import Row
from tasks.task import RawConversation, SplitName, Writes, exchange, truth

FORMAT_VERSION = 1
"""Version of this task, raised whenever the same rows would give other conversations."""

FEWEST_WORDS = 5
"""Fewest different words of a question, however few its numbers are."""

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_QUANTITY = re.compile(_NUMBER)
_FINAL = re.compile(rf"####[ \t]*\$?(?>(-?{_NUMBER}))(?!\S*[0-9])")  # atomic, else it would try every shorter number
_LETTERS = re.compile(r"[^\W\d_]{2,}")

DATA = DataSet("tasks.gsm8k.path", "hf://datasets/openai/gsm8k", ("question", "answer"), subset="main")
"""Files of the task, on the hub or elsewhere."""


@dataclass(frozen=True)
class GSM8K:
    """Task `gsm8k`, with rewards for answers and for questions."""

    name: str = "gsm8k"

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        return map(conversation_of, DATA.rows(split, path))

    def key(self, path: str | None = None) -> str:
        return DATA.key(path, self.name, FORMAT_VERSION)

    def splits(self, path: str | None = None) -> NamedSplits:
        return DATA.splits(path)

    def reward(self, written: str, conversation: RawConversation, writes: Writes) -> float:
        """Return 1 for an answer if its final number is the true one, else 0; for a question `quantities_agree`."""
        true = truth(conversation, writes)
        if writes == "question":
            return quantities_agree(written, true)
        found = final_number(written)
        return float(found is not None and found == final_number(true))


def conversation_of(row: Row) -> RawConversation:
    """Return the problem of a row as a conversation, without the calculator's annotations."""
    return exchange(row.text("question"), _ANNOTATION.sub("", row.text("answer")))


def final_number(answer: str) -> Decimal | None:
    """Return the number behind the last `####`, without commas of thousands; None for none, and for `1/2` or `7e1`."""
    mark = answer.rfind("####")
    found = _FINAL.match(answer, mark) if mark >= 0 else None
    return _value(found[1]) if found else None


def quantities(text: str) -> Counter[Decimal]:
    """Return how often a text writes each number in digits: `3 $5 bills, 1,000` has 3, 5 and 1000."""
    return Counter(map(_value, _QUANTITY.findall(text)))


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def quantities_agree(written: str, true: str) -> float:
    """Return F1 of the written question's numbers against the true one's: 2 |W and T| / (|W| + |T|), as multisets.

    The score says whether a question has the right quantities. It does not say whether the true answer follows from
    them, which only solving the question would tell. It does not see numbers in words (`twice`, `three`), units, or
    what a number counts; a true question without digits earns nothing. Numbers alone are no question: the text needs
    as many different words, of two letters or more, as numbers, at least 5 of them, and a question mark unless the
    true question has none. Words without sense pass.
    """
    wanted, found = quantities(true), quantities(written)
    if not _is_question(written, found.total(), "?" in true):
        return 0.0
    common = (wanted & found).total()
    return 2 * common / (wanted.total() + found.total()) if common else 0.0


def _is_question(written: str, numbers: int, marked: bool) -> bool:
    words = {word.lower() for word in _LETTERS.findall(written)}
    return len(words) >= max(numbers, FEWEST_WORDS) and ("?" in written or not marked)
