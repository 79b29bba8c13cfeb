"""Multiple choice by hand: every rule, reading and control, and what happens to items that are not plain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from bwlm.evaluate.tasks import scores
from bwlm.evaluate.tasks.choices import (
    FittedItems,
    JudgedItem,
    baselines,
    chance,
    fit_items,
    judge_items,
    shuffled_answers,
)
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.rules import judge
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from tasks.items import ChoiceItem, Example
from tests.evaluate.tasks.bigram import LETTERS, bigram_model, log_p

TABLE = {
    "^": {"q": 0.5, "a": 0.2, "b": 0.1},
    "q": {"a": 0.4, "b": 0.3, "\n": 0.1},
    "a": {"q": 0.05, "\n": 0.6, "c": 0.2},
    "b": {"q": 0.7, "\n": 0.1},
    "c": {"a": 0.25},
    "\n": {"q": 0.9},
}
"""p(next | previous): after q comes a more often than b, but before q comes b more often than a."""


def item(stem: str = "q", choices: Sequence[str] = ("a", "b"), answer: int = 0, **fields: Any) -> ChoiceItem:
    stems = (stem,) * len(choices)
    return ChoiceItem("0" * 16, "file: row 0", stems, tuple(choices), answer, **fields)


def judged(
    items: ChoiceItem | Sequence[ChoiceItem],
    reading: str = "forward",
    model: GPT | None = None,
    direction: str = "forward",
) -> dict[tuple[str | None, str], list[JudgedItem]]:
    model = model or bigram_model(TABLE)
    every = [items] if isinstance(items, ChoiceItem) else items
    found: dict[tuple[str | None, str], list[JudgedItem]] = {}
    for one in judge_items(model, Layout(LETTERS, direction, model.config.sequence_length), every, reading):
        found.setdefault((one.control, one.rule), []).append(one)
    return found


def scores_of(found: dict[tuple[str | None, str], list[JudgedItem]], control: str | None, rule: str) -> list[float]:
    [one] = found[control, rule]
    return list(one.scores)


def p(text: str) -> float:
    return log_p(TABLE, text)


# ---- rules ----


def test_forward_by_hand() -> None:
    found = judged(item())
    assert scores_of(found, None, "conditional") == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-4)
    assert scores_of(found, None, "joint") == pytest.approx([math.log(0.5 * 0.4), math.log(0.5 * 0.3)], abs=1e-4)
    assert scores_of(found, None, "normalised") == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-4)
    # BOS a \n q: only q is scored
    assert scores_of(found, None, "answer_first") == pytest.approx([math.log(0.9), math.log(0.9)], abs=1e-4)


def test_backward_by_hand() -> None:
    """The text `qa` is read as BOS a q."""
    found = judged(item(), "backward")
    assert scores_of(found, None, "conditional") == pytest.approx([math.log(0.05), math.log(0.7)], abs=1e-4)
    assert scores_of(found, None, "joint") == pytest.approx([math.log(0.2 * 0.05), math.log(0.1 * 0.7)], abs=1e-4)
    assert scores_of(found, None, "normalised") == pytest.approx([math.log(0.05 * 0.2), math.log(0.7 * 0.1)], abs=1e-4)
    assert (None, "answer_first") not in found
    assert [one.judged.chosen for one in found[None, "conditional"]] == [1]
    assert [one.judged.correct for one in found[None, "conditional"]] == [0.0]


def test_longer_choices_are_normalised_by_bytes_forward_and_stems_by_tokens_backward() -> None:
    longer = item("qq", (" ac", " b"))
    forward, backward = judged(longer), judged(longer, "backward")
    assert scores_of(forward, None, "normalised") == pytest.approx([p("q ac") / 2, p("q b") / 1], abs=1e-4)
    assert scores_of(backward, None, "normalised") == pytest.approx(
        [p(" qq") / 2 + p("^ca "), p(" qq") / 2 + p("^b ")], abs=1e-4
    )


def test_examples_come_first_in_every_reading() -> None:
    [one] = judged(item(shots=(Example("c", "b"),)))[None, "conditional"]
    assert LETTERS.decode(one.ids) == "<|bos|>cb\n\nqa"
    [one] = judged(item(shots=(Example("c", "b"),)), "backward")[None, "conditional"]
    assert LETTERS.decode(one.ids) == "<|bos|>bc\n\naq"
    [one] = judged(item(shots=(Example("c", "b"),)))[None, "answer_first"]
    assert LETTERS.decode(one.ids) == "<|bos|>b\nc\n\na\nq"


@pytest.mark.parametrize(("reading", "marker"), [("forward", "<|forward|>"), ("backward", "<|backward|>")])
def test_a_bidirectional_model_reads_behind_the_marker(reading: str, marker: str) -> None:
    [one] = judged(item(), reading, direction="bidirectional")[None, "conditional"]
    text = "qa" if reading == "forward" else "aq"
    assert LETTERS.decode(one.ids) == f"<|bos|>{marker}{text}"


def test_schemas_have_stems_that_differ() -> None:
    schema = ChoiceItem("0" * 16, "row 0", ("a", "b"), (" q", " q"), 1)
    found = judged(schema)
    assert scores_of(found, None, "conditional") == pytest.approx([p("a q"), p("b q")], abs=1e-4)
    assert scores_of(judged(schema, "backward"), None, "conditional") == pytest.approx([p(" a"), p(" b")], abs=1e-4)


texts = st.text("abcq", min_size=1, max_size=8)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(stem=texts, choices=st.lists(texts, min_size=2, max_size=4))
def test_a_model_on_a_text_is_the_mirrored_model_on_the_reversed_text(stem: str, choices: list[str]) -> None:
    """Read backward, the reversed text is the text: what was the choice is its stem, and the other way round."""
    mirrored = ChoiceItem("0" * 16, "row 0", tuple(c[::-1] for c in choices), (stem[::-1],) * len(choices), 0)
    model = random_model()
    forward, backward = judged(item(stem, choices), model=model), judged(mirrored, "backward", model=model)
    for rule in ("conditional", "joint"):
        assert scores_of(forward, None, rule) == pytest.approx(scores_of(backward, None, rule), abs=1e-4)


def random_model() -> GPT:
    model = GPT(GPTConfig(LETTERS.vocab_size, depth=1, width=32, heads=2, kv_heads=2, sequence_length=64))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


# ---- controls ----


def test_controls_by_hand() -> None:
    framed = item("q\nA:", (" a", " b"), frame="A:", context="cc", shots=(Example("c", " b"),))
    found = judged(framed)
    assert scores_of(found, "no_context", "conditional") == pytest.approx([p(": a"), p(": b")], abs=1e-4)
    assert scores_of(found, "prior", "conditional") == pytest.approx([math.log(0.2), math.log(0.1)], abs=1e-4)
    backward = judged(framed, "backward")
    assert scores_of(backward, "no_context", "conditional") == pytest.approx([p(" :A")] * 2, abs=1e-4)
    assert scores_of(backward, "prior", "joint") == pytest.approx([math.log(0.2), math.log(0.1)], abs=1e-4)
    assert ("prior", "conditional") not in backward  # the choice alone has no stem to score


def test_shuffled_answers_are_those_of_other_items_with_as_many_choices() -> None:
    items = [replace(item("q", "ab" if n % 3 else "abc", n % 2), id=f"{n:016x}") for n in range(30)]
    shuffled = shuffled_answers(items)
    assert shuffled == shuffled_answers(items[::-1])
    for size in (2, 3):
        mine = [one for one in items if len(one.choices) == size]
        assert sorted(shuffled[one.id] for one in mine) == sorted(one.answer for one in mine)
    assert any(shuffled[one.id] != one.answer for one in items)
    found = judged(items)
    for one in found["shuffled", "conditional"]:
        assert one.answer == shuffled[one.item.id]
    assert [one.scores for one in found["shuffled", "joint"]] == [one.scores for one in found[None, "joint"]]


def test_chance_and_baselines_by_hand() -> None:
    two, four = item("q", ("aa", "b"), 1), item("q", ("a", "b", "ccc", "b"), 1)
    assert chance([two, four]) == pytest.approx((1 / 2 + 2 / 4) / 2)  # two of the four say the right text
    assert baselines([two, four]) == {"place": 1.0, "majority": 1.0, "longest": 0.0, "shortest": (1 + 2 / 3) / 2}


# ---- ties, NaN, identical and empty choices ----


def test_ties_count_for_their_share_and_not_by_place() -> None:
    for answer in (0, 1, 2):
        one = judge(np.array([1.0, 1.0, 0.5]), ["a", "b", "c"], answer)
        assert (one.correct, one.is_tied) == ({0: 0.5, 1: 0.5, 2: 0.0}[answer], True)
    assert judge(np.array([-np.inf, -np.inf]), ["a", "b"], 1).correct == 0.5


def test_choices_with_the_same_text_are_one_choice() -> None:
    found = judged(item("q", ("a", "b", "a"), 2))
    [one] = found[None, "conditional"]
    assert one.scores[0] == one.scores[2]  # to the last digit: they are one path of the tree
    assert (one.judged.chosen, one.judged.correct, one.judged.is_tied) == (0, 1.0, False)


def test_a_score_that_is_not_a_number_never_wins_and_the_item_is_wrong() -> None:
    one = judge(np.array([np.nan, 1.0]), ["a", "b"], 1)
    assert (one.chosen, one.correct, one.is_finite) == (-1, 0.0, False)
    model = bigram_model(TABLE)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    [broken] = judged(item(), model=model)[None, "conditional"]
    assert (broken.judged.correct, broken.judged.is_finite) == (0.0, False)


def test_a_choice_that_is_a_prefix_of_another_has_its_own_score_wherever_it_stands() -> None:
    for choices in (("a", "ac"), ("ac", "a")):
        [one] = judged(item("q", choices))[None, "conditional"]
        by_text = dict(zip(choices, one.scores, strict=True))
        assert by_text == pytest.approx({"a": p("qa"), "ac": p("qac")}, abs=1e-4)


def test_items_without_a_choice_to_score_are_counted_and_impossible_ones_refused() -> None:
    layout = Layout(LETTERS, "forward", 64)
    fitted = fit_items(layout, [item(), item("q", ("a", "  "))])
    assert (len(fitted.items), len(fitted.empty)) == (1, 1)
    for wrong in (item("q", ("a",)), item("q", ("a", "b"), 2)):
        with pytest.raises(UserError, match=r"^file: row 0: needs two or more choices"):
            fit_items(layout, [wrong])


# ---- what fits ----


def test_what_does_not_fit_loses_examples_first_then_the_beginning_of_its_context() -> None:
    shots = (Example("q" * 5, "a"), Example("q" * 5, "b"))  # 8 tokens each, with their separator; 9 answer first
    layout = Layout(LETTERS, "forward", 40)  # 39 tokens of text: BOS, and a slot that a marker would need

    def fit(context: str) -> FittedItems:
        return fit_items(layout, [item("q" * 10, ("a", "bb"), shots=shots, context=context)])

    [whole] = fit("w w w ").fitted  # 10 + 6 + 2, and 18 of the examples
    assert (whole.item.shots, whole.dropped_shots, whole.is_cut) == (shots, 0, False)
    [fewer] = fit("w w w w w w ").fitted
    assert (fewer.item.shots, fewer.dropped_shots, fewer.is_cut) == (shots[:1], 1, False)
    [cut] = fit("one two three four five six seven ").fitted
    assert (cut.item.shots, cut.dropped_shots, cut.is_cut) == ((), 2, True)
    assert cut.item.context == "three four five six seven "
    assert fit("w w w w w w ").cut == 1
    assert [len(layout.lay_out(one.item, "forward").branches[1].ids) for one in (whole, fewer, cut)] == [18, 24, 38]


def test_bos_and_marker_stay_when_an_item_is_cut() -> None:
    layout = Layout(LETTERS, "bidirectional", 24)
    [one] = fit_items(layout, [item("q" * 10, context="word " * 20)]).fitted
    laid_out = layout.lay_out(one.item, "backward")
    assert laid_out.trunk == (LETTERS.bos, LETTERS.backward)
    assert one.is_cut


def test_an_item_has_the_same_text_for_models_of_all_directions() -> None:
    for direction in ("forward", "backward", "bidirectional"):
        [one] = fit_items(Layout(LETTERS, direction, 24), [item("q" * 10, context="word " * 20)]).fitted
        assert one.item.context == "word word "


def test_a_task_is_refused_if_over_one_item_in_twenty_does_not_fit() -> None:
    layout = Layout(LETTERS, "forward", 24)
    short, long = item(), item("q" * 30)
    assert fit_items(layout, [short] * 19 + [long]).refusal == ""
    assert fit_items(layout, [short] * 18 + [long] * 2).refusal == "2 of 20 items do not fit into a row"
    assert fit_items(layout, [long]).refusal == "1 of 1 items do not fit into a row"


def test_the_longest_item_that_fits_is_scored_to_its_last_id() -> None:
    model = bigram_model(TABLE, length=12)
    fits, too_long = item("q" * 10, ("a", "b")), item("q" * 11, ("a", "b"))
    layout = Layout(LETTERS, "bidirectional", 12)
    # answer first a line break comes in between, so the longest text has 9 + 2 tokens
    assert layout.fit(fits) is None
    assert layout.fit(too_long) is None
    longest = item("q" * 9, ("a", "b"))
    assert layout.fit(longest) is not None
    for reading in ("forward", "backward"):
        assert all(
            np.isfinite(one.scores).all()
            for of in judged(longest, reading, model, "bidirectional").values()
            for one in of
        )


# ---- borders ----


def test_white_space_at_the_end_of_a_stem_belongs_to_the_choice() -> None:
    for stem, choice in (("q", " a"), ("q ", "a"), ("q \n", "a")):
        [one] = judged(item(stem, (choice, "  b")))[None, "conditional"]
        assert one.scores[0] == pytest.approx(p("q" + (stem + choice).removeprefix("q")), abs=1e-4)


def test_a_token_that_crosses_the_border_belongs_to_the_choice_and_is_counted() -> None:
    from bwlm.text.tokenizer import Tokenizer

    merging = Tokenizer({bytes([byte]): byte for byte in range(256)} | {b"qa": 256})
    layout = Layout(merging, "forward", 64)
    [one] = fit_items(layout, [item("cq", ("a", "b"))]).fitted
    assert one.is_merged
    laid_out = layout.lay_out(one.item, "forward")
    assert [branch.border for branch in laid_out.branches] == [1, 2]  # c | qa, and cq | b
    assert not fit_items(layout, [item("cq", (" a", " b"))]).fitted[0].is_merged


# ---- independence ----


def test_no_score_depends_on_order_company_or_the_size_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    items = [
        replace(item("q" * (n % 7 + 1), ("a" * (n % 3 + 1), "b", "cb"), n % 3, frame="q"), id=f"{n:016x}")
        for n in range(12)
    ]
    for reading in ("forward", "backward"):
        together = judged(items, reading, model)
        monkeypatch.setattr(scores, "_NODES_AT_ONCE", 7)
        for others in (judged(items[::-1], reading, model), judged(items[:5], reading, model)):
            for key, of in others.items():
                by_id = {one.item.id: one for one in together[key]}
                for one in of:
                    assert one.scores == pytest.approx(by_id[one.item.id].scores, abs=1e-4)
