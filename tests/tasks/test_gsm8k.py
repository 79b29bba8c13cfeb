"""GSM8K: real problems without the calculator's marks, the final number, and how far quantities agree."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gsm8k import GSM8K, final_number, quantities, quantities_agree
from tasks.task import RawConversation, Verifiable, exchange
from tests.tasks.data import real

TASK = GSM8K()
CLIPS = exchange(
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72",
)
BILLS = "Oliver has 10 $20 and 3 $5 bills. William has 15 $10 and 4 $5 bills. How much more money does Oliver have?"

law = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def train() -> list[RawConversation]:
    return list(TASK.conversations("train", real("gsm8k/main")))


@pytest.fixture(scope="module")
def validation() -> list[RawConversation]:
    return list(TASK.conversations("validation", real("gsm8k/main")))


# ---- real problems ----


def test_the_training_file_gives_both_splits(train: list[RawConversation], validation: list[RawConversation]) -> None:
    """Its 7,473 problems; the 1,319 of the test file are left for evaluation."""
    assert len(train) + len(validation) == 7473
    assert len(validation) == pytest.approx(7473 / 20, rel=0.15)
    assert train[0] == CLIPS
    [told] = TASK.splits(real("gsm8k/main")).notes
    assert re.fullmatch(r".*/test\.parquet: left for evaluation, neither trained nor validated on", told)


def test_a_copy_of_the_hubs_folder_is_found_by_its_root(train: list[RawConversation]) -> None:
    assert next(TASK.conversations("train", real("gsm8k"))) == train[0]
    assert TASK.key(real("gsm8k")) == TASK.key(real("gsm8k/main"))


def test_no_annotation_is_left_and_nothing_else_is_gone(train: list[RawConversation]) -> None:
    for _, answer in train:
        assert "<<" not in answer["content"]
        assert ">>" not in answer["content"]
        assert re.search(r"\n#### -?[0-9,]+$", answer["content"])


def test_every_true_answer_earns_1_and_a_wrong_one_nothing(
    train: list[RawConversation], validation: list[RawConversation]
) -> None:
    assert isinstance(TASK, Verifiable)
    for conversation in train + validation:
        answer = conversation[1]["content"]
        assert TASK.reward(answer, conversation, "answer") == 1
        assert TASK.reward(answer.split("\n")[-1].replace(",", ""), conversation, "answer") == 1
        assert TASK.reward(answer + "1", conversation, "answer") == 0


def test_every_true_question_with_digits_earns_1(
    train: list[RawConversation], validation: list[RawConversation]
) -> None:
    without = 0
    for conversation in train + validation:
        question = conversation[0]["content"]
        expected = bool(re.search("[0-9]", question))
        assert TASK.reward(question, conversation, "question") == expected
        without += not expected
    assert without == 138


def test_questions_of_others_earn_little(train: list[RawConversation]) -> None:
    others = train[1:] + train[:1]
    earned = [TASK.reward(o[0]["content"], c, "question") for c, o in zip(train, others, strict=True)]
    assert sum(earned) / len(earned) < 0.15


def test_what_the_answer_gives_away_is_worth_less_than_the_question(train: list[RawConversation]) -> None:
    copied = [TASK.reward(f"{c[1]['content']} How many are there?", c, "question") for c in train]
    asked = [TASK.reward(c[0]["content"], c, "question") for c in train]
    assert sum(copied) < 0.6 * sum(asked)


# ---- files in other shapes ----


def test_jsonl_as_it_was_first_published(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is <<{n}={n}>>{n}.\n#### {n}"} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = [*TASK.conversations("train", str(tmp_path)), *TASK.conversations("validation", str(tmp_path))]
    assert found == [exchange(f"What is {n}?", f"It is {n}.\n#### {n}") for n in range(3)]


# ---- rewards by hand ----


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 72", "72"),
        ("She has 3.\n#### 1,080", "1080"),
        ("#### 109,200,000", "109200000"),
        ("####72", "72"),
        ("#### $72", "72"),
        ("#### -5", "-5"),
        ("#### 72.0", "72"),
        ("#### 0.50", "0.5"),
        ("#### 72.", "72"),
        ("#### 72 clips, not 73", "72"),
        ("#### 1\nno, wait\n#### 2", "2"),
        ("#### 007", "7"),
    ],
)
def test_final_numbers(answer: str, number: str) -> None:
    assert final_number(answer) == Decimal(number)


@pytest.mark.parametrize(
    "answer",
    [
        *("", "72", "####", "#### ", "### 72", "#### seventy-two", "72 ####", "#### \n72", "#### x72", "#### ٧٢"),
        *("#### 72=72", "#### 1/2", "#### 7e1", "#### 72-71", "#### 1,08", "#### 1,0800", "#### 7.2.1", "#### --72"),
        *("#### 71\n####", "#### 72_0", "#### 0x48", "#### NaN", "#### Infinity"),
    ],
)
def test_what_has_no_final_number(answer: str) -> None:
    assert final_number(answer) is None
    assert TASK.reward(answer, CLIPS, "answer") == 0


def test_numbers_are_counted_as_often_as_they_stand() -> None:
    numbers = {10: 2, 20: 1, 3: 1, 5: 2, 15: 1, 4: 1}
    assert quantities(BILLS) == {Decimal(number): count for number, count in numbers.items()}
    assert quantities("$1,000 and 2.50, 1,2 or 12,34; ½ of ٣") == {
        Decimal(number): 1 for number in ("1000", "2.5", "1", "2", "12", "34")
    }
    assert quantities("1,000 1000 1000.0") == {Decimal(1000): 3}


def test_agreement_by_hand() -> None:
    def ask(numbers: str) -> float:
        return quantities_agree(f"Oliver counts all the bills that he has today: {numbers}. How many?", BILLS)

    assert ask("10 20 3 5 15 10 4 5") == 1
    assert ask("5 4 10 15 5 3 20 10") == 1, "in any order"
    assert ask("10 20 3 5") == pytest.approx(2 * 4 / (4 + 8))
    assert ask("10 20 3 5 15 10 4 6") == pytest.approx(2 * 7 / 16)
    assert ask("5 5 5 5") == pytest.approx(2 * 2 / 12), "one that is repeated counts as often as it is true"
    assert ask("7 8 9") == 0
    assert ask("none") == 0


def test_a_question_is_words_and_a_mark() -> None:
    full = "Oliver has some bills: 10 20 3 5 15 10 4 5. How many bills more is this"
    assert quantities_agree(f"{full}?", BILLS) == 1
    assert quantities_agree(full, BILLS) == 0
    assert quantities_agree(full, BILLS.replace("?", ".")) == 1
    assert quantities_agree("10 20 3 5 15 10 4 5?", BILLS) == 0
    assert quantities_agree("bill bill bill bill bill bill bill bill 10 20 3 5 15 10 4 5?", BILLS) == 0
    assert quantities_agree("Bill BILL bilL biLl bIll bILL biLL BiLl 10 20 3 5 15 10 4 5?", BILLS) == 0
    assert quantities_agree("How many bills have they now: 10 20 3 5 15 10 4 5?", BILLS) == 0, "six words"
    assert quantities_agree("How many bills and coins have they now: 10 20 3 5 15 10 4 5?", BILLS) == 1
    assert quantities_agree("a b c d e f g h i j k l 10 20 3 5 15 10 4 5?", BILLS) == 0
    assert quantities_agree("How many are 10?", "Are 10 of them all there now?") == 0, "four words"
    assert quantities_agree("How many are there of 10?", "Are 10 of them all there now?") == 1


def test_a_question_without_digits_can_earn_nothing() -> None:
    assert quantities_agree("How many of them are there?", "How many of the three are there?") == 0


hostile = st.one_of(
    st.text(),
    st.text(alphabet="0123456789,.#- $\n/e?<>ab"),
    st.builds(lambda text: f"#### {text}", st.text(alphabet="0123456789,.-$ \n")),
)


@law
@given(hostile)
def test_no_text_raises_and_rewards_are_between_0_and_1(written: str) -> None:
    assert TASK.reward(written, CLIPS, "answer") in (0, 1)
    assert 0 <= TASK.reward(written, CLIPS, "question") <= 1


@law
@given(st.lists(st.integers(0, 30), max_size=8), st.lists(st.integers(0, 30), max_size=8))
def test_agreement_is_symmetric_and_1_only_for_the_same_numbers(ours: list[int], theirs: list[int]) -> None:
    def ask(numbers: list[int]) -> str:
        return f"Here are some of all the numbers that they have: {' and '.join(map(str, numbers))}. How many?"

    agreement = quantities_agree(ask(ours), ask(theirs))
    assert agreement == quantities_agree(ask(theirs), ask(ours))
    assert (agreement == 1) == (bool(ours) and sorted(ours) == sorted(theirs))
    assert (agreement > 0) == bool(set(ours) & set(theirs))


@pytest.mark.parametrize("unit", ["9", "1,111", "1,", "#", "#### 1", "####", "9.9", "a1 ", "ab ", "<<", "9,999."])
def test_long_texts_take_no_long_time(unit: str) -> None:
    size = 2 * 10**5  # steps that grow with the square of it would take hours
    for written in (unit * size, f"#### {unit * size}", f"####{' ' * size}{unit}", f"#### 9{unit * size}x9"):
        for writes in ("answer", "question"):
            TASK.reward(written, CLIPS, writes)  # type: ignore[arg-type]
