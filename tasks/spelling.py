"""`builtin:spelling`: common words of CPython's reference, letter by letter, verifiable both ways.

    user: Spell "value".        assistant: v a l u e

A model that reads tokens must have learned which letters are in each. The words are all words of 3 to 10 small
letters that occur at least twice in the sentences of `pydoc_data.topics`, which every Python brings. About one word
in ten is validation.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tasks.task import RawConversation, SplitName, Writes, draw, exchange, recipe_key, refuse_path, trimmed, truth

FORMAT_VERSION = 1
"""Version of this task, raised whenever the same Python would give other conversations."""

HELD_OUT = 10
"""Number of words of which about one is validation."""

_WORD = re.compile(r"(?<!\S)[a-z]{3,10}(?=[,.;:]?(?!\S))")
_OFTEN = 2


@cache
def words() -> tuple[str, ...]:
    """Return the words, in the order of a hash of each."""
    from pydoc_data.topics import topics

    found = Counter(word for text in topics.values() for word in _WORD.findall(text))
    return tuple(sorted((word for word, count in found.items() if count >= _OFTEN), key=draw))


@dataclass(frozen=True)
class Spelling:
    """Task `builtin:spelling`."""

    name: str = "builtin:spelling"

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        refuse_path(self.name, path)
        for word in words():
            if (draw(word) % HELD_OUT == 0) == (split == "validation"):
                yield exchange(f'Spell "{word}".', " ".join(word))

    def key(self, path: str | None = None) -> str:
        refuse_path(self.name, path)
        return recipe_key(self.name, FORMAT_VERSION, platform.python_version())

    def reward(self, written: str, conversation: RawConversation, writes: Writes) -> float:
        """Return 1 for the conversation's own text, to the letter, else 0: word and spelling determine each other."""
        return float(trimmed(written) == truth(conversation, writes))
