"""Scaling laws: a golden objective, laws recovered with their intervals, designs that identify nothing, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bwlm.analysis.charts.scaling import law_chart, scaling_chart
from bwlm.analysis.commands.scaling import analyse, scaling
from bwlm.errors import UserError
from bwlm.model.shape import GPTConfig, count_parameters
from bwlm.stats.gap_trend import GapTrend, gap_by_size
from bwlm.stats.gaps import PER_DIRECTION, Gap
from bwlm.stats.scaling_fit import COLUMNS, fit, hold_out
from bwlm.stats.scaling_law import Law, objective
from tests.analysis.storage import STEPS, finish, make_cell

TRUE = Law(E=1.8, A=40.0, a=0.30, B=120.0, b=0.33)
SIZES, BUDGETS = (1e5, 3e5, 1e6, 3e6), (1e7, 3e7, 1e8)
GRID = [(n, d) for n in SIZES for d in BUDGETS]


def simulated(
    cells: Sequence[tuple[float, float]] = GRID,
    law: Law = TRUE,
    noise: float = 0.0,
    seeds: int = 3,
    rng: int = 0,
    direction: str = "forward",
) -> pd.DataFrame:
    """Runs of a law; the noise is the standard deviation of log loss over seeds."""
    draw = np.random.default_rng(rng)
    rows = [
        (f"{direction}-{n:g}-{d:g}-{s}", direction, s, n, d, float(law.loss(n, d)) * math.exp(noise * draw.normal()))
        for n, d in cells
        for s in range(seeds)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def a_gap(size: int | str, per_seed: Sequence[float], a: str = "forward", b: str = "backward") -> Gap:
    mean = float(np.mean(per_seed))
    rest: dict[str, Any] = {"gap_bpb": 0.0, "gap_percent": 0.0, "bootstrap": (0.0, 0.0), "seed_interval": None}
    seeds = list(range(len(per_seed)))
    return Gap(size, a, b, seeds, {}, 10, np.array(per_seed), mean, noise_floor=None, p=None, **rest)


# The objective and the convention


def test_the_objective_by_hand() -> None:
    law = Law(E=1.0, A=10.0, a=0.5, B=20.0, b=1.0)
    # N 100, D 20: 1 + 10 / 10 + 20 / 20 = 3.  N 25, D 10: 1 + 10 / 5 + 20 / 10 = 5.
    n, d = np.array([100.0, 25.0]), np.array([20.0, 10.0])
    np.testing.assert_allclose(law.loss(n, d), [3.0, 5.0])
    # Log residuals 0.0004, inside delta 0.001: 0.0004^2 / 2 = 8e-8; -0.01, outside: 0.001 (0.01 - 0.0005) = 9.5e-6.
    losses = np.array([3.0 * math.exp(-0.0004), 5.0 * math.exp(0.01)])
    assert objective(law, n, d, losses) == pytest.approx(8e-8 + 9.5e-6, rel=1e-9)
    # A sum: the same two points again double it.
    assert objective(law, np.tile(n, 2), np.tile(d, 2), np.tile(losses, 2)) == pytest.approx(2 * 9.58e-6, rel=1e-9)


def test_the_fit_is_a_minimum_of_the_objective() -> None:
    runs = simulated(noise=0.003)
    columns = [runs[name].to_numpy() for name in ("parameters", "tokens", "loss")]
    law = fit(runs, "forward", resamples=1).law
    found = objective(law, *columns)
    assert found < objective(TRUE, *columns)
    for name in ("E", "A", "a", "B", "b"):
        for factor in (0.999, 1.001):
            assert objective(Law(**{**vars(law), name: getattr(law, name) * factor}), *columns) > found


def test_parameters_are_those_that_multiply() -> None:
    # Width 128: a block has 4 x 128^2 and 8 x 128^2, 12 x 16384 = 196608; two of them and 1000 x 128 outputs.
    assert count_parameters(GPTConfig.from_depth(2, 1000, 64)).scaling == 2 * 196608 + 128000


# Laws recovered


def test_without_noise_the_law_and_its_extrapolation_are_exact() -> None:
    found = fit(simulated(), "forward", resamples=1).law
    assert vars(found) == pytest.approx(vars(TRUE), rel=1e-6)
    held = hold_out(simulated(), "forward", resamples=1)
    assert [(one.parameters, one.tokens) for one in held] == [(3e6, d) for d in BUDGETS]
    for one in held:
        assert one.predicted == pytest.approx(float(TRUE.loss(3e6, one.tokens)), rel=1e-8)
        assert one.found == pytest.approx(one.predicted, rel=1e-8)


def test_the_held_out_size_does_not_take_part_in_its_prediction() -> None:
    runs = simulated()
    before = hold_out(runs, "forward", resamples=1)
    runs.loc[runs["parameters"] == 3e6, "loss"] *= 1.1
    after = hold_out(runs, "forward", resamples=1)
    assert [one.predicted for one in after] == pytest.approx([one.predicted for one in before], rel=1e-9)
    assert [one.found for one in after] == pytest.approx([1.1 * one.found for one in before])


def test_a_law_with_seed_noise_is_recovered() -> None:
    found = fit(simulated(noise=0.001, seeds=5, rng=1), "forward", resamples=40)
    assert found.terms == ("parameters", "tokens")
    assert found.reason == ""
    assert found.law.a == pytest.approx(0.30, abs=0.03)
    assert found.law.b == pytest.approx(0.33, abs=0.06)
    assert abs(found.law.E - 1.8) < 0.1
    assert found.intervals is not None
    assert list(found.intervals) == ["E", "A", "a", "B", "b"]
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(TRUE, name) <= high


def test_intervals_cover_the_truth() -> None:
    studies, covered, as_predicted = 20, dict.fromkeys(("E", "A", "a", "B", "b"), 0), 0
    for study in range(studies):
        runs = simulated(noise=0.003, rng=study)
        intervals = fit(runs, "forward", resamples=40, seed=study).intervals or pytest.fail("seeds give intervals")
        for name, (low, high) in intervals.items():
            covered[name] += low <= getattr(TRUE, name) <= high
        miss = hold_out(runs, "forward", resamples=40, seed=study)[0].miss_interval or pytest.fail("and here too")
        as_predicted += miss[0] <= 0 <= miss[1]
    # 95 % are meant: under 16 of 20 has a chance of 0.3 %
    assert min(covered.values()) >= 16
    assert as_predicted >= 16


def test_intervals_grow_with_the_noise_between_seeds() -> None:
    def width(noise: float) -> float:
        intervals = fit(simulated(noise=noise), "forward", resamples=40).intervals or pytest.fail("seeds")
        return intervals["a"][1] - intervals["a"][0]

    assert width(0.0) < 1e-6
    assert 3 < width(0.004) / width(0.001) < 6


def test_a_diverging_run_does_not_bend_the_law() -> None:
    runs = simulated(noise=0.0005)
    runs.loc[4, "loss"] *= 1.2
    law = fit(runs, "forward", resamples=1).law
    n, d, losses = (runs[name].to_numpy() for name in ("parameters", "tokens", "loss"))
    prediction = law.loss(n, d) / TRUE.loss(n, d)
    assert np.abs(prediction - 1).max() < 0.001
    # Least squares would follow it: its cell's mean alone is 1.2 / 3 = 7 % off.
    squares = np.linalg.lstsq(np.stack([np.ones_like(n), n**-0.3, d**-0.33]).T, losses, rcond=None)[0]
    bent = squares @ np.stack([np.ones_like(n), n**-0.3, d**-0.33]) / TRUE.loss(n, d)
    assert np.abs(bent - 1).max() > 0.01


def test_one_seed_gives_one_result() -> None:
    runs = simulated(noise=0.003)
    one, again = fit(runs, "forward", 20, seed=1), fit(runs.sample(frac=1, random_state=0), "forward", 20, seed=1)
    other = fit(runs, "forward", 20, seed=2)
    assert one.law == again.law == other.law
    assert one.intervals == again.intervals
    assert one.intervals != other.intervals


def test_one_seed_a_cell_has_no_interval() -> None:
    found = fit(simulated(seeds=1), "forward")
    assert found.intervals is None
    assert vars(found.law) == pytest.approx(vars(TRUE), rel=1e-6)
    assert hold_out(simulated(seeds=1), "forward")[0].miss_interval is None
    analysis = analyse(simulated(seeds=1), [])
    assert "no intervals, as no cell has two seeds" in analysis.findings[0]
    assert analysis.table["low"].isna().all()
    assert analysis.more["largest size left out"]["low"].isna().all()


def test_a_cell_with_one_seed_draws_from_the_others() -> None:
    runs = simulated([(n, 1e8) for n in SIZES[:3]], noise=0.003)
    single = runs[(runs["parameters"] == 1e5) | (runs["seed"] == 0)]
    # Three unknowns on three sizes: the law goes through each, and so moves at the largest only if that is redrawn.
    laws = fit(single, "forward", resamples=20).resampled
    assert np.std([float(law.loss(1e6, 1e8)) for law in laws]) > 0.002


# What the design tells apart


@pytest.mark.parametrize(
    ("cells", "terms", "reason"),
    [
        (GRID, ("parameters", "tokens"), ""),
        ([(n, c / n) for n in SIZES for c in (1e13, 4e13, 16e13)], ("parameters", "tokens"), ""),  # IsoFLOP
        ([(n, 1e8) for n in SIZES], ("parameters",), "one token budget"),
        ([(1e6, d) for d in BUDGETS], ("tokens",), "one size"),
        ([(n, 20 * n) for n in SIZES], ("parameters",), "follows from the size"),
        ([(n, 3e3 * n**0.5) for n in SIZES], ("parameters",), "follows from the size"),
        ([(n, 20 * n * (1.03 if i % 2 else 0.97)) for i, n in enumerate(SIZES)], ("parameters",), "follows from"),
    ],
)
def test_what_the_design_identifies_is_fitted(
    cells: list[tuple[float, float]], terms: tuple[str, ...], reason: str
) -> None:
    found = fit(simulated(cells, noise=0.001), "forward", resamples=5)
    assert found.terms == terms
    assert reason in found.reason
    assert (found.reason == "") == (len(terms) == 2)


def test_a_fixed_ratio_gives_the_exponent_of_growing_both() -> None:
    law = Law(E=1.8, A=40.0, a=0.3, B=120.0, b=0.3)
    found = fit(simulated([(n, 20 * n) for n in SIZES], law), "forward", resamples=1).law
    # 40 / N^0.3 + 120 / (20 N)^0.3 = (40 + 120 / 20^0.3) / N^0.3
    assert (found.E, found.A, found.a) == pytest.approx((1.8, 40 + 120 / 20**0.3, 0.3), rel=1e-6)
    assert (found.B, found.b) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([(1e5, 1e8), (1e6, 1e8)], "forward has 2 sizes and 1 token budget: too few .*train 3 sizes or more.*depth"),
        ([(n, d) for n in (1e5, 1e6) for d in BUDGETS], "2 sizes and 3 token budgets: too few"),
        ([(n, d) for n in SIZES for d in (1e7, 1e8)], "4 sizes and 2 token budgets, .*each at the same 3 budgets"),
    ],
)
def test_too_few_sizes_are_refused_with_the_grid_that_would_do(cells: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        fit(simulated(cells), "forward")
    assert "\n" not in str(refusal.value)


def test_three_sizes_leave_none_to_hold_out() -> None:
    runs = simulated([(n, 1e8) for n in SIZES[:3]])
    assert fit(runs, "forward", resamples=1).terms == ("parameters",)
    with pytest.raises(UserError, match="train 4 sizes or more"):
        hold_out(runs, "forward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": -1.0}, "loss of run 'forward-100000-1e\\+07-0' is -1.0, not a positive number"),
        ({"loss": math.nan}, "is nan, not a positive"),
        ({"tokens": math.inf}, "tokens of run .* is inf"),
        (
            {"seed": 1},
            "runs forward-100000-1e\\+07-0, forward-100000-1e\\+07-1 have one direction, size, budget and seed",
        ),
    ],
)
def test_bad_runs_are_named(change: dict[str, Any], message: str) -> None:
    runs = simulated()
    for name, value in change.items():
        runs.loc[0, name] = value
    with pytest.raises(UserError, match=message):
        fit(runs, "forward")


def test_bad_tables_are_named() -> None:
    with pytest.raises(UserError, match=r"lack column 'parameters' \(did you mean 'parameter'\?\)"):
        fit(simulated().rename(columns={"parameters": "parameter"}), "forward")
    with pytest.raises(UserError, match="the runs' row 1 has no seed"):
        fit(simulated().assign(seed=None), "forward")
    with pytest.raises(UserError, match="the runs' row 3 has no direction"):
        fit(simulated().assign(direction=lambda runs: runs["direction"].where(runs.index != 2)), "forward")
    with pytest.raises(UserError, match="no runs to fit"):
        analyse(simulated().head(0), [])
    with pytest.raises(UserError, match=r"direction 'forwards' \(did you mean 'forward'\?\)"):
        fit(simulated(), "forwards")
    with pytest.raises(UserError, match="resamples is 0"):
        fit(simulated(), "forward", resamples=0)


def test_of_a_grid_whose_bidirectional_runs_are_also_trained_for_twice_the_steps(tmp_path: Path) -> None:
    """Pairs at equal tokens per direction are of no size of their own, and stay out."""
    cells = []
    for depth in (1, 2, 3):
        for direction, times in (("forward", 1), ("backward", 1), ("bidirectional", 1), ("bidirectional", 2)):
            for seed in range(3):
                folder = make_cell(tmp_path, direction, seed=seed, depth=depth, steps=STEPS * depth * times)
                nll = [
                    30 + 5 / depth + (direction == "backward") * depth + 0.01 * seed * window for window in range(24)
                ]
                readings = ["forward", "backward"] if direction == "bidirectional" else [direction]
                cells.append(finish(folder, dict.fromkeys(readings, nll)))
    found = scaling(cells)
    assert {"forward", "backward", "bidirectional"} <= set(found.table["direction"])
    assert not any(PER_DIRECTION in line for line in found.findings)


@pytest.mark.parametrize("setting", ["model.sequence_length", "data", "tokenizer", "batch_tokens"])
def test_runs_that_differ_in_more_than_size_and_steps_are_refused(tmp_path: Path, setting: str) -> None:
    cells = [
        finish(make_cell(tmp_path, direction, depth=depth, **{setting: value}), {direction: [30.0] * 24})
        for direction in ("forward", "backward")
        for depth in (1, 2, 3)
        for value in ("one", "other")
    ]
    with pytest.raises(UserError, match=rf"^analyze scaling: the runs differ in {setting}, not in size alone: name"):
        scaling(cells)
    assert scaling(cells[::2]).findings


# The gap by size


def test_the_slope_by_hand() -> None:
    # N doubles: x = 0, 1, 2. Means 0.01 0.02 0.06, three seeds each: slope (0.06 - 0.01) / 2 = 0.025.
    gaps = [a_gap(2, [0.02, 0.03, 0.01]), a_gap(1, [0.01, 0.00, 0.02]), a_gap(4, [0.06, 0.05, 0.07])]
    (found,) = gap_by_size(gaps)
    assert found.sizes == [1, 2, 4]
    assert found.slope == pytest.approx(0.025)
    # c = -1/2 0 1/2, s = 0.01: variance 2 x 0.25 x 0.0001 / 3, degrees of freedom 2 + 2; t_{0.975, 4} = 2.776445.
    half = 2.776445 * math.sqrt(0.5 * 0.0001 / 3)
    assert found.interval == pytest.approx((0.025 - half, 0.025 + half), abs=1e-7)
    # The line through the mean 0.03 at x = 1.
    assert found.fitted == pytest.approx((0.005, 0.055))
    assert found.trend == "grows"
    assert "The gap forward → backward grows with size: +0.0250 nats per token for each doubling" in found.sentence


def test_sizes_weigh_by_their_seeds() -> None:
    # Weights 3, 3, 6 at x = 0, 1, 2: mean x 1.25, sum n (x - x)^2 = 8.25; sum n (x - x) g = 6 x 0.75 x 0.01.
    gaps = [a_gap(1, [0.0, 0.1, -0.1]), a_gap(2, [0.0, 0.1, -0.1]), a_gap(4, [0.01, 0.11, -0.09] * 2)]
    assert gap_by_size(gaps)[0].slope == pytest.approx(0.045 / 8.25)


@pytest.mark.parametrize(
    ("means", "trend"),
    [
        ((0.01, 0.03), "grows"),
        ((0.03, 0.01), "shrinks"),
        ((-0.01, -0.03), "grows"),
        ((-0.03, -0.01), "shrinks"),
        ((-0.01, 0.01), "changes sign"),
        ((0.0200, 0.0201), "cannot be told"),
    ],
)
def test_the_trend_is_of_the_gap_whatever_its_sign(means: tuple[float, float], trend: str) -> None:
    gaps = [a_gap(10**k, [mean - 0.001, mean, mean + 0.001]) for k, mean in enumerate(means, start=5)]
    assert gap_by_size(gaps)[0].trend == trend


def test_a_sign_changes_only_if_both_ends_are_sure() -> None:
    """The slope is clear, and the line begins at -0.001; its interval there holds zero with the wide spread alone."""

    def trend(spread: float) -> GapTrend:
        means = (-0.001, 0.05, 0.1)
        return gap_by_size([a_gap(2**k, [m - spread, m, m + spread]) for k, m in enumerate(means)])[0]

    assert trend(1e-5).trend == "changes sign"
    assert "changes sign: forward is ahead at the largest size" in trend(1e-5).sentence
    assert trend(0.01).trend == "moves"
    assert "The gap forward → backward moves with size in favour of forward: +0.05" in trend(0.01).sentence


def test_a_size_with_two_seeds_does_not_count() -> None:
    gaps = [a_gap(1, [0.01, 0.02, 0.03]), a_gap(2, [0.01, 0.02])]
    (found,) = gap_by_size(gaps)
    assert (found.trend, found.slope, found.interval) == ("cannot be told", None, None)
    assert "it needs two sizes or more with 3 paired seeds each" in found.sentence


def test_a_size_whose_rate_under_three_seeds_chose_does_not_count() -> None:
    gaps = [a_gap(n, [0.01 * n, 0.02 * n, 0.03 * n]) for n in (1, 2)]
    assert gap_by_size(gaps)[0].slope is not None
    (found,) = gap_by_size([gaps[0], replace(gaps[1], choosing_seeds=1)])
    assert (found.trend, found.slope) == ("cannot be told", None)
    assert found.sentence.endswith("and learning rates that 3 seeds chose.")


def test_trends_of_several_pairs_are_read_together() -> None:
    # Alone its p is under 0.05; with a second pair, Holm asks for 0.025.
    sure = [a_gap(1, [0.01, 0.02, 0.03]), a_gap(2, [0.033, 0.043, 0.053])]
    (alone,) = gap_by_size(sure)
    assert alone.p is not None
    assert 0.025 < alone.p < 0.05
    assert alone.trend == "grows"
    second = [a_gap(n, [0.0, 0.01, -0.01], b="bidirectional") for n in (1, 2)]
    assert [one.trend for one in gap_by_size(sure + second)] == ["cannot be told", "cannot be told"]


def test_a_gap_that_stays_is_seldom_said_to_change() -> None:
    draw = np.random.default_rng(0)
    spreads = (0.02, 0.01, 0.005, 0.0025)  # small models differ more from seed to seed
    said = 0
    for _ in range(400):
        gaps = [a_gap(10**k, list(0.02 + s * draw.normal(size=5))) for k, s in enumerate(spreads, start=5)]
        said += gap_by_size(gaps)[0].trend != "cannot be told"
    assert said <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_sizes_need_their_parameters() -> None:
    with pytest.raises(UserError, match="size 'd4' has no number of parameters"):
        gap_by_size([a_gap("d4", [0.1, 0.2, 0.3])])


# All of it


def test_sentences_parameters_and_chart() -> None:
    law = Law(E=1.82, A=40.0, a=0.30, B=120.0, b=0.33)
    runs = pd.concat([simulated(law=law, noise=0.001, direction="backward", rng=1), simulated(noise=0.001)])
    runs["size"] = [f"N{n:g}" for n in runs["parameters"]]
    gaps = [a_gap(f"N{n:g}", [0.01 * k, 0.01 * k + 0.002, 0.01 * k + 0.001]) for k, n in enumerate(SIZES, start=1)]
    found = analyse(runs, gaps, ["a run was left out"], resamples=20)
    sentences, frame = found.findings, found.table
    assert found.notes == ["a run was left out"]
    assert sentences[0].startswith("forward: L = 1.")
    assert sentences[1].startswith("backward: L = 1.")
    assert sum("largest size left out (N = 3M" in line for line in sentences) == 2 * len(BUDGETS)
    assert any("The gap forward → backward grows with size" in line for line in sentences)
    assert "without the token embedding" in sentences[-1]
    assert all("\n" not in line and line.endswith(".") for line in sentences)
    assert list(frame.columns) == ["direction", "parameter", "value", "low", "high", "runs"]
    assert list(frame["parameter"]) == ["E", "A", "a", "B", "b"] * 2
    assert (frame["low"] <= frame["high"]).all()
    held = found.more["largest size left out"]
    assert held.groupby("direction", sort=False)["tokens"].apply(list).to_dict() == {
        "forward": sorted(BUDGETS),
        "backward": sorted(BUDGETS),
    }
    assert (held["miss"] == held["found"] - held["predicted"]).all()
    assert ((held["low"] < held["predicted"]) & (held["predicted"] < held["high"])).all()
    over_size = found.more["gap over size"]
    assert over_size["parameters"].tolist() == pytest.approx(SIZES)
    assert over_size["nats"].tolist() == pytest.approx([one.gap_nats for one in gaps])
    assert (over_size["gap"] == "forward → backward").all()
    law, trend = found.chart.to_dict()["vconcat"]
    assert len(law["layer"]) == 5
    assert {layer["encoding"]["x"]["scale"]["type"] for layer in law["layer"]} == {"log"}
    assert trend["facet"]["row"]["field"] == "gap"
    only = analyse(runs, gaps[:1], resamples=2)  # one size has no trend to draw
    assert len(only.chart.to_dict()["layer"]) == 5
    assert len(only.more["gap over size"]) == 1


def test_a_prediction_by_a_law_without_freedom_is_not_judged() -> None:
    """Four sizes at one budget: the three that are left fix E, A and a."""
    exact = analyse(simulated([(n, 1e8) for n in SIZES[:4]], noise=0.001), [], resamples=10).findings
    assert any("too narrow to judge it by" in line for line in exact)
    assert not any("as predicted" in line or "than predicted" in line for line in exact)
    free = analyse(simulated([(n, 1e8) for n in (*SIZES, 1e7)], noise=0.001), [], resamples=10).findings
    assert not any("too narrow" in line for line in free)


def test_a_direction_with_too_few_sizes_does_not_silence_the_other() -> None:
    few = simulated([(1e5, 1e8), (1e6, 1e8)], direction="backward")
    found = analyse(pd.concat([simulated(), few]), [], resamples=2)
    sentences = found.findings
    assert set(found.table["direction"]) == {"forward"}
    assert set(found.more) == {"largest size left out"}
    assert any(line.startswith("backward has 2 sizes and 1 token budget: too few") for line in sentences)
    with pytest.raises(UserError, match="backward has 2 sizes"):
        analyse(few, [])


def test_points_keep_their_distance_from_the_law_in_the_chart() -> None:
    drawn = analyse(simulated(noise=0.0), [], resamples=2).chart.to_dict()
    points = next(rows for rows in drawn["datasets"].values() if "run" in rows[0])
    # All runs lie on the law, so at the largest budget those of one size lie on one spot.
    for n in SIZES:
        shown = [row["loss"] for row in points if row["run"].startswith(f"forward-{n:g}-")]
        assert shown == pytest.approx([float(TRUE.loss(n, max(BUDGETS)))] * len(shown), rel=1e-6)


@pytest.mark.parametrize("cells", [[(n, 1e8) for n in SIZES[:3]], [(1e6, d) for d in BUDGETS]])
def test_a_chart_without_a_prediction_is_drawn(cells: list[tuple[float, float]]) -> None:
    found = analyse(simulated(cells, noise=0.001), [], resamples=2)
    assert any("cannot be predicted" in line for line in found.findings)
    assert found.chart.to_dict()["layer"]
    assert found.more == {}


def test_the_chart_draws_without_intervals() -> None:
    points = pd.DataFrame({"direction": "forward", "run": ["r"], "x": [1e6], "loss": [3.0]})
    empty = pd.DataFrame(columns=["direction", "x", "loss", "low", "high"], dtype=float)
    curves = pd.DataFrame(
        {"direction": "forward", "x": [1e6, 2e6], "loss": [3.0, 2.0], "low": math.nan, "high": math.nan}
    )
    assert scaling_chart(law_chart(points, curves, empty, "parameters"), None, "title").to_dict()
