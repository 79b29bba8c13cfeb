"""Items of choice laid out in a reading: the ids that a model reads, and the two parts of them that are scored.

Forward, a row reads BOS, [marker], the examples, the stem, the choice. Backward, each of these texts is read from its
end, and the examples still come first, since they must be read before the item: BOS, [marker], the examples reversed,
the choice reversed, the stem reversed. With `answer_first` a forward row reads the choice before the stem.

    forward        BOS  Question: .. Answer: 4 \\n\\n  | Question: .. Answer: |  the sky |
    backward       BOS  4 :rewsnA .. :noitseuQ \\n\\n  |  yks eht | :rewsnA .. :noitseuQ |
    answer_first   BOS  4 \\n Question: .. Answer: \\n\\n  | the sky \\n | Question: .. Answer: |

The rules:

- Stem and choice are encoded as one text, as a tokenizer of documents does. The stem ends where the ids of the text
  leave the ids of the stem alone; a token that crosses the border belongs to the choice, and the item counts as
  `merged`. White space at the end of the stem belongs to the choice.
- An item has the same text in every reading, and in every model: room is what the widest row leaves (BOS and marker).
- What does not fit loses its examples, from the last one on; then the beginning of its context. An item whose stem and
  choice alone do not fit is not scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from bwlm.directions import is_marked
from bwlm.evaluate.tasks.rules import FORWARD
from bwlm.text.tokenizer import Tokenizer
from tasks.items import ChoiceItem, Example

Ids = tuple[int, ...]
HEAD = 2
"""Slots of a row before its text: BOS and a marker."""
SEPARATOR = "\n\n"
"""Text between examples and item."""


@dataclass(frozen=True)
class Branch:
    """Part of a row that belongs to one choice, after the trunk."""

    ids: Ids
    border: int
    """Number of ids of the part that is read first."""


@dataclass(frozen=True)
class LaidOut:
    """Row of each choice of an item: a trunk that all share, and a branch for each choice."""

    trunk: Ids
    """BOS, marker and examples."""
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Fitted:
    """Item as it fits into a row."""

    item: ChoiceItem
    """Item with the examples and the part of its context that fit."""
    dropped_shots: int
    is_cut: bool
    """True if the context lost its beginning."""
    is_merged: bool
    """True if a token crosses the border of stem and choice."""


@dataclass
class Layout:
    """Lays out items for models of one direction. Texts are encoded once."""

    tokenizer: Tokenizer
    direction: str
    width: int
    """Ids of a row, T."""
    _encoded: dict[str, Ids] = field(default_factory=dict)

    def fit(self, item: ChoiceItem) -> Fitted | None:
        """Return the item with as many examples, and as much of its context, as fit; None if its stem does not."""
        room = self.width - HEAD + 1  # the last id of a row is predicted and not read
        spaces = [self._longest(item), *(self._example_length(shot) for shot in item.shots)]
        kept = 0
        while kept < len(item.shots) and sum(spaces[: kept + 2]) <= room:
            kept += 1
        fitted, is_cut = (item, False) if spaces[0] <= room else (self._cut(item, room), True)
        if fitted is None:
            return None
        shown = ChoiceItem(**{**vars(fitted), "shots": item.shots[:kept]})
        return Fitted(shown, len(item.shots) - kept, is_cut, any(self._is_merged(item, n) for n in _each(item)))

    def lay_out(self, item: ChoiceItem, reading: str, answer_first: bool = False) -> LaidOut:
        """Return the rows of a fitted item. `answer_first` is for the forward reading."""
        assert not answer_first or reading == FORWARD, "backward, the answer is read first anyway"
        trunk = [self.tokenizer.bos]
        if is_marked(self.direction):
            trunk.append(self.tokenizer.forward if reading == FORWARD else self.tokenizer.backward)
        for shot in item.shots:
            first, second = self._parts(shot.stem, shot.answer, reading, answer_first)
            separator = self._encode(SEPARATOR)
            trunk += [*first, *second, *(separator if reading == FORWARD else separator[::-1])]
        branches = []
        for n in _each(item):
            first, second = self._parts(item.context + item.stems[n], item.choices[n], reading, answer_first)
            branches.append(Branch(first + second, len(first)))
        return LaidOut(tuple(trunk), tuple(branches))

    def stem_tokens(self, item: ChoiceItem) -> list[int]:
        """Return the number of tokens of each choice's context and stem."""
        return [self._border(item.context + item.stems[n], item.choices[n]) for n in _each(item)]

    def _parts(self, stem: str, choice: str, reading: str, answer_first: bool) -> tuple[Ids, Ids]:
        """Return the ids of the part that is read first, and of the other."""
        if answer_first:
            return self._encode(f"{choice.strip()}\n"), self._encode(stem)
        whole, border = self._encode(stem + choice), self._border(stem, choice)
        if reading == FORWARD:
            return whole[:border], whole[border:]
        return whole[border:][::-1], whole[:border][::-1]

    def _border(self, stem: str, choice: str) -> int:
        pairs = zip(self._encode(stem.rstrip()), self._encode(stem + choice), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _is_merged(self, item: ChoiceItem, n: int) -> bool:
        stem = item.context + item.stems[n]
        return self._border(stem, item.choices[n]) < len(self._encode(stem.rstrip()))

    def _longest(self, item: ChoiceItem) -> int:
        """Return the tokens of the longest choice with its stem, in the longer of the two orders."""
        return max(self._length(item.context + item.stems[n], item.choices[n]) for n in _each(item))

    def _example_length(self, shot: Example) -> int:
        return self._length(shot.stem, shot.answer) + len(self._encode(SEPARATOR))

    def _length(self, stem: str, choice: str) -> int:
        return max(sum(map(len, self._parts(stem, choice, FORWARD, first))) for first in (False, True))

    def _cut(self, item: ChoiceItem, room: int) -> ChoiceItem | None:
        """Return the item with the longest end of its context that fits; None if no end does."""
        for context in self._ends(item.context):
            shorter = ChoiceItem(**{**vars(item), "context": context})
            if self._longest(shorter) <= room:
                return shorter
        return None

    def _ends(self, context: str) -> Iterator[str]:
        """Yield the ends of a context, a word shorter each time, down to none."""
        while context:
            _, _, context = context.lstrip().partition(" ")
            yield context

    def _encode(self, text: str) -> Ids:
        if text not in self._encoded:
            self._encoded[text] = tuple(self.tokenizer.encode(text).tolist())
        return self._encoded[text]


def _each(item: ChoiceItem) -> Sequence[int]:
    return range(len(item.choices))
