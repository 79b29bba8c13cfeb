"""Arithmetic: every problem once, its twin on the same side, and a reward that nothing but the truth earns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from tasks.arithmetic import LARGEST, Arithmetic, parse
from tasks.task import RawConversation, SplitName, Verifiable, exchange

TASK = Arithmetic()
SPLITS: tuple[SplitName, ...] = ("train", "validation")
DIGEST = "e0e38001c9e3bdc0"
"""Other problems under the same version would mix in caches: count up `FORMAT_VERSION`, then write the digest here."""

law = settings(derandomize=True, deadline=None, max_examples=300)
operands = st.integers(0, LARGEST)
signs = st.sampled_from("+-*")


def evaluate(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def problem(left: int, sign: str, right: int) -> RawConversation:
    return exchange(f"{left}{sign}{right}=", str(evaluate(left, sign, right)))


TWELVE = problem(3, "*", 4)
MINUS_EIGHT = problem(3, "-", 11)


# ---- what is learned from ----


def test_every_problem_is_in_one_split_once_and_right() -> None:
    found = [conversation for split in SPLITS for conversation in TASK.conversations(split)]
    numbers = range(LARGEST + 1)
    expected = [problem(left, sign, right) for left in numbers for right in numbers for sign in "+-*"]
    assert len(found) == 3 * 21**2
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_about_a_tenth_is_validation_and_signs_are_mixed() -> None:
    train, validation = (list(TASK.conversations(split)) for split in SPLITS)
    assert 0.07 < len(validation) / (len(train) + len(validation)) < 0.13
    for split in (train, validation):
        assert {sign for c in split[:40] for sign in "+-*" if sign in c[0]["content"]} == set("+-*")


def test_a_sum_and_a_product_are_on_the_side_of_their_twin() -> None:
    validation = {c[0]["content"] for c in TASK.conversations("validation")}
    for question in validation:
        left, sign, right = question[:-1].partition(next(s for s in "+*-" if s in question))
        if sign != "-":
            assert f"{right}{sign}{left}=" in validation


def test_the_problems_are_those_of_this_version() -> None:
    found = {split: list(TASK.conversations(split)) for split in SPLITS}
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == DIGEST


def test_a_path_is_refused() -> None:
    for read in (TASK.key, lambda path: next(TASK.conversations("train", path))):
        with pytest.raises(UserError, match=r"^tasks\.builtin:arithmetic\.path: .* reads no file \(found x\): leave"):
            read("x")


# ---- rewards ----


def both() -> Iterator[tuple[RawConversation, SplitName]]:
    return ((conversation, split) for split in SPLITS for conversation in TASK.conversations(split))


def test_the_truth_earns_1_both_ways() -> None:
    assert isinstance(TASK, Verifiable)
    for conversation, _ in both():
        assert TASK.reward(conversation[1]["content"], conversation, "answer") == 1
        assert TASK.reward(conversation[0]["content"], conversation, "question") == 1


@law
@given(operands, signs, operands, operands, signs, operands)
def test_a_question_earns_1_exactly_if_it_evaluates_to_the_answer(
    left: int, sign: str, right: int, other: int, other_sign: str, another: int
) -> None:
    conversation = problem(left, sign, right)
    right_answer = evaluate(other, other_sign, another) == evaluate(left, sign, right)
    assert TASK.reward(f"{other}{other_sign}{another}=", conversation, "question") == right_answer


@law
@given(operands, signs, operands, st.integers(-25, 405))
def test_an_answer_earns_1_exactly_if_it_is_right(left: int, sign: str, right: int, answer: int) -> None:
    conversation = problem(left, sign, right)
    assert TASK.reward(str(answer), conversation, "answer") == (answer == evaluate(left, sign, right))


def test_by_hand() -> None:
    assert TASK.reward("12", TWELVE, "answer") == 1
    assert TASK.reward(" 12\n", TWELVE, "answer") == 1
    assert TASK.reward("13", TWELVE, "answer") == 0
    assert TASK.reward("-8", MINUS_EIGHT, "answer") == 1
    assert TASK.reward("8", MINUS_EIGHT, "answer") == 0
    for question in ("3*4=", "4*3=", "12+0=", "20-8=", " 6*2= "):
        assert TASK.reward(question, TWELVE, "question") == 1
    assert TASK.reward("0-8=", MINUS_EIGHT, "question") == 1
    assert TASK.reward("20-12=", MINUS_EIGHT, "question") == 0


@pytest.mark.parametrize(
    "written",
    [
        *("12", "12=", "=", "", "+", "3*4", "3*4=12", "=3*4", "3*4==", "What is 3*4="),
        *("-3*-4=", "+3*4=", "3*+4=", "3--9=", "20+-8=", "(3*4)=", "3*(4)=", "3*2*2=", "2+2*5=", "12*1+0=", "2**3+4="),
        *("3**1=", "24//2=", "24/2=", "12%13=", "24>>1=", "12|0=", "~-13="),
        *("6.0*2=", "6.*2=", "1e1+2=", "0x6*2=", "0b11*4=", "0o3*4=", "1_2+0=", "12+0j=", "03*4=", "3*04=", "00+12="),
        *(
            "3 * 4=",
            "3*4 =",
            "3\n*4=",
            "3*4\n=",
            "3\t*4=",
            "\u00a03*4=",
            "3*4=\u2003",
            "\x0c3*4=",
            "3\u200b*4=",
            "3*4=\x00",
        ),
        *("٣*٤=", "³*4=", "３*４=", "3×4=", "3∗4=", "3*4＝", "12−0="),
        *("21-9=", "33-21=", "100-88=", "120*0+12="),
        *("int('12')+0=", "__import__('os')=", "len('x'*12)+0=", "[12][0]+0=", "3*4=#", "3*4=\\", "3*4=\r\n3*4="),
        *("9" * 10**6 + "*1=", "3*4=" * 10**5, "(" * 10**6, "-" * 10**6 + "12=", "\ud800", "3*4=\udfff"),
    ],
)
def test_what_is_no_question_in_the_template_earns_nothing(written: str) -> None:
    assert TASK.reward(written, TWELVE, "question") == 0


@pytest.mark.parametrize(
    "written",
    [
        *(
            "",
            "012",
            "+12",
            "12.0",
            "12.",
            "1_2",
            "0xc",
            "12=",
            "=12",
            "3*4",
            "3*4=12",
            "12 12",
            "1 2",
            "12,",
            "twelve",
        ),
        *("１２", "١٢", "12\u00a0", "\u200312", "12\x00", "--12", "1e1", "12" * 10**6, "\ud800"),
    ],
)
def test_what_is_not_the_integer_alone_earns_nothing(written: str) -> None:
    assert TASK.reward(written, TWELVE, "answer") == 0


def test_minus_zero_is_no_integer() -> None:
    assert TASK.reward("-0", problem(4, "-", 4), "answer") == 0


@law
@given(st.text(), st.sampled_from(["answer", "question"]))
@example("3*4=", "question")
def test_no_text_raises_and_only_the_template_earns(written: str, writes: str) -> None:
    earned = TASK.reward(written, TWELVE, writes)  # type: ignore[arg-type]
    stripped = written.strip(" \t\r\n")
    if writes == "answer":
        assert earned == (stripped == "12")
    elif earned:
        assert parse(stripped) is not None
        assert parse(stripped).answer == 12  # type: ignore[union-attr]


@law
@given(st.text(alphabet="0123456789+-*=()_.x \n٣", max_size=9))
def test_near_misses_are_judged_as_a_reader_of_the_template_would(written: str) -> None:
    earned = TASK.reward(written, TWELVE, "question")
    texts = {
        f"{left}{sign}{right}=": evaluate(left, sign, right)
        for left in range(21)
        for right in range(21)
        for sign in "+-*"
    }
    assert earned == (texts.get(written.strip(" \t\r\n")) == 12)
