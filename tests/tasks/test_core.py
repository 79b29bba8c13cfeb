"""CORE: the texts, the order and the examples of nanochat's bundle, and every fault of a bundle told with its place."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bwlm.errors import UserError
from tasks.core import Core, CoreChoices, CoreContinuation, CoreSchema
from tasks.items import ChoiceItem, ChoiceTask, ContinuationTask, Example, Suite

Rows = list[dict[str, Any]]

CHOICES: Rows = [{"query": f"q{n} ", "choices": [f"right{n}", f"wrong{n}"], "gold": 0} for n in range(5)]
SCHEMAS: Rows = [
    {"context_options": [f"Ann {n} hit Bo, and Ann", f"Ann {n} hit Bo, and Bo"], "continuation": "fell", "gold": 1}
    for n in range(3)
]
TEXTS: Rows = [{"context": f" One, two, {n} \n", "continuation": "three"} for n in range(3)]


def entry(label: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"label": label, "dataset_uri": f"x/{label}.jsonl", "num_fewshot": [0], "icl_task_type": kind, **fields}


ENTRIES = [
    entry("asked", "multiple_choice", continuation_delimiter="\nAnswer: ", num_fewshot=[2]),
    entry("schemas", "schema"),
    entry("texts", "language_modeling", num_fewshot=[1]),
]
BASELINES = "Eval Task,Task Category,Random baseline\nasked,x,20\nschemas,x,50\ntexts,x,0.0\n"

WriteBundle = Callable[..., str]


@pytest.fixture
def bundle(tmp_path: Path) -> WriteBundle:
    """Writes a bundle with some of its parts replaced, and returns its folder."""

    def write(entries: Any = ENTRIES, baselines: str = BASELINES, asked: Rows = CHOICES) -> str:
        (tmp_path / "eval_data" / "x").mkdir(parents=True)
        (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
        (tmp_path / "eval_meta_data.csv").write_text(baselines)
        for label, rows in (("asked", asked), ("schemas", SCHEMAS), ("texts", TEXTS)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "eval_data" / "x" / f"{label}.jsonl").write_text(lines)
        return str(tmp_path)

    return write


def shuffled(rows: Rows) -> Rows:
    """Return the rows in the order of nanochat's scripts/base_eval.py."""
    copy = list(rows)
    random.Random(1337).shuffle(copy)
    return copy


def full_text(item: ChoiceItem, choice: int) -> str:
    return "".join(f"{shot.stem}{shot.answer}\n\n" for shot in item.shots) + item.stems[choice] + item.choices[choice]


# ---- the suite ----


def test_suite_holds_the_tasks_of_the_bundle(bundle: WriteBundle) -> None:
    suite = Core()
    assert isinstance(suite, Suite)
    asked, schemas, texts = suite.tasks(bundle())
    assert [task.name for task in (asked, schemas, texts)] == ["core:asked", "core:schemas", "core:texts"]
    assert [task.shots for task in (asked, schemas, texts)] == [2, 0, 1]
    assert [type(task) for task in (asked, schemas, texts)] == [CoreChoices, CoreSchema, CoreContinuation]
    assert isinstance(asked, ChoiceTask)
    assert isinstance(schemas, ChoiceTask)
    assert isinstance(texts, ContinuationTask)
    assert not isinstance(texts, ChoiceTask)


def test_a_baseline_counts_as_zero(bundle: WriteBundle) -> None:
    asked, schemas, texts = Core().tasks(bundle())
    assert asked.centred(0.2) == 0
    assert asked.centred(0.6) == pytest.approx(0.5)
    assert asked.centred(1.0) == 1
    assert asked.centred(0.0) == pytest.approx(-0.25)
    assert schemas.centred(0.75) == 0.5
    assert texts.centred(0.3) == 0.3


def test_source_is_the_file_of_the_rows(bundle: WriteBundle) -> None:
    folder = bundle()
    assert Core().tasks(folder)[0].test_source() == f"{folder}/eval_data/x/asked.jsonl"


# ---- items ----


def test_white_space_before_an_answer_belongs_to_the_answer(bundle: WriteBundle) -> None:
    asked, schemas, texts = Core().tasks(bundle())
    assert isinstance(asked, ChoiceTask)
    assert isinstance(schemas, ChoiceTask)
    assert isinstance(texts, ContinuationTask)
    first = asked.choice_items("cloze", 0)[0]
    number = shuffled(CHOICES)[0]["query"][1]
    assert (first.stems, first.choices) == (
        (f"q{number} \nAnswer:",) * 2,
        (f" right{number}", f" wrong{number}"),
    )
    assert (first.answer, first.frame) == (0, "Answer:")
    schema = schemas.choice_items("cloze", 0)[0]
    number = shuffled(SCHEMAS)[0]["context_options"][0][4]
    assert schema.stems == (f"Ann {number} hit Bo, and Ann", f"Ann {number} hit Bo, and Bo")
    assert (schema.choices, schema.answer, schema.frame) == ((" fell", " fell"), 1, "")
    text = texts.continuation_items(0)[0]
    assert (text.context, text.continuation) == (shuffled(TEXTS)[0]["context"].strip(), " three")


def test_a_question_that_ends_in_a_space_keeps_it(bundle: WriteBundle) -> None:
    entries = [entry("asked", "multiple_choice")]
    (asked,) = Core().tasks(bundle(entries))
    assert isinstance(asked, ChoiceTask)
    item = asked.choice_items("cloze", 0)[0]
    assert item.stems[0] == shuffled(CHOICES)[0]["query"].strip()
    assert item.choices[0] == f"  {shuffled(CHOICES)[0]['choices'][0]}"


def test_examples_are_drawn_for_each_row_from_all_others_as_nanochat_does(bundle: WriteBundle) -> None:
    asked = Core().tasks(bundle())[0]
    assert isinstance(asked, ChoiceTask)
    rows = shuffled(CHOICES)
    for number, item in enumerate(asked.choice_items("cloze", asked.shots)):
        drawn = random.Random(1234 + number).sample([other for other in range(5) if other != number], 2)
        examples = "".join(f"{rows[one]['query']}\nAnswer: {rows[one]['choices'][0]}\n\n" for one in drawn)
        assert full_text(item, 1) == f"{examples}{rows[number]['query']}\nAnswer: {rows[number]['choices'][1]}"


def test_examples_of_schemas_and_texts_are_solved(bundle: WriteBundle) -> None:
    _, schemas, texts = Core().tasks(bundle())
    assert isinstance(schemas, ChoiceTask)
    assert isinstance(texts, ContinuationTask)
    for shot in schemas.choice_items("cloze", 1)[0].shots:
        assert shot.stem.endswith("and Bo")
        assert shot.answer == " fell"
    (shown,) = texts.continuation_items(1)[0].shots
    assert shown.answer == " three"
    assert shown.stem.startswith("One, two, ")


def test_no_more_examples_than_other_rows(bundle: WriteBundle) -> None:
    asked = Core().tasks(bundle())[0]
    assert isinstance(asked, ChoiceTask)
    assert {len(item.shots) for item in asked.choice_items("cloze", 9)} == {4}


def test_equal_rows_have_ids_that_differ(bundle: WriteBundle) -> None:
    asked = Core().tasks(bundle(asked=CHOICES[:1] * 3))[0]
    assert isinstance(asked, ChoiceTask)
    items = asked.choice_items("cloze", 2)
    assert len({item.id for item in items}) == 3
    assert items[0].shots == (Example("q0 \nAnswer:", " right0"),) * 2


# ---- faults ----


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"entries": []}, r"core\.yaml: icl_tasks: must be a list of tasks"),
        ({"entries": [{"label": "asked"}]}, r"core\.yaml: icl_tasks\[0\]: no field 'icl_task_type': it has label"),
        (
            {"entries": [entry("asked", "multiple_choices")]},
            r"icl_tasks\[0\]: asked: icl_task_type: 'multiple_choices' is not one of .*did you mean 'multiple_choice'",
        ),
        (
            {"entries": [entry("asked", "schema", num_fewshot=3)]},
            r"icl_tasks\[0\]: asked: num_fewshot: must be a list of counts from 0 \(found 3\)",
        ),
        ({"entries": [entry("other", "schema")]}, r"eval_meta_data\.csv: no row with the Eval Task other"),
        ({"baselines": "Eval Task,Baseline\nasked,1\n"}, r"eval_meta_data\.csv: .*no column 'Random baseline'"),
        ({"baselines": BASELINES.replace("20", "many")}, r"eval_meta_data\.csv: Random baseline: .*'many'"),
        ({"baselines": BASELINES.replace("20", "100")}, r"eval_meta_data\.csv: asked: Random baseline: must be from 0"),
    ],
)
def test_a_fault_of_the_bundle_is_told(bundle: WriteBundle, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Core().tasks(bundle(**parts))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"asked\.jsonl: no rows"),
        ([{**CHOICES[0], "gold": 2}], r"asked\.jsonl: line 1: gold: must be the index .* \(found 2\)"),
        ([{**CHOICES[0], "gold": "0"}], r"asked\.jsonl: line 1: gold: must be an integer"),
        ([{**CHOICES[0], "choices": ["one"]}], r"asked\.jsonl: line 1: gold: must be the index of one of two or more"),
        ([{"query": "q", "gold": 0}], r"asked\.jsonl: line 1: no field 'choices'"),
    ],
)
def test_a_fault_of_a_row_is_told(bundle: WriteBundle, rows: Rows, message: str) -> None:
    asked = Core().tasks(bundle(asked=rows))[0]
    assert isinstance(asked, ChoiceTask)
    with pytest.raises(UserError, match=message):
        asked.choice_items("cloze", 0)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tasks\.core\.path: give the folder of the evaluation bundle"):
        Core().tasks()
    with pytest.raises(UserError, match=rf"^tasks\.core\.path: {tmp_path} holds no core\.yaml: give the local folder"):
        Core().tasks(str(tmp_path))
