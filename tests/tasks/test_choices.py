"""Multiple choice: what the user reads to the letter, and what is refused of a row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bwlm.errors import UserError
from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.choices import MultipleChoice
from tasks.mmlu import MMLU
from tasks.task import RawConversation
from tests.tasks.data import real

SKY = {"question": "What is blue?", "choices": {"text": ["grass", "the sky"], "label": ["A", "B"]}, "answerKey": "B"}
RING = {"question": "What is 1+1 in Z_2?", "subject": "abstract_algebra", "choices": ["0", "1", "2", "3"], "answer": 0}


def everything(task: MultipleChoice, path: str) -> list[RawConversation]:
    return [*task.conversations("train", path), *task.conversations("validation", path)]


def read(task: MultipleChoice, row: dict[str, Any], folder: Path) -> RawConversation:
    """The row as a conversation, in whichever split its hash puts it."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (conversation,) = everything(task, str(folder))
    return conversation


def test_an_arc_question_by_hand(tmp_path: Path) -> None:
    assert read(ARC_EASY, SKY, tmp_path) == [
        {
            "role": "user",
            "content": "Multiple Choice question: What is blue?\n- grass=A\n- the sky=B\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "B"},
    ]


def test_digits_for_labels_become_letters(tmp_path: Path) -> None:
    numbered = {**SKY, "choices": {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}, "answerKey": "3"}
    question, answer = read(ARC_CHALLENGE, numbered, tmp_path)
    assert "- a=A\n- b=B\n- c=C\n- d=D\n" in question["content"]
    assert answer["content"] == "C"


def test_an_mmlu_question_by_hand(tmp_path: Path) -> None:
    question, answer = read(MMLU, RING, tmp_path)
    assert question["content"].startswith(
        "Multiple Choice question: What is 1+1 in Z_2?\n- 0=A\n- 1=B\n- 2=C\n- 3=D\n\n"
    )
    assert answer["content"] == "A"


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        (ARC_EASY, {**SKY, "answerKey": "C"}, "answerKey: must be one of A, B (found 'C')"),
        (ARC_EASY, {**SKY, "answerKey": 1}, "answerKey: must be a string (found 1)"),
        (ARC_EASY, {**SKY, "choices": ["grass", "the sky"]}, "choices: must be an object (found a list)"),
        (
            ARC_EASY,
            {**SKY, "choices": {"text": ["grass"], "label": ["A", "B"]}},
            "choices: 1 in text, 2 in label: give as many labels as texts",
        ),
        (
            ARC_EASY,
            {**SKY, "choices": {"texts": ["grass"], "label": ["A", "B"]}},
            "choices: no field 'text' (did you mean 'texts'?): it has texts, label",
        ),
        (
            ARC_EASY,
            {**SKY, "choices": {"text": ["grass"], "label": ["A"]}, "answerKey": "A"},
            "choices: must be 2 to 26 (found 1)",
        ),
        (MMLU, {**RING, "answer": 4}, "answer: must be the index of one of 4 choices (found 4)"),
        (MMLU, {**RING, "answer": -1}, "answer: must be the index of one of 4 choices (found -1)"),
        (MMLU, {**RING, "answer": "A"}, "answer: must be an integer (found a string)"),
        (MMLU, {**RING, "answer": True}, "answer: must be an integer (found true or false)"),
        (MMLU, {**RING, "choices": "0123"}, "choices: must be a list of strings (found a string)"),
        (MMLU, {**RING, "choices": ["0", 1]}, "choices[1]: must be a string (found 1)"),
        (MMLU, {**RING, "question": None}, "question: must be a string (found nothing)"),
        (MMLU, {"question": "?", "choice": []}, "no field 'choices' (did you mean 'choice'?): it has question, choice"),
    ],
)
def test_faults_of_a_row(task: MultipleChoice, row: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(task, row, tmp_path)
    assert str(error.value) == f"{tmp_path / 'rows.jsonl'}: line 1: {told}"


@pytest.mark.parametrize(
    ("task", "folder", "rows"), [(ARC_EASY, "ai2_arc/ARC-Easy", 2376), (MMLU, "mmlu/all", 3520)], ids=["arc", "mmlu"]
)
def test_real_questions(task: MultipleChoice, folder: str, rows: int, tmp_path: Path) -> None:
    test = f"{real(folder)}/test.parquet"
    with pytest.raises(
        UserError, match=rf"^tasks\.{task.name}\.path: {test}: no file to train on \({test} is left for"
    ):
        everything(task, test)
    path = tmp_path / "questions.parquet"
    path.symlink_to(test)
    found = everything(task, str(path))
    assert len(found) == rows
    assert len(list(task.conversations("validation", str(path)))) == pytest.approx(rows / 20, rel=0.3)
    letters = Counter(answer["content"] for _, answer in found)
    assert set(letters) == set("ABCD")
    table = pq.read_table(test).to_pylist()
    asked = {conversation[0]["content"]: conversation[1]["content"] for conversation in found}
    for row in table:
        texts = row["choices"]["text"] if task is ARC_EASY else row["choices"]
        right = "ABCD".index(row["answerKey"]) if task is ARC_EASY else row["answer"]
        lines = "".join(f"- {text}={letter}\n" for text, letter in zip(texts, "ABCD", strict=True))
        end = "\nRespond only with the letter of the correct answer."
        assert asked[f"Multiple Choice question: {row['question']}\n{lines}{end}"] == "ABCD"[right]


def test_a_copy_of_the_hubs_folder_is_found_by_its_root(tmp_path: Path) -> None:
    easy = tmp_path / "ARC-Easy"
    easy.mkdir()
    (easy / "train.jsonl").write_text(json.dumps(SKY) + "\n")
    assert ARC_EASY.key(str(tmp_path)) == ARC_EASY.key(f"file://{tmp_path}") == ARC_EASY.key(str(easy))
    assert ARC_EASY.key(str(tmp_path)) != ARC_CHALLENGE.key(str(easy))
