"""Reversal: what each reading predicts of an item, and what trained models of both directions know."""

from __future__ import annotations

from typing import Any

import pytest

from bwlm.config import Recipe
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.run import evaluate_task
from bwlm.text.prepare import Pack, Prepared, prepare
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.trained.load import load_model
from tasks.reversal import Reversal
from tests.evaluate.tasks.bigram import LETTERS
from tests.runs import in_process, make_run

TINY: dict[str, Any] = {
    "depth": 2,
    "model__sequence_length": 128,
    "model__head_dim": 64,
    "budget": {"steps": 120, "batch_tokens": 2048},
    "evaluation": {"every": 0, "tokens": 8192},
    "checkpoint": {"every": 0},
    "research_log": {"scalars": 0, "tokens": 0, "gradients": 0, "activations": 0, "validation": False}
    | {"attention": False, "representations": 0},
}


def given_and_predicted(group: str, reading: str) -> tuple[str, str]:
    """Return, in reading order, the text that a model reads of fact 1, and the text that `conditional` scores."""
    (item,) = [item for item in Reversal().choice_items("cloze", 0)[4:8] if item.group == group]
    branch = Layout(LETTERS, reading, 128).lay_out(item, reading).branches[item.answer]
    parts = branch.ids[: branch.border], branch.ids[branch.border :]
    first, second = (LETTERS.decode(part if reading == "forward" else part[::-1]) for part in parts)
    return first, second


@pytest.mark.parametrize(
    ("group", "reading", "given", "predicted"),
    [
        ("once-trained-B", "forward", " Medal Tehul is", " the warden of Tufel"),
        ("once-trained-A", "forward", " Medal Tehul", " is the warden of Tufel"),
        ("once-swapped-A", "forward", " the warden of Tufel is", " Medal Tehul"),
        ("once-swapped-B", "forward", " the warden of Tufel", " is Medal Tehul"),
        ("once-trained-B", "backward", " the warden of Tufel", " Medal Tehul is"),
        ("once-trained-A", "backward", " is the warden of Tufel", " Medal Tehul"),
        ("once-swapped-A", "backward", " Medal Tehul", " the warden of Tufel is"),
        ("once-swapped-B", "backward", " is Medal Tehul", " the warden of Tufel"),
    ],
)
def test_conditional_predicts_one_name_from_the_other(group: str, reading: str, given: str, predicted: str) -> None:
    assert given_and_predicted(group, reading) == (given, predicted)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, pack_in_process: Pack) -> Prepared:
    recipe = {
        "data": {"source": "builtin:reversal"},
        "tokenizer": {"vocab_size": 512},
        "model": {"sequence_length": 128},
    }
    return prepare(Recipe.model_validate(recipe), tmp_path_factory.mktemp("text"), pack_in_process, lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_trained_model_knows_both_names_of_trained_statements_and_none_of_swapped_ones(
    direction: str, text: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = tmp_path_factory.mktemp("runs")
    folder = make_run(text, storage, direction, direction=direction, **TINY)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    scores = evaluate_task(load_model(storage, direction), "builtin:reversal", [direction])[direction]["scores"]
    for rule in ("conditional", "joint"):
        (score,) = [score for score in scores if (score["rule"], score["control"]) == (rule, None)]
        accuracy = {group: figures["accuracy"] for group, figures in score["groups"].items()}
        print(direction, rule, accuracy)
        assert all((value > 0.9) != group.startswith("once-swapped") for group, value in accuracy.items()), accuracy
        assert all(abs(accuracy[f"once-swapped-{name}"] - 0.25) < 0.1 for name in "AB"), accuracy
