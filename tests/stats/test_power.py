"""What planned seeds can see: against simulation, known figures, and the laws of power."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from bwlm.format import counted
from bwlm.stats.gaps import FEWEST_SEEDS, judge, paired_t
from bwlm.stats.power import TABLE_GAPS, TABLE_SEEDS, detectable_gap, power_table, t_test_power
from tests.stats.test_gaps import GOLDEN, measured, table

DOC = Path(__file__).parents[2] / "docs" / "statistics.md"


def simulated_power(seeds: int, gap: float, family: int, studies: int = 40_000) -> float:
    """The share of studies whose paired t-test passes alpha / family, computed without any noncentral distribution."""
    differences = gap + np.random.default_rng(seeds).standard_normal((studies, seeds))
    t = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / math.sqrt(seeds))
    return float(np.mean(2 * student_t.sf(np.abs(t), seeds - 1) < 0.05 / family))


@pytest.mark.parametrize("family", [1, 3, 8])
@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_power_is_the_share_of_simulated_studies(seeds: int, gap: float, family: int) -> None:
    expected = simulated_power(seeds, gap, family)
    error = math.sqrt(max(expected * (1 - expected), 1e-4) / 40_000)
    assert t_test_power(seeds, gap, family) == pytest.approx(expected, abs=4 * error)


def test_known_figures() -> None:
    """Five seeds, and a gap of 3 standard deviations of one *run*: of the paired difference it is 3 / sqrt 2."""
    figures = [t_test_power(5, 3 / math.sqrt(2), family) for family in (1, 3, 8)]
    assert figures == pytest.approx([0.94, 0.73, 0.48], abs=0.005)
    # Three of the paired difference itself, worth more: t has noncentrality 3 sqrt 5 = 6.7 against a critical 2.776.
    assert t_test_power(5, 3.0) == pytest.approx(0.9977, abs=1e-4)
    # G*Power 3.1, paired t, two-tailed, alpha 0.05, dz 0.5: n = 34 is the first with power above 0.8 (0.8078).
    assert t_test_power(34, 0.5) == pytest.approx(0.8078, abs=5e-5)
    assert t_test_power(33, 0.5) < 0.8


def test_without_a_gap_power_is_the_error_rate() -> None:
    for seeds in TABLE_SEEDS:
        assert t_test_power(seeds, 0.0) == pytest.approx(0.05)
        assert t_test_power(seeds, 0.0, family=4) == pytest.approx(0.0125)


@given(st.integers(2, 1000), st.floats(0, 100), st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_power_is_a_chance_whatever_is_asked(seeds: int, gap: float, family: int) -> None:
    """Where scipy's tail underflows to NaN too."""
    chance = t_test_power(seeds, gap, family)
    assert 0.05 / family - 1e-9 <= chance <= 1.0
    assert chance == t_test_power(seeds, -gap, family)
    assert t_test_power(seeds, gap + 0.1, family) >= chance - 1e-9
    assert t_test_power(seeds, gap, family + 1) <= chance + 1e-9


def test_the_family_is_a_lower_bound_under_holm() -> None:
    """Three true gaps: Holm grows milder after each that it calls different, so more are called than alpha / 3 says."""
    rng, g = np.random.default_rng(3), measured(table(GOLDEN))
    seen = []
    for _ in range(2000):
        tested = [paired_t(2.0 + rng.standard_normal(5)) or pytest.fail("five differences") for _ in range(3)]
        judged = judge([replace(g, seeds=[0, 1, 2, 3, 4], p=p) for p, _ in tested])
        seen += [one.verdict == "different" for one in judged]
    assert t_test_power(5, 2.0, family=3) < np.mean(seen) < t_test_power(5, 2.0)


@pytest.mark.parametrize("chance", [0.8, 0.9])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_detectable_gap_is_seen_with_that_chance(seeds: int, chance: float) -> None:
    for family in (1, 3):
        gap = detectable_gap(seeds, power=chance, family=family)
        assert gap is not None
        assert t_test_power(seeds, gap, family) == pytest.approx(chance)
        assert detectable_gap(seeds, 0.006, chance, family) == pytest.approx(0.006 * gap)
    assert detectable_gap(seeds, sd=0.0) == 0.0


def test_too_few_seeds_detect_nothing() -> None:
    assert detectable_gap(1) is None
    assert detectable_gap(2, power=0.9) is None


def test_the_table_is_power_by_seeds_and_gap() -> None:
    table = power_table(family=3)
    assert list(table) == list(range(2, 11))
    assert {tuple(row) for row in table.values()} == {TABLE_GAPS}
    assert (TABLE_GAPS[0], TABLE_GAPS[-1]) == (0.5, 5.0)
    assert table[5][3.0] == t_test_power(5, 3.0, family=3)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


@pytest.mark.parametrize("family", [1, 3])
def test_the_docs_show_the_power_table(family: int) -> None:
    rows = [
        [f"{n} (no verdict)" if n < FEWEST_SEEDS else str(n)]
        + ["> 0.99" if chance >= 0.995 else f"{chance:.2f}" for chance in by_gap.values()]
        for n, by_gap in power_table(family=family).items()
    ]
    assert f"\n\n{markdown(['seeds', *(f'{gap:g}' for gap in TABLE_GAPS)], rows)}\n\n" in DOC.read_text()


def test_the_docs_show_detectable_gaps() -> None:
    asked = [(chance, family) for chance in (0.8, 0.9) for family in (1, 3, 6)]
    header = [f"{100 * chance:.0f} %, {counted(family, 'pair')}" for chance, family in asked]
    rows = [[str(n), *(f"{detectable_gap(n, 1.0, *one):.2f}" for one in asked)] for n in TABLE_SEEDS[1:]]
    assert f"\n\n{markdown(['seeds', *header], rows)}\n\n" in DOC.read_text()


def test_nonsense_is_refused() -> None:
    for wrong in ((1, 1.0, 1, 0.05), (5, 1.0, 0, 0.05), (5, 1.0, 1, 0.0)):
        with pytest.raises(ValueError, match="needs 2 seeds"):
            t_test_power(*wrong)
    for chance, sd in ((0.04, 1.0), (1.0, 1.0), (0.8, -1.0)):
        with pytest.raises(ValueError, match="needs power"):
            detectable_gap(5, sd, chance)
