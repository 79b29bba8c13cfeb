"""Verdicts on accuracies: golden values, laws, refusals, and how often a verdict errs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from bwlm.errors import UserError
from bwlm.stats.gaps import holm
from bwlm.stats.proportions import Crossed, one_seed
from bwlm.stats.score_table import Setting, checked_scores
from bwlm.stats.scores import Difference, Scores, best_of, compare_scores, judge
from tests.stats.coverage import Case, simulated

Answers = Mapping[str, Mapping[int, Sequence[float]]]  # arm -> seed -> score of each item

GOLDEN: Answers = {
    "forward": {0: (1, 1, 0, 0), 1: (1, 0, 0, 0), 2: (1, 1, 1, 0)},  # 2/4 1/4 3/4
    "backward": {0: (1, 0, 0, 0), 1: (0, 0, 0, 1), 2: (1, 1, 0, 0)},  # 1/4 1/4 2/4
}


def table(answers: Answers, task: str = "arc") -> pd.DataFrame:
    runs = [(arm, seed, scores) for arm, by_seed in answers.items() for seed, scores in by_seed.items()]
    counts = [len(scores) for *_, scores in runs]
    return pd.DataFrame(
        {
            "run": np.repeat([f"{arm}-{seed}" for arm, seed, _ in runs], counts),
            "direction": np.repeat([arm for arm, *_ in runs], counts),
            "seed": np.repeat([seed for _, seed, _ in runs], counts),
            "task": task,
            "item": [f"q{i}" for count in counts for i in range(count)],
            "correct": np.concatenate([scores for *_, scores in runs]),
        }
    )


def compared(rows: pd.DataFrame) -> Scores:
    return compare_scores(checked_scores(rows))


def study(accuracies: Sequence[float], seeds: int, items: int = 200, spread: float = 1, seed: int = 0) -> Answers:
    """Answers of one simulated study whose arms have these true accuracies; seeds 0, 1, .."""
    rng = np.random.default_rng(seed)
    drawn = [next(simulated(Case(seeds, items, spread, (p, p)), 1, rng))[0] for p in accuracies]
    names = ("forward", "backward", "bidirectional", "permuted")
    return {name: dict(enumerate(map(list, arm))) for name, arm in zip(names, drawn, strict=False)}


# Golden values


def test_arms_and_their_difference_by_hand() -> None:
    found = compared(table(GOLDEN))
    forward, backward = found.arms
    assert (forward.direction, forward.seeds, forward.items, forward.accuracy) == ("forward", [0, 1, 2], 4, 0.5)
    np.testing.assert_allclose(backward.per_seed, [0.25, 0.25, 0.5])
    assert (forward.chance, forward.remarks) == (None, [])
    [d] = found.differences
    assert (d.setting, d.pair, d.seeds, d.items) == (Setting("arc"), "forward → backward", [0, 1, 2], 4)
    np.testing.assert_allclose(d.per_seed, [-0.25, 0, -0.25])
    assert d.difference == pytest.approx(-1 / 6)
    # d is 0 -1 0 0, -1 0 0 1, 0 0 -1 0. MS_seed = 4 x 1/48 = 1/12; means of items -1/3 -1/3 -1/3 1/3, MS_item = 3 x 1/9
    # = 1/3; squares around -1/6 sum to 4 - 12/36 = 11/3, less 2/12 and 3/3 leaves 5/2 over 6: MS_rest = 5/12.
    assert isinstance(d.measure, Crossed)
    assert (d.measure.by_seeds, d.measure.by_items) == (pytest.approx(1 / 144), 0)
    # so t = (1/6) / (1/12) = 2 with 2 degrees of freedom: p = 1 - 2 / sqrt 6
    assert d.p == d.p_adjusted == pytest.approx(1 - 2 / math.sqrt(6))
    assert d.interval == pytest.approx((-1 / 6 - 4.302653 / 12, -1 / 6 + 4.302653 / 12), abs=1e-6)
    assert (d.verdict, d.reason) == ("no difference seen", "seeds crossed with items, p = 0.184 (Holm over 1)")


def test_a_tie_earns_a_share() -> None:
    halves = table({arm: {s: [0.5, *of[1:]] for s, of in by_seed.items()} for arm, by_seed in GOLDEN.items()})
    forward, backward = compared(halves).arms
    assert forward.accuracy == pytest.approx((6 - 3 / 2) / 12)
    assert backward.accuracy == pytest.approx((4 - 2 + 3 / 2) / 12)


def test_chance_is_the_mean_over_items() -> None:
    rows = table(GOLDEN)
    found = compared(rows.assign(chance=[0.25, 0.25, 0.5, 0.2] * 6))
    assert [arm.chance for arm in found.arms] == [pytest.approx(0.3)] * 2


# Laws


def test_swapping_the_arms_turns_the_sign() -> None:
    answers = study((0.4, 0.6), 4)
    one = compared(table(answers)).differences[0]
    names = {"forward": "backward", "backward": "forward"}
    other = compared(table({names[arm]: scores for arm, scores in answers.items()})).differences[0]
    assert other.difference == -one.difference
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]))
    assert (other.p, other.verdict, other.detectable) == (one.p, one.verdict, one.detectable)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = table(study((0.4, 0.6), 3, items=20))
    shuffled = rows.sample(frac=1, random_state=0)
    one, other = compared(rows).differences[0], compared(shuffled).differences[0]
    assert (one.difference, one.interval, one.p) == (other.difference, other.interval, other.p)


def test_settings_are_compared_apart_and_judged_together() -> None:
    parts = [
        table(study((0.5, 0.6), 3, seed=seed)).assign(task=task, rule=rule, size=size)
        for seed, (task, rule, size) in enumerate(itertools.product(("b", "a"), ("acc", "acc_norm"), (12, 4)))
    ]
    names = [part.assign(run=part["run"] + "-" + part["size"].astype(str)) for part in parts]
    found = compared(pd.concat(names))
    assert [str(one.setting) for one in found.differences] == [
        f"{task}, size {size}, rule {rule}" for task in "ab" for size in (4, 12) for rule in ("acc", "acc_norm")
    ]
    assert all(one.reason.endswith("(Holm over 8)") for one in found.differences)
    assert [one.p_adjusted for one in found.differences] == holm([one.p for one in found.differences])


def test_runs_are_paired_by_seed_and_lonely_seeds_are_named() -> None:
    answers = study((0.4, 0.6), 5)
    apart = {
        "forward": {s: answers["forward"][s] for s in (0, 1, 2, 3)},
        "backward": {s: answers["backward"][s] for s in (1, 2, 3, 4)},
    }
    [one] = compared(table(apart)).differences
    assert (one.seeds, one.dropped_seeds) == ([1, 2, 3], {"forward": [0], "backward": [4]})
    assert one.reason.endswith("; dropped seed 0 (only in forward); dropped seed 4 (only in backward)")
    both = {arm: {s: answers[arm][s] for s in (1, 2, 3)} for arm in answers}
    assert one.interval == compared(table(both)).differences[0].interval


# Verdicts


def test_one_seed_is_never_different_however_sure_mcnemar_is() -> None:
    sure = {"forward": {0: [1.0] * 90 + [0.0] * 10}, "backward": {0: [0.0] * 90 + [1.0] * 10}}
    found = compared(table(sure))
    [one] = found.differences
    assert one.p < 1e-12
    assert (one.verdict, one.p_adjusted) == ("too few seeds to tell", None)
    assert one.reason == f"1 paired seed, a verdict needs 3; McNemar over the items, p = {one.p:.3g}"
    assert one.interval == one_seed(np.array([-1.0] * 90 + [1.0] * 10)).interval
    assert best_of(found, Setting("arc")) == ("forward", ["backward"], [])


def test_two_seeds_are_too_few_and_have_no_detectable_difference() -> None:
    [one] = compared(table(study((0.2, 0.9), 2, spread=0))).differences
    assert (one.verdict, one.p_adjusted, one.detectable) == ("too few seeds to tell", None, None)
    assert one.reason == "2 paired seeds, a verdict needs 3"
    assert one.p < 0.2


def test_pairs_with_too_few_seeds_do_not_tighten_the_others() -> None:
    answers = study((0.4, 0.5, 0.6), 3)
    few = {**answers, "bidirectional": {0: answers["bidirectional"][0]}}
    told = compared(table(few)).differences
    assert [one.verdict == "too few seeds to tell" for one in told] == [False, True, True]
    assert told[0].p_adjusted == told[0].p


def test_copies_of_one_run_are_one_seed() -> None:
    answers = study((0.2, 0.9), 1)
    [one] = compared(table({arm: dict.fromkeys(range(4), of[0]) for arm, of in answers.items()})).differences
    assert one.verdict == "too few seeds to tell"
    assert one.reason == "seeds do not differ in either arm: copies of one run are one seed"
    varied = {**study((0.9, 0.9), 4), "forward": dict.fromkeys(range(4), answers["forward"][0])}
    assert compared(table(varied)).differences[0].p_adjusted is not None


def test_arms_with_the_same_scores_have_no_difference() -> None:
    one_arm = study((0.5,), 3)["forward"]
    [one] = compared(table({"forward": one_arm, "backward": one_arm})).differences
    assert (one.difference, one.p, one.verdict) == (0, 1, "no difference seen")


def test_the_threshold_is_strict_and_for_the_adjusted_p() -> None:
    [one] = compared(table(study((0.4, 0.6), 3))).differences

    def verdicts(*p_values: float) -> list[str | None]:
        return [d.verdict for d in judge([replace(one, p=p) for p in p_values])]

    assert verdicts(0.0499) == ["different"]
    assert verdicts(0.05) == ["no difference seen"]
    assert verdicts(0.03, 0.02) == ["different", "different"]  # 2 x 0.02, then 0.04 again
    assert verdicts(0.03, 0.03) == ["no difference seen"] * 2


def test_what_can_be_seen_is_harder_in_a_larger_family() -> None:
    [one] = compared(table(study((0.4, 0.6), 3))).differences
    alone, of_three = (judge([one] * family)[0].detectable for family in (1, 3))
    assert isinstance(one.measure, Crossed)
    assert (alone, of_three) == (one.measure.detectable(1), one.measure.detectable(3))
    assert alone is not None
    assert of_three is not None
    assert alone < of_three


def test_the_best_and_those_that_cannot_be_told_from_it() -> None:
    answers = study((0.30, 0.70, 0.72), 5, items=400, spread=0.2)
    assert best_of(compared(table(answers)), Setting("arc")) == ("bidirectional", ["backward"], ["forward"])


STUDIES = 200
MOST_FALSE = int(binom.ppf(0.99, STUDIES, 0.05))


def judged_studies(accuracies: Sequence[float], seeds: int) -> list[list[Difference]]:
    """Studies of one task, each judged as a family; measured together as tasks of one table, for speed."""
    parts = [table(study(accuracies, seeds, items=40, seed=index), f"t{index:03}") for index in range(STUDIES)]
    by_task: dict[str, list[Difference]] = {}
    for one in compared(pd.concat(parts)).differences:
        by_task.setdefault(one.setting.task, []).append(one)
    return [judge(family) for family in by_task.values()]


def test_equal_arms_are_called_different_in_at_most_5_percent_of_studies() -> None:
    """Three arms, three seeds: Holm keeps the chance of any false verdict in a study."""
    studies = judged_studies((0.5, 0.5, 0.5), 3)
    assert len(studies) == STUDIES
    wrong = sum(any(one.verdict == "different" for one in family) for family in studies)
    assert 0 < wrong <= MOST_FALSE


# Refusals

Change = Callable[[pd.DataFrame], pd.DataFrame]


def of_backward(scores: Sequence[float]) -> Change:
    def changed(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(correct=[*rows["correct"][:12], *scores])

    return changed


REFUSED: dict[str, tuple[Change, str]] = {
    "all wrong": (of_backward([0] * 12), "each score of its 4 items is 0, which tells nothing about other items"),
    "all right": (of_backward([1] * 12), "each score of its 4 items is 1, which tells nothing"),
    "a constant score": (of_backward([0.1 + 0.2] * 6 + [0.3] * 6), "each score of its 4 items is 0.3, which"),
    "NaN": (of_backward([0, 1, math.nan] * 4), "run 'backward-0' has no finite score for 1 item, such as 'q2': score"),
    "infinity": (
        of_backward([0, 1, 1, 0, -math.inf, math.inf] * 2),
        "run 'backward-1' has no finite score for 2 items",
    ),
    "other items in one of its runs": (
        lambda rows: rows.assign(item=[*rows["item"][:-1], "other"]),
        "runs 'backward-0' and 'backward-2' differ in 2 items, such as 'other', that one of them lacks: evaluate both",
    ),
    "one item": (lambda rows: rows[(rows["direction"] == "forward") | (rows["item"] == "q0")], "it has one item"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_arm_that_says_nothing_is_left_out_and_hides_no_other(fault: str) -> None:
    change, reason = REFUSED[fault]
    found = compared(change(table(GOLDEN)))
    assert [arm.direction for arm in found.arms] == ["forward"]
    [line] = found.left_out
    assert line.startswith(f"arc: backward is left out: {reason}")


def test_a_table_without_an_arm_to_rank_is_refused_with_every_reason() -> None:
    with pytest.raises(UserError, match=r"forward is left out: .* is 0.*; arc: backward is left out: .* is 0"):
        compared(table(GOLDEN).assign(correct=0))


def test_a_run_that_says_nothing_is_remarked_on() -> None:
    answers = {**GOLDEN, "forward": {**GOLDEN["forward"], 1: (0, 0, 0, 0)}}
    assert compared(table(answers)).arms[0].remarks == ["run 'forward-1' has 0 on each item"]


def test_two_groups_of_seeds_and_unequal_spreads_are_remarked_on() -> None:
    rng = np.random.default_rng(0)
    low_high = np.repeat([0.3, 0.7], 4)
    grouped = {
        s: list(np.repeat([1.0, 0.0], [round(1000 * p) + s, 1000 - round(1000 * p) - s]))
        for s, p in enumerate(low_high)
    }
    close = {s: list(np.repeat([1.0, 0.0], [n, 1000 - n])) for s, n in enumerate(rng.integers(498, 503, 8))}
    found = compared(table({"forward": close, "backward": grouped}))
    assert found.arms[0].remarks == []
    [groups] = found.arms[1].remarks
    assert groups.startswith("its seeds fall into two groups, p = 0.0")
    [spread] = found.differences[0].remarks
    assert spread.startswith("the seeds of backward have a standard deviation of 0.21")


def test_items_are_never_paired_silently() -> None:
    rows = table(GOLDEN)
    other = rows.assign(
        item=["x" + item if a == "backward" else item for a, item in rows[["direction", "item"]].values]
    )
    found = compared(other)
    assert (len(found.arms), found.differences) == (2, [])
    assert found.left_out == [
        "arc: forward and backward are not compared: runs 'forward-0' and 'backward-0' differ in 8 items, such as "
        "'q0', that one of them lacks: evaluate both on the same items"
    ]
    changed = compared(
        rows.assign(digest=[f"{a}{i}" if i == "q3" else i for a, i in rows[["direction", "item"]].values])
    )
    [line] = changed.left_out
    assert "have other content under the same name for 1 item, such as 'q3' (digest): evaluate both on one" in line
    unknown = rows.assign(digest=[i if a == "forward" else "" for a, i in rows[["direction", "item"]].values])
    assert compared(unknown).left_out == []


def test_arms_without_a_common_seed_are_not_compared() -> None:
    apart = {"forward": GOLDEN["forward"], "backward": {s + 3: of for s, of in GOLDEN["backward"].items()}}
    found = compared(table(apart))
    assert found.left_out == [
        "arc: forward and backward are not compared: forward (seeds 0, 1, 2) and backward (seeds 3, 4, 5) share no "
        "seed: runs are paired by seed"
    ]


def test_scalars_are_plain_python() -> None:
    found = compared(table(GOLDEN))
    arm, one = found.arms[0], found.differences[0]
    plain = [arm.accuracy, *arm.interval, one.difference, *one.interval, one.p, one.p_adjusted, one.detectable]
    assert {type(value) for value in plain} == {float}
    assert {type(seed) for seed in (*arm.seeds, *one.seeds)} == {int}
