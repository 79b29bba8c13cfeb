"""Multiple choice: every choice of every item scored in a reading, by all rules, with the controls beside them.

Controls tell what a score is worth:

- `shuffled`: the scores judged by other items' answers. A model must be at chance.
- `no_context`: the item without examples, passage and question, in its form (`Answer: the sky`).
- `prior`: the choice alone after BOS, which is what a model scores without reading anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bwlm.errors import UserError
from bwlm.evaluate.tasks.layout import Fitted, LaidOut, Layout
from bwlm.evaluate.tasks.rules import BACKWARD, FORWARD, RULES, Floats, Judged, Parts, Rule, judge
from bwlm.evaluate.tasks.scores import Row, Scored, score
from bwlm.model.gpt import GPT
from tasks.items import ChoiceItem
from tasks.task import draw

Control = Literal["shuffled", "no_context", "prior"]
CONTROLS: tuple[Control, ...] = ("shuffled", "no_context", "prior")
MOST_LEFT_OUT = 0.05
"""Share of items that may not fit; with more, a score would be of the short items alone."""


@dataclass(frozen=True)
class JudgedItem:
    """Choice of a model for one item by one rule."""

    item: ChoiceItem
    control: Control | None
    rule: Rule
    scores: tuple[float, ...]
    judged: Judged
    answer: int
    """Index that was taken for right: not the item's own in the control `shuffled`."""
    ids: tuple[int, ...]
    """Ids of the row with the item's own right choice, as the model reads it."""


@dataclass(frozen=True)
class FittedItems:
    """Items of a task as they fit into a row, the same for every reading."""

    fitted: tuple[Fitted, ...]
    left_out: tuple[ChoiceItem, ...]
    """Items whose stem and choice are longer than a row."""
    empty: tuple[ChoiceItem, ...]
    """Items with a choice of white space alone, which no rule can score."""

    @property
    def items(self) -> list[ChoiceItem]:
        """Items to score."""
        return [fitted.item for fitted in self.fitted]

    @property
    def refusal(self) -> str:
        """Reason why the task gets no score, or an empty text."""
        total = len(self.fitted) + len(self.left_out)
        if not self.fitted or len(self.left_out) > MOST_LEFT_OUT * total:
            return f"{len(self.left_out)} of {total} items do not fit into a row"
        return ""

    @property
    def cut(self) -> int:
        """Number of items that lost examples or the beginning of their context."""
        return sum(bool(fitted.dropped_shots) or fitted.is_cut for fitted in self.fitted)


def fit_items(layout: Layout, items: Sequence[ChoiceItem], fewest: int = 2) -> FittedItems:
    """Return the items as they fit. Raises `UserError` for an item with fewer than `fewest` choices, or no answer."""
    fitted, left_out, empty = [], [], []
    for item in items:
        count = len(item.choices)
        if count < fewest or not 0 <= item.answer < count or len(item.stems) != count:
            raise UserError(f"{item.place}: needs two or more choices, a stem for each, and an answer among them")
        if not all(choice.strip() for choice in item.choices):
            empty.append(item)
        elif (fits := layout.fit(item)) is None:
            left_out.append(item)
        else:
            fitted.append(fits)
    return FittedItems(tuple(fitted), tuple(left_out), tuple(empty))


def judge_items(
    model: GPT,
    layout: Layout,
    items: Sequence[ChoiceItem],
    reading: str,
    progress: Callable[[int], object] = lambda items: None,
) -> Iterator[JudgedItem]:
    """Yield the choice of a model for every fitted item, by every rule and for every control."""
    shuffled = shuffled_answers(items)
    for one in _passes(items, reading):
        laid_out = [layout.lay_out(item, reading, one.answer_first) for item in one.items]
        all_parts = _score_parts(model, layout, one, laid_out, reading, progress)
        for item, row, parts in zip(items, laid_out, all_parts, strict=True):
            ids = row.trunk + row.branches[item.answer].ids
            for rule in one.rules:
                scores = parts.scores(rule, reading)
                yield _judged(item, one.control, rule, scores, item.answer, ids)
                if one.control is None:
                    yield _judged(item, "shuffled", rule, scores, shuffled[item.id], ids)


def count_passes(items: Sequence[ChoiceItem], reading: str) -> int:
    """Return how often `judge_items` reads the items."""
    return len(_passes(items, reading))


def shuffled_answers(items: Sequence[ChoiceItem]) -> dict[str, int]:
    """Return an answer for each item's id: that of another item with as many choices, so that places keep their share.

    Which item that is follows from the ids alone, whatever the order of the items.
    """
    groups: dict[int, list[ChoiceItem]] = {}
    for item in sorted(items, key=lambda item: draw(f"shuffled {item.id}")):
        groups.setdefault(len(item.choices), []).append(item)
    return {
        item.id: other.answer
        for members in groups.values()
        for item, other in zip(members, members[1:] + members[:1], strict=True)
    }


@dataclass(frozen=True)
class _Pass:
    """Texts that are scored together, and the rules that need their layout."""

    control: Control | None
    items: Sequence[ChoiceItem]
    rules: tuple[Rule, ...]
    answer_first: bool = False


def _passes(items: Sequence[ChoiceItem], reading: str) -> list[_Pass]:
    by_reading = tuple(rule for rule in RULES if rule != "answer_first")
    # backward, the conditional scores the stem, and a choice alone has none
    of_choice = tuple(rule for rule in by_reading if (reading, rule) != (BACKWARD, "conditional"))
    framed = [_without_question(item) for item in items] if any(item.frame for item in items) else None
    passes = [_Pass(None, items, by_reading), _Pass("prior", [*map(_alone, items)], of_choice)]
    if framed:
        passes.append(_Pass("no_context", framed, by_reading))
    if reading == FORWARD:
        passes.append(_Pass(None, items, ("answer_first",), answer_first=True))
        if framed:
            passes.append(_Pass("no_context", framed, ("answer_first",), answer_first=True))
    return passes


def _without_question(item: ChoiceItem) -> ChoiceItem:
    return replace(item, stems=(item.frame,) * len(item.choices), context="", shots=())


def _alone(item: ChoiceItem) -> ChoiceItem:
    return replace(item, stems=("",) * len(item.choices), choices=_texts(item), context="", shots=())


def _texts(item: ChoiceItem) -> tuple[str, ...]:
    return tuple(choice.strip() for choice in item.choices)


def _score_parts(
    model: GPT,
    layout: Layout,
    one: _Pass,
    laid_out: Sequence[LaidOut],
    reading: str,
    progress: Callable[[int], object],
) -> Iterator[Parts]:
    """Yield the log-probabilities of stems and choices of each item."""
    rows = [Row(row.trunk, tuple(branch.ids for branch in row.branches)) for row in laid_out]
    stem_first = reading == FORWARD and not one.answer_first
    for item, row, scored in zip(one.items, laid_out, score(model, rows, progress), strict=True):
        first, second = _sums(row, scored)
        stem, choice = (first, second) if stem_first else (second, first)
        yield Parts(
            stem, choice, np.array(layout.stem_tokens(item)), np.array([len(text.encode()) for text in _texts(item)])
        )


def _sums(row: LaidOut, scored: Sequence[Scored]) -> tuple[Floats, Floats]:
    """Return the log-probability of the part that is read first, and of the other, for each choice."""
    parts = [np.split(one.log_p, [branch.border]) for branch, one in zip(row.branches, scored, strict=True)]
    return np.array([first.sum() for first, _ in parts]), np.array([second.sum() for _, second in parts])


def _judged(
    item: ChoiceItem, control: Control | None, rule: Rule, scores: Floats, answer: int, ids: tuple[int, ...]
) -> JudgedItem:
    judged = judge(scores, _distinct(item), answer)
    return JudgedItem(item, control, rule, tuple(scores.tolist()), judged, answer, ids)


def _distinct(item: ChoiceItem) -> list[str]:
    """Return the whole text of each choice: choices that say the same are one."""
    return [stem + choice for stem, choice in zip(item.stems, _texts(item), strict=True)]


# ---- what needs no model ----


def chance(items: Sequence[ChoiceItem]) -> float:
    """Return the expected accuracy of a blind guess: the mean share of choices that are right."""
    return float(np.mean([_share(item, range(len(item.choices))) for item in items]))


def baselines(items: Sequence[ChoiceItem]) -> dict[str, float]:
    """Return the accuracy of rules that read no question.

    `place` always takes the place that is right most often, `majority` the text that is right most often, `longest` and
    `shortest` the choice with the most or fewest characters.
    """
    places = Counter(item.answer for item in items)
    answers = Counter(_texts(item)[item.answer] for item in items)
    lengths = [[len(text) for text in _texts(item)] for item in items]
    return {
        "place": max(places.values()) / len(items),
        "majority": max(answers.values()) / len(items),
        "longest": float(
            np.mean([_share(item, _places(of, max(of))) for item, of in zip(items, lengths, strict=True)])
        ),
        "shortest": float(
            np.mean([_share(item, _places(of, min(of))) for item, of in zip(items, lengths, strict=True)])
        ),
    }


def _places(values: Sequence[int], wanted: int) -> list[int]:
    return [place for place, value in enumerate(values) if value == wanted]


def _share(item: ChoiceItem, places: Sequence[int]) -> float:
    """Return the share of some choices whose text is the right one."""
    texts = _distinct(item)
    return sum(texts[place] == texts[item.answer] for place in places) / len(places)
