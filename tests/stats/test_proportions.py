"""Intervals and tests of accuracies: golden values, and how often they hold the truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit
from scipy.stats import binom, binomtest

from bwlm.stats.proportions import Crossed, one_seed, wilson
from tests.stats.coverage import ITEMS, SEEDS, SPREADS, Case, coverage, row, simulated

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"

# Two seeds, three items. Mean 1/2, means of seeds 2/3 and 1/3, of items 1, 0 and 1/2.
# MS_seed = 3 (1/36 + 1/36) = 1/6; MS_item = 2 (1/4 + 1/4 + 0) / 2 = 1/2.
# The rest is -1/6 -1/6 1/3 in the first row and the opposite in the second: MS_rest = 1/3 over 1 x 2 = 1/6.
TABLE = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def test_wilsons_interval_by_hand_and_by_scipy() -> None:
    # p = 0.8, z = 1.959964, z^2 = 3.841459: (0.8 + 0.192073 -+ 1.959964 sqrt(0.016 + 0.0096036)) / 1.3841459
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    for correct, n in ((0, 5), (5, 5), (1, 300), (217, 400)):
        expected = binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilsons_interval_takes_shares_and_levels() -> None:
    low, high = wilson(2.5, 10)
    assert wilson(2, 10)[0] < low < wilson(3, 10)[0] < high
    assert wilson(2.5, 10, level=0.5)[0] > low
    for wrong in ((-0.1, 10, 0.95), (11, 10, 0.95), (0, 0, 0.95), (1, 2, 1.0), (math.nan, 2, 0.95)):
        with pytest.raises(ValueError, match="needs 0 <= correct <= n"):
            wilson(*wrong)


def test_crossed_variance_by_hand() -> None:
    found = Crossed.from_scores(TABLE)
    assert found.mean == 0.5
    assert found.by_seeds == pytest.approx(1 / 36)  # MS_seed / 6
    assert found.by_items == pytest.approx(1 / 18)  # (MS_item - MS_rest) / 6
    assert found.error == pytest.approx(math.sqrt(1 / 12))
    # a third of t_{0.975, 1} = 12.706205 and two thirds of t_{0.975, 2} = 4.302653
    assert found.critical() == pytest.approx(7.103837, abs=1e-6)
    half_width = 7.103837 * 0.2886751
    assert found.interval == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=1e-6)


def test_an_accuracys_interval_by_hand() -> None:
    # n = 0.5 x 0.5 x 12 = 3, c = 7.103837 in place of z: centre 1/2, half width c sqrt(1/12 + c^2/36) / (1 + c^2/3)
    low, high = Crossed.from_scores(TABLE).accuracy_interval()
    assert (low, high) == pytest.approx((0.5 - 0.4857695, 0.5 + 0.4857695), abs=1e-6)


def test_the_interval_just_reaches_zero_at_its_own_p() -> None:
    rng = np.random.default_rng(3)
    for seeds, shift in ((2, 0.3), (3, 0.1), (5, 0.02), (8, 0.5)):
        found = Crossed.from_scores(rng.normal(shift, 0.5, (seeds, 40)) + rng.normal(0, 0.3, 40))
        assert found.critical(found.p) * found.error == pytest.approx(abs(found.mean), rel=1e-6)
        low, high = found.interval
        assert (found.p < 0.05) == (low > 0 or high < 0)


def test_a_mean_of_zero_has_p_1_and_a_sure_one_a_tiny_p() -> None:
    assert Crossed(0.0, 0.01, 0.01, 3, 100).p == 1.0
    assert Crossed(1.0, 1e-6, 0.0, 3, 100).p == pytest.approx(1e-6, rel=0.01)  # t of 1000 with 2 degrees of freedom
    assert 0 < Crossed(1.0, 1e-12, 1e-6, 3, 2000).p < 1e-6


def test_seeds_that_agree_by_coincidence_are_not_certain() -> None:
    """Three seeds whose means are equal have no spread; it is 0 only up to the grid on which means of 0 and 1 lie."""
    agree = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    found = Crossed.from_scores(agree)
    assert found.by_seeds == pytest.approx(1 / (12 * 4) / 12)  # 1 / (12 I) over S I
    assert found.by_items == 0
    assert found.p > 1e-3


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_parts_add_up_to_the_variance_of_scheffe(seeds: int, items: int, seed: int) -> None:
    score_si = np.random.default_rng(seed).normal(size=(seeds, items))
    found = Crossed.from_scores(score_si)
    ms_seed = items * score_si.mean(axis=1).var(ddof=1)
    ms_item = seeds * score_si.mean(axis=0).var(ddof=1)
    total = np.square(score_si - score_si.mean()).sum()
    rest = (total - (seeds - 1) * ms_seed - (items - 1) * ms_item) / ((seeds - 1) * (items - 1))
    plain = max(ms_seed, 1 / (12 * items)) + max(0.0, ms_item - rest)
    assert found.error**2 == pytest.approx(plain / (seeds * items))


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("of_seeds", [0.1, 0.5, 1.0])
def test_a_detectable_difference_is_seen_in_80_percent(seeds: int, of_seeds: float) -> None:
    """A study tells what is detectable, by its own estimate of the error; then that is the truth of the next one.

    Normal studies; `of_seeds` is the seeds' share of the variance.
    """
    rng, items, draws = np.random.default_rng(seeds), 500, 1500
    truth = Crossed(0.0, of_seeds * 1e-4, (1 - of_seeds) * 1e-4, seeds, items)

    def study(mean: float) -> Crossed:
        by_seeds = truth.by_seeds * rng.chisquare(seeds - 1) / (seeds - 1)
        by_items = truth.by_items * rng.chisquare(items - 1) / (items - 1)
        return Crossed(rng.normal(mean, truth.error), by_seeds, by_items, seeds, items)

    seen = sum(study(study(0.0).detectable(family=3)).p < 0.05 / 3 for _ in range(draws))
    assert 0.73 <= seen / draws <= 0.87


# One seed


def test_one_seed_as_others_compute_it() -> None:
    """R's statpsych documents ci.prop.ps(.05, 12, 4, 26, 6): 0.2548067 .. 0.6251933."""
    found = one_seed(np.array([0.0] * 18 + [-1.0] * 4 + [1.0] * 26))
    assert found.interval == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    assert found.mean == pytest.approx(22 / 48)
    # 1 + 30 + 435 + 4060 + 27405 = 31931 of 2^30 ways have at most 4 of 30 one way; twice that
    assert found.p == pytest.approx(2 * 31931 / 2**30)
    # standard error 0.09448809, times 1.959964 + 0.841621
    assert found.detectable == pytest.approx(0.2647164, abs=1e-6)


def test_one_seed_without_a_differing_item() -> None:
    found = one_seed(np.zeros(100))
    assert (found.mean, found.p) == (0, 1)
    assert found.interval[0] < 0 < found.interval[1]


def test_shares_count_by_their_sign() -> None:
    assert one_seed(np.array([0.5, 0.25, 0.5, 0.5, 0.5, 0.25])).p == pytest.approx(2 / 64)


@pytest.mark.parametrize(("a", "b", "items"), [(0.25, 0.25, 100), (0.5, 0.6, 100), (0.9, 0.9, 100), (0.8, 0.9, 1000)])
def test_the_interval_of_one_seed_holds_the_truth_over_items(a: float, b: float, items: int) -> None:
    """Items are right for both arms together more often than by chance, as hard and easy ones are."""
    rng, draws, held = np.random.default_rng(0), 2000, 0
    both = (a * b + min(a, b)) / 2
    kinds = [(both, 0.0), (b - both, 1.0), (a - both, -1.0)]
    rest = 1 - sum(share for share, _ in kinds)
    for counts in rng.multinomial(items, [*(share for share, _ in kinds), rest], size=draws):
        difference_i = np.repeat([*(value for _, value in kinds), 0.0], counts)
        low, high = one_seed(difference_i).interval
        held += low <= b - a <= high
    assert 0.935 <= held / draws <= 0.975


# Coverage

# Percent of studies whose interval holds the truth. In 10,000 draws the cases below lie in 94.8 .. 97.4; the error of a
# share over 2,000 draws is 0.5 and 0.4 there, and the bounds are three of these away.
LOWEST, HIGHEST = 93.3, 98.6


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("spread", SPREADS)
def test_intervals_hold_the_truth_of_further_seeds_and_items(seeds: int, spread: int) -> None:
    """Small tasks, where the approximation is worst; docs/statistics.md has all cases, from the slow test below."""
    for found in coverage(Case(seeds, 100, spread, (0.5, 0.6)), 2000):
        assert LOWEST <= found <= HIGHEST


def test_an_interval_over_items_alone_would_not() -> None:
    """The field's usual interval, over the answers of all runs as if each were an item of its own."""
    held = 0
    for study in simulated(Case(3, 500, 1, (0.5, 0.5)), 1000, np.random.default_rng(0)):
        low, high = wilson(float(study[0].sum()), study[0].size)
        held += low <= 0.5 <= high
    assert f"holds the true accuracy of 0.5 in {held / 10:.0f} % of studies" in " ".join(PAGE.read_text().split())


def test_satterthwaites_t_would_cover_too_little() -> None:
    """Normal studies of three seeds that make 90 % of the variance: ours errs on the wide side, as the docs say."""
    rng, draws, ours, satterthwaite = np.random.default_rng(0), 10_000, 0, 0
    for distance, by_seeds in zip(rng.standard_normal(draws), rng.chisquare(2, draws) / 2, strict=True):
        found = Crossed(distance, 0.9 * by_seeds, 0.1, 3, 2000)
        ours += abs(distance) <= found.critical() * found.error
        freedom = 1 / ((0.9 * by_seeds) ** 2 / 2 + 0.1**2 / 1999) * found.error**4
        satterthwaite += abs(distance) <= stdtrit(freedom, 0.975) * found.error
    assert f"covers only {100 * satterthwaite / draws:.0f} %" in " ".join(PAGE.read_text().split())
    assert 0.945 <= ours / draws <= 0.965


def test_most_false_differences_are_five_percent() -> None:
    rng, draws = np.random.default_rng(1), 2000
    for seeds in SEEDS:
        studies = simulated(Case(seeds, 100, 1, (0.35, 0.35)), draws, rng)
        wrong = sum(Crossed.from_scores(study[1] - study[0]).p < 0.05 for study in studies)
        assert wrong <= binom.ppf(0.99, draws, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_docs_show_the_coverage(seeds: int, items: int) -> None:
    for spread in SPREADS:
        assert row(seeds, items, spread) in PAGE.read_text()
