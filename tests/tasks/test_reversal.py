"""Reversal: which item asks what in which reading, and that no prior of names can win."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from bwlm.errors import UserError
from bwlm.text.reversal import PLAIN, facts, statements
from bwlm.text.tokenizer import train_tokenizer
from tasks.items import ChoiceItem, ChoiceTask
from tasks.reversal import Reversal
from tasks.task import draw

TASK = Reversal()
ITEMS = TASK.choice_items("cloze", 0)
ORDERS = {(first, second) for fact in facts() for first, second in fact.orders}

law = settings(derandomize=True, deadline=None, max_examples=20)


def texts(item: ChoiceItem) -> list[str]:
    return [item.context + stem + choice for stem, choice in zip(item.stems, item.choices, strict=True)]


def asked(item: ChoiceItem) -> list[str]:
    """Return the names among which an item chooses."""
    last = len(set(item.choices)) > 1
    return [part.strip() for part in (item.choices if last else item.stems)]


# ---- goldens ----


def test_the_four_items_of_a_fact() -> None:
    people = ["Lemor Devas", "Medal Tehul", "Fewen Badon", "Liwar Faser"]
    titles = [f"the warden of {place}" for place in ("Fasul", "Tufel", "Semol", "Wohar")]
    of_fact = {item.group: (item.stems, item.choices, item.answer) for item in ITEMS[4:8]}
    assert of_fact == {
        "once-trained-B": ((" Medal Tehul is",) * 4, tuple(f" {title}" for title in titles), 1),
        "once-trained-A": (tuple(f" {person}" for person in people), (" is the warden of Tufel",) * 4, 1),
        "once-swapped-A": ((" the warden of Tufel is",) * 4, tuple(f" {person}" for person in people), 1),
        "once-swapped-B": (tuple(f" {title}" for title in titles), (" is Medal Tehul",) * 4, 1),
    }


def test_task_is_one_of_choice() -> None:
    assert isinstance(TASK, ChoiceTask)
    assert tasks.find_evaluated("builtin:reversal:once-swapped-A") == (TASK, "once-swapped-A")
    assert (TASK.shots, TASK.forms, TASK.test_source()) == (0, ("cloze",), "builtin:reversal")


@pytest.mark.parametrize("read", [lambda: TASK.choice_items("cloze", 0, "x"), lambda: TASK.test_source("x")])
def test_a_path_is_refused(read: object) -> None:
    with pytest.raises(UserError, match=r"^tasks\.builtin:reversal\.path: .* reads no file \(found x\): leave"):
        read()  # type: ignore[operator]


def test_solved_examples_are_refused() -> None:
    with pytest.raises(UserError, match=r"^builtin:reversal: takes no solved examples \(found 5\): set the shots"):
        TASK.choice_items("cloze", 5)


# ---- balance ----


def test_groups_have_all_facts() -> None:
    cells = [f"{order}-{name}" for order in ("trained", "swapped") for name in "AB"]
    expected = {f"once-{cell}": 256 for cell in cells} | {f"both-{cell}": 128 for cell in cells}
    assert Counter(item.group for item in ITEMS) == expected
    assert len({item.id for item in ITEMS}) == len(ITEMS)


def test_right_texts_are_stated_in_training_unless_they_are_swapped() -> None:
    train, validation = set(statements(False)), set(statements(True))
    for item in ITEMS:
        right = texts(item)[item.answer]
        assert (right in train) == (not item.group.startswith("once-swapped")), right
        assert right not in validation


def test_wrong_texts_are_never_stated() -> None:
    stated = {PLAIN.format(*order) for order in ORDERS} | {PLAIN.format(b, a) for a, b in ORDERS}
    for item in ITEMS:
        assert [text in stated for text in texts(item)] == [n == item.answer for n in range(4)]


def test_in_each_group_a_name_is_a_choice_four_times_and_right_once() -> None:
    for group in {item.group for item in ITEMS}:
        members = [item for item in ITEMS if item.group == group]
        assert set(Counter(name for item in members for name in asked(item)).values()) == {4}
        assert set(Counter(asked(item)[item.answer] for item in members).values()) == {1}
        assert set(Counter(item.answer for item in members).values()) == {len(members) // 4}


@law
@given(st.integers(0, 2**32))
def test_a_score_of_the_name_alone_is_right_one_time_in_four_exactly(seed: int) -> None:
    for group in {item.group for item in ITEMS}:
        members = [item for item in ITEMS if item.group == group]
        prior = {name: draw(f"{seed} {name}") for item in members for name in asked(item)}
        right = sum(max(asked(item), key=prior.__getitem__) == asked(item)[item.answer] for item in members)
        assert right == len(members) // 4


def test_no_token_crosses_the_border_of_stem_and_choice() -> None:
    encode = train_tokenizer(iter(statements(False)), 512).encode
    for item in ITEMS[::7]:
        for stem, choice in zip(item.stems, item.choices, strict=True):
            assert encode(stem + choice).tolist() == encode(stem).tolist() + encode(choice).tolist()


# ---- which item asks what: a model that knows only what its reading predicts ----


def parts(item: ChoiceItem, reading: str) -> list[tuple[float, float]]:
    """Return log p of the name that is read first and of the name that is predicted from it, of each choice.

    The model looks up what it was trained to predict: the second name of a stated order from the first, or the first
    from the second. All other names are equally likely to it.
    """
    known = ORDERS if reading == "forward" else {(second, first) for first, second in ORDERS}
    found = []
    for text in texts(item):
        names = text.strip().split(" is ")
        given, predicted = names if reading == "forward" else names[::-1]
        found.append((math.log(1 / 768), math.log(0.9 if (given, predicted) in known else 1e-4)))
    return found


def accuracy(group: str, reading: str, rule: str) -> float:
    """Return the share of right items; an item whose best score m choices share counts for 1/m."""
    shares = []
    for item in ITEMS:
        if item.group == group:
            scores = [second + (first if rule == "joint" else 0.0) for first, second in parts(item, reading)]
            winners = [n for n, score in enumerate(scores) if score == max(scores)]
            shares.append((item.answer in winners) / len(winners))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("rule", ["conditional", "joint"])
@pytest.mark.parametrize("reading", ["forward", "backward"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_a_lookup_model_knows_trained_statements_and_no_swapped_ones(name: str, reading: str, rule: str) -> None:
    assert accuracy(f"once-trained-{name}", reading, rule) == 1
    assert accuracy(f"once-swapped-{name}", reading, rule) == 0.25
    assert accuracy(f"both-trained-{name}", reading, rule) == 1
    assert accuracy(f"both-swapped-{name}", reading, rule) == 1
