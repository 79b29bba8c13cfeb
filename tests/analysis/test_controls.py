"""Controls pass where they must and fail where they must not, and a report shows them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bwlm.analysis.report.controls import above_floor, judge_control
from bwlm.analysis.report.study import write_grid_report
from bwlm.analysis.runs.findings import find
from bwlm.analysis.runs.rates import BestRate
from bwlm.config import NULL, PRODUCTS
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import write_cells
from bwlm.stats.gaps import Gap
from bwlm.text.controls import null_floor, null_nll
from bwlm.text.packing import Manifest, PackedRows, PackedSplit, ShardCounts, cut, write_rows
from tests.analysis.storage import finish, make_cell

GAP = Gap(
    size="d1", a="forward", b="backward", seeds=[0, 1, 2], dropped_seeds={}, documents=20, per_seed=np.zeros(3),
    gap_nats=0.001, gap_bpb=0.001, gap_percent=0.1, bootstrap=(-0.001, 0.002), seed_interval=(-0.003, 0.005),
    noise_floor=0.002, p=0.4, p_adjusted=0.4, verdict="no difference seen",
)  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "study", "passed", "why"),
    [
        ((-0.003, 0.005), 0.0041, True, "half its width 0.0040 is below the study's 0.0041"),
        ((-0.003, 0.005), -0.0041, True, "below the study's 0.0041"),
        ((-0.003, 0.005), 0.004, False, "too coarse: half its width, 0.0040, is not below"),
        ((0.001, 0.005), 0.1, False, "a gap was found where there is none"),
        ((-0.005, -0.001), None, False, "a gap was found where there is none"),
        ((-0.003, 0.005), None, None, "covers zero, half its width is 0.0040: no study's gap to compare"),
        (None, 0.1, False, "one seed gives no interval"),
    ],
)
def test_the_null_control_needs_zero_inside_and_a_finer_width_than_the_study(
    interval: tuple[float, float] | None, study: float | None, passed: bool | None, why: str
) -> None:
    [control] = judge_control(NULL, [replace(GAP, seed_interval=interval)], study, {"d1": 0.1})
    assert (control.name, control.passed) == ("null", passed)
    assert why in control.why


@pytest.mark.parametrize("above", [0.11, 1.03, math.inf])
def test_the_null_control_says_nothing_of_models_that_have_not_learned_it(above: float) -> None:
    found = judge_control(NULL, [GAP, replace(GAP, size="d2")], 0.1, {"d1": above, "d2": 0.01})
    assert [control.passed for control in found] == [False, True]
    assert f"{above:.2f} bits per symbol above the known entropy, more than 0.1" in found[0].why


@pytest.mark.parametrize(
    ("gap", "verdict", "passed"),
    [(0.1, "different", True), (-0.1, "different", False), (0.1, "no difference seen", False)],
)
def test_the_positive_control_must_be_found_and_in_its_direction(gap: float, verdict: str, passed: bool) -> None:
    [control] = judge_control(PRODUCTS, [replace(GAP, gap_nats=gap, verdict=verdict)], 0.01, {})
    assert (control.name, control.passed) == ("positive", passed)


def test_permuted_must_cost_more_than_forward_and_is_not_held_against_backward() -> None:
    pairs = [replace(GAP, a=a, b="permuted", gap_nats=0.5, verdict="different") for a in ("forward", "backward")]
    for source in (NULL, PRODUCTS):
        [control] = judge_control(source, pairs, 0.01, {})
        assert (control.name, control.gap.a, control.passed) == ("permuted", "forward", True)


def losses(mean: float, seed: int) -> list[float]:
    text = np.random.default_rng(7).uniform(20, 40, 40)
    return list(text + mean + np.random.default_rng(50 + seed).normal(0, 0.02, 40))


def cells(storage: Path, source: str, backward: float, **identity: int) -> list[ExperimentFolder]:
    """Three seeds of each direction; backward is worse by so many nats in each window of ten tokens.

    On the null corpus both are 0.1 nats a window above what is known to be the least.
    """
    least = 10 * null_floor(np.full(40, 10)) - np.mean(losses(0.0, 0)) + 0.1 if source == NULL else 0.0
    return [
        finish(
            make_cell(storage, direction, seed, source=source, **identity),
            {direction: losses(least + mean, seed + 10 * (mean > 0))},
        )
        for direction, mean in (("forward", 0.0), ("backward", backward))
        for seed in range(3)
    ]


def test_a_report_shows_the_controls_of_its_storage(tmp_path: Path) -> None:
    study = cells(tmp_path, "somewhere", 1.0)
    write_cells(tmp_path, "g", [folder.id for folder in study])

    def report() -> str:
        return write_grid_report(tmp_path, "g").files[0].read_text()

    assert "## Controls\n\nNot run: a reversible corpus (builtin:null), on which" in report()
    null = cells(tmp_path, NULL, 0.0)
    text = report()
    assert text.count("| passed |") == 1
    assert "\nNot run: a one-way corpus (builtin:products), on which a gap must be found. With this storage" in text
    cells(tmp_path, PRODUCTS, 2.0)
    text = report()
    assert "Not run" not in text
    assert text.count("| passed |") == 2
    assert "is below the study's 0.1" in text
    found = above_floor(null, find(null).best)
    assert found["bits"].tolist() == pytest.approx([0.01 / math.log(2)] * 6, abs=0.002)
    assert "- above the known entropy of the null corpus, in bits per symbol: d1 backward " in text


def test_how_far_a_null_control_is_counts_the_runs_that_are_compared(tmp_path: Path) -> None:
    """Another rate or size that has not learned it, or has, says nothing of this one."""
    null = cells(tmp_path, NULL, 0.0)
    poor = [
        finish(make_cell(tmp_path, direction, seed, source=NULL, **other), {direction: [60.0] * 40})
        for direction in ("forward", "backward")
        for seed in range(3)
        for other in ({"lr": 9.0}, {"depth": 2})
    ]
    found = above_floor([*null, *poor], find([*null, *poor]).best)
    worst = found.groupby("size")["bits"].max()
    assert worst["d1"] < 0.02
    assert worst["d2"] > 1


def test_the_report_of_the_controls_themselves_has_no_gap_to_hold_them_against(tmp_path: Path) -> None:
    null, positive = cells(tmp_path, NULL, 0.0), cells(tmp_path, PRODUCTS, 2.0, tokenizer=2)
    write_cells(tmp_path, "controls", [folder.id for folder in [*null, *positive]])
    text = write_grid_report(tmp_path, "controls").files[0].read_text()
    assert text.count("forward → backward: **different**") == 1  # the positive control's own gap
    assert "no study's gap to compare" in text
    assert "| no study |" in text
    assert "**failed**" not in text


def test_a_gap_that_no_verdict_claims_is_none_to_be_finer_than(tmp_path: Path) -> None:
    study = cells(tmp_path, "somewhere", 0.0)
    write_cells(tmp_path, "g", [folder.id for folder in study])
    cells(tmp_path, NULL, 0.0)
    text = write_grid_report(tmp_path, "g").files[0].read_text()
    assert "no difference seen" in text
    assert "no study's gap to compare" in text


def test_controls_that_failed_are_told_and_those_of_two_grids_stand_side_by_side(tmp_path: Path) -> None:
    study = cells(tmp_path, "somewhere", 1.0)
    write_cells(tmp_path, "g", [folder.id for folder in study])
    null = cells(tmp_path, NULL, 0.0)
    for folder in null[3:]:
        folder.write_status(Status("failed", "loss nan at step 3"))
    text = write_grid_report(tmp_path, "g").files[0].read_text()
    assert "Not run: a reversible" not in text
    assert "- builtin:null: no pair was compared" in text
    assert f"- {null[3].id}: failed (loss nan at step 3)" in text
    for folder in null[3:]:
        folder.write_status(Status("finished", "", folder.config().steps))
    for folder in cells(tmp_path, NULL, 0.0, batch_tokens=512):
        folder.reconfigure(replace(folder.config(), grid="again"))
    text = write_grid_report(tmp_path, "g").files[0].read_text()
    assert text.count("| null | again | d1 ") == 1
    assert text.count("| null | ") == 2
    assert "other code" not in text
    cells(tmp_path, PRODUCTS, 2.0, code=2)
    assert (
        "- builtin:products: trained with other code than the study"
        in write_grid_report(tmp_path, "g").files[0].read_text()
    )


def test_the_floor_is_what_the_true_chain_pays_for_the_same_windows(tmp_path: Path) -> None:
    width, texts = 12, ["abca", "bcabcabcab", "Zz/+" * 4]
    documents = [(i, np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)) for i, text in enumerate(texts)]
    counts = ShardCounts("0.arrow")
    (tmp_path / "corpus" / "validation").mkdir(parents=True)
    write_rows(tmp_path / "corpus" / "validation" / "0.arrow", cut(documents, width), 264, counts)
    Manifest(width, 264, "", PackedSplit.from_shards([]), PackedSplit.from_shards([counts.finish()])).write(
        tmp_path / "corpus"
    )
    rows = PackedRows(tmp_path / "corpus", "validation")
    assert len(rows) > 2

    run = make_cell(tmp_path / "runs", "forward", source=NULL)
    run.reconfigure(replace(run.config(), corpus=str(tmp_path / "corpus")))
    finish(run, {"forward": [30.0, 31.0]})  # of the first two windows, ten tokens in each by its own account
    first_two = rows.take(np.arange(2))
    segments = np.split(first_two.tokens, np.cumsum(first_two.lengths)[:-1])
    paid = sum(null_nll(bytes(part.tolist()).decode()) for part in segments) / len(first_two.tokens)
    [bits] = above_floor([run], [BestRate("d1", "forward", 1.0, 1, 1, 1.0, None)])["bits"]
    assert bits == pytest.approx((61 / 20 - paid) / math.log(2))
