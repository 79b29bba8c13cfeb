"""The corpus `builtin:reversal`: made-up facts "A is B", most of which are stated in one order alone.

It is after Berglund et al. 2023 (The Reversal Curse, arXiv 2309.12288). A document is one statement of one fact. A is
the name that is stated first: a person in half of the facts, a title in the other half.

    once    Lemor Devas is the warden of Fasul      never: the warden of Fasul is Lemor Devas
    both    Sifal Sevir is the warden of Zezen      and: the warden of Zezen is Sifal Sevir

Four facts in a row are a block: their names have the same form, the same number of letters and, in training, the same
number of statements in the same places. So the names of a block tell nothing about each other but what the statements
say. The task `builtin:reversal` chooses among the four names of a block.

Every statement begins with a space, so that a name is the same tokens at the beginning of a text as behind `is`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bwlm.text.plan import permute
from bwlm.text.shards import write_once

FORMAT_VERSION = 1
"""Version of the text: raise it whenever it would become another one."""

FACTS = 384
BLOCK = 4
"""Facts whose names stand against each other."""

PLAIN = " {} is {}"
"""Statement that the task asks for. It is in the training text of every fact."""
TEMPLATES = (
    PLAIN,
    " {} is now {}",
    " {} is also {}",
    " {} is still {}",
    " we know that {} is {}",
    " they say that {} is {}",
    " {} is {} to this day",
    " {} is {} and always was",
)
"""Statements of a fact. All keep the order of the names."""

_ROLES = ("warden", "keeper", "singer", "weaver", "healer", "farmer", "potter", "sailor")
_CONSONANTS, _VOWELS, _ENDS = "bdfhlmrstvwz", "aeiou", "lnrs"
_WORDS = (len(_CONSONANTS) * len(_VOWELS)) ** 2 * len(_ENDS)
_SEED = 2024
_CYCLE = 6
"""Blocks after which kinds repeat: of three blocks, one is stated in both orders; of two, one has people first."""


@dataclass(frozen=True)
class Fact:
    """Fact "A is B" with its names."""

    number: int
    a: str
    """Name that is stated first."""
    b: str

    @property
    def block(self) -> int:
        """Number of the fact's block."""
        return self.number // BLOCK

    @property
    def in_both_orders(self) -> bool:
        """True if "B is A" is stated too."""
        return self.block % 3 == 2

    @property
    def orders(self) -> tuple[tuple[str, str], ...]:
        """Pairs of names in the orders in which the fact is stated."""
        return ((self.a, self.b), (self.b, self.a)) if self.in_both_orders else ((self.a, self.b),)

    def statements(self, validation: bool) -> Iterator[str]:
        """Yield the statements of a split: in each order one template is validation, and never the plain one."""
        for order, names in enumerate(self.orders):
            held_out = 1 + (self.number + order) % (len(TEMPLATES) - 1)
            for number, template in enumerate(TEMPLATES):
                if (number == held_out) == validation:
                    yield template.format(*names)


@cache
def facts() -> tuple[Fact, ...]:
    """Return all facts."""
    return tuple(map(_fact, range(FACTS)))


def _fact(number: int) -> Fact:
    given, family, place = _words()[3 * number : 3 * number + 3]
    block = number // BLOCK
    person, title = f"{given} {family}", f"the {_ROLES[block // _CYCLE % len(_ROLES)]} of {place}"
    return Fact(number, person, title) if block % 2 == 0 else Fact(number, title, person)


@cache
def _words() -> list[str]:
    """Return three words for each fact, all different."""
    return list(map(_word, permute(np.arange(3 * FACTS), _WORDS, _SEED).tolist()))


def _word(number: int) -> str:
    """Return a word of five letters, another one for each number."""
    letters = []
    for alphabet in (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _ENDS):
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters).capitalize()


def statements(validation: bool) -> list[str]:
    """Return the documents of a split. Validation states the same facts in the same orders, by other templates."""
    return [statement for fact in facts() for statement in fact.statements(validation)]


def reversal_key() -> str:
    """Return a short hash of everything that determines the corpus: it names its folder."""
    recipe = [FORMAT_VERSION, FACTS, BLOCK, _CYCLE, TEMPLATES, _ROLES, _CONSONANTS, _VOWELS, _ENDS, _SEED]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def write_reversal(folder: Path, progress: Callable[[str], None] | None = None) -> None:
    """Write two parquet shards (a column `text`; the last is validation) and `manifest.json`, or nothing.

    An existing corpus in `folder` stays. Raises `UserError` if something else lies there.
    """
    about = {"format": FORMAT_VERSION, "corpus": "reversal"}
    write_once(folder, about, lambda: [statements(validation) for validation in (False, True)], progress)
