"""HumanEval: from an output to a program, and all real solutions through the whole path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bwlm.errors import UserError
from bwlm.evaluate.sandbox import run_programs
from bwlm.evaluate.tasks.writers import TextWriter
from tasks.humaneval import HumanEval, before_function, code_of
from tasks.items import ExecutedTask, GeneratedItem
from tests.evaluate.tasks.bigram import LETTERS
from tests.tasks.data import real

TASK = HumanEval()
PROMPT = '''import math


def half(x: float) -> float:
    """ Halve x """
    return x / 2


def quarter(x: float) -> float:
    """ Quarter x, by half(x)
    >>> quarter(8)
    2
    """
'''
ROW = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "canonical_solution": "    return half(half(x))\n",
    "test": "def check(candidate):\n    assert candidate(8) == 2\n    assert math.pi > 3\n",
    "entry_point": "quarter",
}
WHOLE = "def quarter(x):\n    return half(half(x))"
BODY = "    return half(half(x))"


def items_of(folder: Path, **fields: object) -> Sequence[GeneratedItem]:
    (folder / "test.jsonl").write_text(json.dumps(ROW | fields) + "\n")
    return TASK.generated_items(0, str(folder))


@pytest.fixture
def item(tmp_path: Path) -> GeneratedItem:
    return items_of(tmp_path)[0]


def test_it_is_an_executed_task() -> None:
    assert isinstance(TASK, ExecutedTask)


def test_right_outputs_pass_and_wrong_ones_fail(item: GeneratedItem) -> None:
    right = [
        BODY,
        f"{BODY}\n",
        "\n    # comment\n    y = half(x)\n    return half(y)\n",
        WHOLE,
        f"```python\n{WHOLE}\n```",
        f"Sure:\n\n```python\n{WHOLE}\n```\nIt halves twice.\n```python\nraise\n```",
        f"```\n{WHOLE}",
        f"  ```py\n{PROMPT}{BODY}\n  ```",
        f"```python\n{BODY}\n```",
        "```python\ndef twice(x):\n    return half(half(x))\n\ndef quarter(x):\n    return twice(x)\n```",
    ]
    wrong = [
        "",
        "    pass",
        "    return x",
        "return half(half(x))",
        "Sure, here it is.",
        "```python\n```",
        "def quarter(x): return x",
    ]
    runs = run_programs([TASK.program(output, item) for output in right + wrong])
    assert [run.outcome for run in runs] == ["passed"] * len(right) + ["failed"] * len(wrong)


def test_a_program_that_leaves_before_its_tests_is_not_right(item: GeneratedItem) -> None:
    [run] = run_programs([TASK.program(f"{BODY}\n\nimport os\nos._exit(0)", item)])
    assert run.outcome == "failed"


def test_the_first_block_of_code_counts() -> None:
    assert code_of("a\n```python\nb\nc\n```\nd\n```\ne\n```") == "b\nc\n"
    assert code_of("no block, only `a` word") == "no block, only `a` word"
    assert code_of("```\nnot closed") == "not closed"


def test_what_stands_before_the_function_is_kept() -> None:
    before = before_function(PROMPT, "quarter")
    assert before.startswith("import math")
    assert before.endswith("return x / 2\n\n\n")
    assert before_function("def f(): pass\ndef f_2(): pass\n", "f") == ""
    assert before_function("def f(): pass\ndef f(): return 1\n", "f") == "def f(): pass\n"


def test_a_model_of_conversations_is_asked_for_the_whole_function(item: GeneratedItem) -> None:
    question, answer = (message["content"] for message in item.conversation)
    assert PROMPT.strip() in question
    assert code_of(answer) == f"{PROMPT}{BODY}\n"


def test_the_hubs_folder_has_the_files(tmp_path: Path) -> None:
    (tmp_path / "openai_humaneval").mkdir()
    items_of(tmp_path / "openai_humaneval")
    assert len(TASK.generated_items(0, str(tmp_path))) == 1


def test_mistakes_name_row_and_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.jsonl: line 1: entry_point: 'third' is not defined in prompt"):
        items_of(tmp_path, entry_point="third")
    with pytest.raises(UserError, match=r"test\.jsonl: line 1: test: must be a string"):
        items_of(tmp_path, test=None)
    with pytest.raises(UserError, match="--shots 2: humaneval has no examples"):
        TASK.generated_items(2, str(tmp_path))


# ---- the real problems ----


@pytest.fixture(scope="module")
def real_rows() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(Path(real("openai_humaneval")) / "test.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def real_items() -> Sequence[GeneratedItem]:
    return TASK.generated_items(0, real("openai_humaneval"))


def written(text: str) -> str:
    """Rest of a text that a base model wrote."""
    writer = TextWriter("forward", "forward", LETTERS, TASK.stops)
    return writer._read(LETTERS.encode(text).tolist()).text


def test_no_stop_cuts_a_solution(real_rows: list[dict[str, str]]) -> None:
    assert len(real_rows) == 164
    for row in real_rows:
        assert written(row["canonical_solution"] + "\ndef other():\n") == row["canonical_solution"]


@pytest.mark.faults
def test_every_real_solution_passes_as_a_continuation(
    real_rows: list[dict[str, str]], real_items: Sequence[GeneratedItem]
) -> None:
    outputs = [written(row["canonical_solution"] + "\nclass Other:\n") for row in real_rows]
    assert failed(outputs, real_items) == []


@pytest.mark.faults
def test_every_real_solution_passes_as_an_answer(real_items: Sequence[GeneratedItem]) -> None:
    assert failed([item.conversation[-1]["content"] for item in real_items], real_items) == []


@pytest.mark.faults
def test_no_real_test_passes_without_a_solution(real_items: Sequence[GeneratedItem]) -> None:
    assert len(failed(["    pass\n" for _ in real_items], real_items)) == len(real_items)


def failed(outputs: Sequence[str], items: Sequence[GeneratedItem]) -> list[tuple[str, str]]:
    runs = run_programs([TASK.program(output, item) for output, item in zip(outputs, items, strict=True)])
    return [(item.place, run.detail) for item, run in zip(items, runs, strict=True) if run.outcome != "passed"]
