"""Verifiable tasks as evaluated ones: their items, examples and checks, by the rewards that RL uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bwlm.errors import UserError
from tasks import EVALUATED, TASKS
from tasks.items import CheckedTask, Example
from tests.tasks.data import real

ANSWERED = ["gsm8k", "builtin:arithmetic", "builtin:spelling"]


def checked(name: str) -> CheckedTask:
    task = EVALUATED[name]
    assert isinstance(task, CheckedTask)
    return task


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    """A folder of three training problems and two of the test split."""
    for split, numbers in (("train", (3, 4, 5)), ("test", (1, 2))):
        rows = [
            {"question": f"What is {n}+{n}?", "answer": f"It is {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
            for n in numbers
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_an_item_asks_in_two_forms(gsm8k: str) -> None:
    [item, _] = checked("gsm8k").generated_items(2, gsm8k)
    assert item.prompt == "Question: What is 1+1?\nAnswer:"
    assert [message["content"] for message in item.conversation] == ["What is 1+1?", "It is 1+1=2.\n#### 2"]
    assert item.place.endswith("test.jsonl: line 1")


def test_examples_are_training_problems_without_annotations(gsm8k: str) -> None:
    items = checked("gsm8k").generated_items(2, gsm8k)
    expected = tuple(
        Example(f"Question: What is {n}+{n}?\nAnswer:", f" It is {n}+{n}={2 * n}.\n#### {2 * n}") for n in (3, 4)
    )
    assert [item.shots for item in items] == [expected, expected]
    assert not any(item.shots for item in checked("gsm8k").generated_items(0, gsm8k))


def test_an_item_is_never_its_own_example(tmp_path: Path) -> None:
    """A single file is read for both."""
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for item in checked("gsm8k").generated_items(2, str(tmp_path / "problems.jsonl")):
        assert len(item.shots) == 2
        assert item.prompt not in [shot.stem for shot in item.shots]


@pytest.mark.parametrize("name", ANSWERED[1:])
def test_a_generated_task_is_evaluated_on_its_validation_split(name: str) -> None:
    task = checked(name)
    items = task.generated_items(5)
    assert [item.conversation for item in items] == list(TASKS[name].conversations("validation"))
    trained = [conversation[0]["content"] for conversation in TASKS[name].conversations("train")]
    assert [shot.stem for shot in items[0].shots] == [f"Question: {text}\nAnswer:" for text in trained[:5]]
    assert task.test_source() == name
    with pytest.raises(UserError, match=r"is generated and reads no file"):
        task.test_source("somewhere")


@pytest.mark.parametrize("name", ANSWERED)
def test_true_answers_are_right_and_others_are_not(name: str, gsm8k: str) -> None:
    task = checked(name)
    for item in task.generated_items(0, gsm8k if name == "gsm8k" else None):
        answer = item.conversation[-1]["content"]
        assert task.correct(f" {answer}", item)
        assert not task.correct(f"{answer}0", item)
        assert not task.correct("", item)


@pytest.mark.parametrize("name", ANSWERED)
def test_ids_are_unique_and_do_not_depend_on_place(name: str, gsm8k: str) -> None:
    items = checked(name).generated_items(0, gsm8k if name == "gsm8k" else None)
    assert len({item.id for item in items}) == len(items)


def test_real_problems() -> None:
    """The 1,319 problems of the test file; every true answer is right."""
    task, path = checked("gsm8k"), real("gsm8k")
    items = task.generated_items(5, path)
    assert len(items) == 1319
    assert all(task.correct(item.conversation[-1]["content"], item) for item in items)
    assert not any("<<" in shot.answer for shot in items[0].shots)
    assert all("\n\nQuestion:" not in item.conversation[-1]["content"] for item in items)


def test_rows_of_another_schema_name_file_row_and_field(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "1?", "answer": 1}\n')
    with pytest.raises(UserError, match=r"test\.jsonl: line 1: answer: must be a string"):
        checked("gsm8k").generated_items(0, str(tmp_path))
