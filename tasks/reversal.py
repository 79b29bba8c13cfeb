"""`builtin:reversal`: facts "A is B" of the corpus of the same name, asked in the order of training and swapped.

It is after Berglund et al. 2023 (The Reversal Curse, arXiv 2309.12288); `bwlm.text.reversal` has the facts. A is the
name that training states first. Each fact gives four items, one for each order of the statement and each name that is
asked for; their choices are the names of four facts that training states alike, in brackets here. Where the name that
is asked for stands first, it is the stem of its choice.

| group | text | forward conditional | backward conditional |
| --- | --- | --- | --- |
| trained-B | A is [B] | log p(B given A is) * | log p(A is given B) |
| trained-A | [A] is B | log p(is B given A) | log p(A given is B) * |
| swapped-A | B is [A] | log p(A given B is) * | log p(B is given A) |
| swapped-B | [B] is A | log p(is A given B) | log p(B given is A) * |

In the four cells with a star a model predicts the name that is asked for, and reads it last. A model that learns only
what its own reading predicts knows both cells of `trained` and is at chance (1 in 4) on `swapped`, so of the stars a
forward model is right on B alone and a backward model on A alone. `joint` is log p of the whole text: it is right on
both names of `trained`, whichever is predicted.

Groups begin with `once`, or with `both` for the facts that training states in both orders: there every cell must be
right, or the model has not learned to read swapped statements at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bwlm.errors import UserError
from bwlm.text.reversal import BLOCK, Fact, facts
from tasks.items import ChoiceItem, Form, row_digest
from tasks.task import refuse_path


@dataclass(frozen=True)
class Reversal:
    """Task `builtin:reversal`."""

    name: str = "builtin:reversal"
    shots: int = 0
    forms: tuple[Form, ...] = ("cloze",)

    def test_source(self, path: str | None = None) -> str:
        refuse_path(self.name, path)
        return self.name

    def choice_items(self, form: Form, shots: int, path: str | None = None) -> Sequence[ChoiceItem]:
        """Return four items of each fact. Raises `UserError` for examples: a statement is read as it was trained."""
        refuse_path(self.name, path)
        if shots:
            raise UserError(f"{self.name}: takes no solved examples (found {shots}): set the shots to 0")
        return [item for fact in facts() for item in _items(fact)]


def _items(fact: Fact) -> Iterator[ChoiceItem]:
    first = fact.number - fact.number % BLOCK
    rivals = facts()[first : first + BLOCK]
    kind = "both" if fact.in_both_orders else "once"
    every_a, every_b = [rival.a for rival in rivals], [rival.b for rival in rivals]
    yield _asks_last(fact, f"{kind}-trained-B", fact.a, every_b)
    yield _asks_first(fact, f"{kind}-trained-A", every_a, fact.b)
    yield _asks_last(fact, f"{kind}-swapped-A", fact.b, every_a)
    yield _asks_first(fact, f"{kind}-swapped-B", every_b, fact.a)


def _asks_last(fact: Fact, group: str, cue: str, names: Sequence[str]) -> ChoiceItem:
    """Return the item `cue is [name]`."""
    return _item(fact, group, [f" {cue} is"] * BLOCK, [f" {name}" for name in names])


def _asks_first(fact: Fact, group: str, names: Sequence[str], cue: str) -> ChoiceItem:
    """Return the item `[name] is cue`."""
    return _item(fact, group, [f" {name}" for name in names], [f" is {cue}"] * BLOCK)


def _item(fact: Fact, group: str, stems: Sequence[str], choices: Sequence[str]) -> ChoiceItem:
    answer = fact.number % BLOCK
    return ChoiceItem(
        id=row_digest(stems, choices, answer),
        place=f"builtin:reversal: fact {fact.number}",
        stems=tuple(stems),
        choices=tuple(choices),
        answer=answer,
        group=group,
    )
