"""Spelling: words of every Python, each in one split, and a reward for the very text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from tasks.spelling import Spelling
from tasks.task import Verifiable, exchange

TASK = Spelling()
TRAIN = list(TASK.conversations("train"))
VALIDATION = list(TASK.conversations("validation"))
VALUE = exchange('Spell "value".', "v a l u e")

law = settings(derandomize=True, deadline=None, max_examples=200)


def test_a_conversation_by_hand() -> None:
    assert VALUE in TRAIN + VALIDATION


def test_words_are_words_in_one_split_once() -> None:
    asked = [conversation[0]["content"] for conversation in TRAIN + VALIDATION]
    assert len(set(asked)) == len(asked) > 1000
    assert 0.07 < len(VALIDATION) / len(asked) < 0.13
    for question, answer in TRAIN + VALIDATION:
        word = question["content"].removeprefix('Spell "').removesuffix('".')
        assert word.isascii()
        assert word.islower()
        assert word.isalpha()
        assert 3 <= len(word) <= 10
        assert answer["content"].split(" ") == list(word)
    assert {"the", "function", "statement"} <= {question.split('"')[1] for question in asked}


def test_every_process_gives_the_same() -> None:
    command = "from tasks.spelling import Spelling; print(list(Spelling().conversations('train')))"
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    child = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str(TRAIN)


def test_the_key_follows_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    key = TASK.key()
    assert TASK.key() == key
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert TASK.key() != key


def test_a_path_is_refused() -> None:
    for read in (TASK.key, lambda path: next(TASK.conversations("train", path))):
        with pytest.raises(UserError, match=r"^tasks\.builtin:spelling\.path: "):
            read("words.txt")


def test_the_truth_earns_1_both_ways_and_that_of_another_word_nothing() -> None:
    assert isinstance(TASK, Verifiable)
    for conversation, other in zip(TRAIN, TRAIN[1:] + TRAIN[:1], strict=True):
        for writes, index in (("question", 0), ("answer", 1)):
            assert TASK.reward(conversation[index]["content"], conversation, writes) == 1  # type: ignore[arg-type]
            assert TASK.reward(other[index]["content"], conversation, writes) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "answer", "question"),
    [
        ("v a l u e", 1, 0),
        ("\nv a l u e ", 1, 0),
        ('Spell "value".', 0, 1),
        (' Spell "value".\n', 0, 1),
        ("value", 0, 0),
        ("v a l u", 0, 0),
        ("v a l u e e", 0, 0),
        ("v  a l u e", 0, 0),
        ("V a l u e", 0, 0),
        ("v-a-l-u-e", 0, 0),
        ("v a l u е", 0, 0),
        ('Spell "value"', 0, 0),
        ("Spell 'value'.", 0, 0),
        ('Spell "valve".', 0, 0),
        ('Spell "value". Spell "value".', 0, 0),
        ("\u00a0v a l u e", 0, 0),
    ],
)
def test_rewards_by_hand(written: str, answer: int, question: int) -> None:
    assert TASK.reward(written, VALUE, "answer") == answer
    assert TASK.reward(written, VALUE, "question") == question


@law
@given(st.text())
def test_no_text_raises_or_earns_by_chance(written: str) -> None:
    assert TASK.reward(written, VALUE, "answer") == 0
    assert TASK.reward(written, VALUE, "question") == 0
