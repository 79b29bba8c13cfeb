"""Remarks about seeds: quiet on plain ones, loud where two groups or unequal spreads are plain to see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from bwlm.stats.seed_spread import ALPHA, two_groups_p, unequal_spread_p


@pytest.mark.parametrize("seeds", [4, 5, 8])
@pytest.mark.parametrize("spread_in_steps", [0.5, 2, 50])  # few items: most seeds have one of a few accuracies
def test_plain_seeds_are_quiet(seeds: int, spread_in_steps: float) -> None:
    rng, step, draws = np.random.default_rng(seeds), 0.01, 300
    grouped, unequal = 0, 0
    for _ in range(draws):
        a, b = np.round(50 + rng.normal(0, spread_in_steps, (2, seeds))) * step
        grouped += two_groups_p(a, step) < ALPHA
        unequal += unequal_spread_p(a, b, step) < ALPHA
    assert grouped <= 0.05 * draws
    assert unequal <= 0.05 * draws


def test_two_groups_are_seen() -> None:
    assert two_groups_p(np.array([0.30, 0.31, 0.31, 0.32, 0.50, 0.51, 0.52, 0.52]), 0.001) < ALPHA
    assert two_groups_p(np.array([0.30, 0.301, 0.50, 0.501, 0.502]), 0.001) < ALPHA
    assert two_groups_p(np.array([0.50, 0.501, 0.502, 0.503, 0.25]), 0.001) < ALPHA  # one seed that went wrong
    evenly = np.linspace(0.30, 0.52, 8)
    assert two_groups_p(evenly, 0.001) > 0.2


def test_too_few_seeds_and_equal_ones_have_no_groups() -> None:
    assert two_groups_p(np.array([0.3, 0.3, 0.9]), 0.001) == 1
    assert two_groups_p(np.full(6, 0.1 + 0.2), 0.001) == 1
    assert unequal_spread_p(np.array([0.3, 0.3, 0.3]), np.array([0.1, 0.5, 0.9]), 0.001) == 1


def test_unequal_spread_is_the_correlation_of_sum_and_difference() -> None:
    a, b = np.random.default_rng(0).normal(0, [[1.0], [3.0]], (2, 7))
    assert unequal_spread_p(a, b, 0.0) == pytest.approx(pearsonr(a + b, a - b).pvalue)
    assert unequal_spread_p(b, a, 0.0) == pytest.approx(unequal_spread_p(a, b, 0.0))


def test_a_spread_of_thirty_times_is_seen() -> None:
    a, b = np.random.default_rng(0).normal(0.5, [[0.002], [0.06]], (2, 6))
    assert unequal_spread_p(a, b, 0.0005) < ALPHA


def test_seeds_that_agree_by_coincidence_are_rounded_not_certain() -> None:
    assert unequal_spread_p(np.full(4, 0.5), np.array([0.5, 0.51, 0.5, 0.49]), 0.01) > ALPHA
