"""Which pairs a plan will compare, with how many seeds, and what it says of them."""

from __future__ import annotations

from pathlib import Path

from bwlm.plan.load import load_grid
from bwlm.plan.power import PlannedPair, detectable, detectable_words, planned_pairs
from bwlm.plan.spec import Plan
from bwlm.stats.gaps import PER_DIRECTION

GRID = """\
name: bars
axes: {direction: [backward, forward], depth: [1], lr: [0.5, 1.0], seed: [0, 1, 2]}
model: {sequence_length: 64}
tokenizer: {vocab_size: 300}
budget: {steps: 5, batch_tokens: 256}
"""


def planned(folder: Path, text: str = GRID, *settings: str) -> Plan:
    (folder / "g.yaml").write_text(text)
    return load_grid(folder / "g.yaml", list(settings))


def test_learning_rates_are_no_pairs_and_forward_comes_first(tmp_path: Path) -> None:
    assert planned_pairs(planned(tmp_path)) == [PlannedPair("d1", "forward", "backward", 3, 3, 3)]


def test_sizes_are_those_of_the_report(tmp_path: Path) -> None:
    text = GRID.replace("lr: [0.5, 1.0]", "lr: [0.5], model.document_mask: [false, true]").replace("[1]", "[1, 2]")
    sizes = [pair.size for pair in planned_pairs(planned(tmp_path, text))]
    assert sizes == [f"d{depth} model.document_mask={mask}" for depth in (1, 2) for mask in (False, True)]
    mixed = GRID.replace("lr: [0.5, 1.0]", "lr: [0.5], data.source: [one, other]")
    assert len({pair.size for pair in planned_pairs(planned(tmp_path, mixed))}) == 2  # other text is another question


def test_seeds_count_that_both_share_at_any_learning_rate(tmp_path: Path) -> None:
    more = "also: [{direction: [forward, backward], depth: [1], lr: [1.0], seed: [3, 4]}]\n"
    assert planned_pairs(planned(tmp_path, GRID + more))[0].seeds == 3  # 0.5 may turn out best
    at_both = more.replace("lr: [1.0]", "lr: [0.5, 1.0]")
    assert planned_pairs(planned(tmp_path, GRID + at_both))[0].seeds == 5
    forward_only = at_both.replace("[forward, backward]", "[forward]")
    assert planned_pairs(planned(tmp_path, GRID + forward_only))[0].seeds == 3


def test_a_rate_that_one_seed_tried_makes_the_choice_one_of_one_seed(tmp_path: Path) -> None:
    for directions in ("forward, backward", "backward"):
        more = f"also: [{{direction: [{directions}], depth: [1], lr: [2.0], seed: [0]}}]\n"
        assert planned_pairs(planned(tmp_path, GRID + more)) == [PlannedPair("d1", "forward", "backward", 3, 1, 1)]
        found = detectable(planned(tmp_path, GRID + more), None)
        assert (found["family"], found["pairs"][0]["gap_sd"], found["pairs"][0]["choosing_seeds"]) == (0, None, 1)
        assert detectable_words(found) == (
            "no verdict for 1 pair with 3 seeds (1 where other rates turn out best) "
            "(the rate is chosen by 1 seed, it needs 3)"
        )


def test_a_fixed_rate_is_no_choice(tmp_path: Path) -> None:
    fixed = GRID.replace("lr: [0.5, 1.0]", "lr: [0.5]")
    assert planned_pairs(planned(tmp_path, fixed)) == [PlannedPair("d1", "forward", "backward", 3, 3, None)]
    assert detectable(planned(tmp_path, fixed), None)["family"] == 1


def test_the_arrow_studys_grid_is_told_that_it_gets_no_verdict() -> None:
    words = detectable_words(detectable(load_grid(Path("grids/arrow.yaml"), []), None))
    assert words.startswith("no verdict for 3 pairs with 8 seeds")
    assert words.endswith("(the rate is chosen by 1 seed, it needs 3)")


def test_bidirectional_cells_of_twice_the_steps_are_pairs_of_their_own(tmp_path: Path) -> None:
    both = "also: [{direction: [bidirectional], depth: [1], lr: [0.5], seed: [0, 1], budget.steps: [5, 10]}]\n"
    text = GRID.replace("seed:", "budget.steps: [5], seed:").replace("budget: {steps: 5, ", "budget: {") + both
    found = {(pair.size, pair.a, pair.b): pair.seeds for pair in planned_pairs(planned(tmp_path, text))}
    once, twice = "d1 steps=5", "d1 steps=5" + PER_DIRECTION
    assert found == {
        (once, "forward", "backward"): 3,
        (once, "forward", "bidirectional"): 2,
        (once, "backward", "bidirectional"): 2,
        (twice, "forward", "bidirectional"): 2,
        (twice, "backward", "bidirectional"): 2,
    }


def test_pairs_without_a_verdict_make_the_others_no_stricter(tmp_path: Path) -> None:
    more = "also: [{direction: [forward, backward], depth: [2], lr: [1.0], seed: [0]}]\n"
    alone, beside = (detectable(planned(tmp_path, text), None) for text in (GRID, GRID + more))
    assert (alone["family"], beside["family"]) == (1, 1)
    assert beside["pairs"][0] == alone["pairs"][0]
    assert (beside["pairs"][1]["seeds"], beside["pairs"][1]["gap_sd"]) == (1, None)
    assert detectable_words(beside).endswith("for 1 pair with 3 seeds; no verdict for 1 pair with 1 seed (it needs 3)")


def test_one_direction_has_nothing_to_see(tmp_path: Path) -> None:
    found = detectable(planned(tmp_path, GRID, "axes.direction=[forward]"), 0.01)
    assert (found["family"], found["pairs"]) == (0, [])
    assert detectable_words(found) == "no verdict: no size has two directions to compare"
