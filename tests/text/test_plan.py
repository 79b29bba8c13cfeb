"""The order of rows: every row once an epoch, the same for any number of workers, and from any step on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.text.plan import MixturePlan, RowPlan, counter_hash, permute, splitmix64

law = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**31 - 1)
plans = st.builds(RowPlan, rows=st.integers(1, 300), rows_per_step=st.sampled_from([4, 8, 12, 40]), seed=seeds)


mixtures = st.builds(
    lambda sources, per_step, seed: MixturePlan(*(tuple(part) for part in zip(*sources, strict=True)), per_step, seed),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 150)), min_size=1, max_size=4),
    st.sampled_from([4, 8, 12, 40]),
    seeds,
)


def read(
    plan: RowPlan | MixturePlan, first: int, last: int, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(row, epoch) of steps first..last-1, one after the other."""
    parts = [plan.at(step, rank, world) for step in range(first, last)]
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([epochs for _, epochs in parts])


def test_splitmix_is_the_published_generator() -> None:
    # first outputs of the reference implementation (Vigna, splitmix64.c) for the seeds 0 and 1234567
    assert splitmix64(np.array([0], dtype=np.uint64))[0] == 0xE220A8397B1DCDAF
    assert splitmix64(np.array([1234567], dtype=np.uint64))[0] == 6457827717110365317


@law
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), seeds, st.integers(0, 9))
def test_a_hash_of_counters_is_taken_element_by_element(counters: list[int], seed: int, epoch: int) -> None:
    together = counter_hash(seed, epoch, np.array(counters))
    assert together.tolist() == [int(counter_hash(seed, epoch, counter)) for counter in counters]


def test_a_hash_depends_on_each_counter_and_their_order() -> None:
    hashes = {int(counter_hash(a, b, c)) for a in range(10) for b in range(10) for c in range(10)}
    assert len(hashes) == 1000


@law
@given(st.integers(1, 3000), seeds, st.integers(0, 100))
def test_a_permutation_takes_every_value_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@law
@given(st.integers(2**20, 2**60), seeds)
def test_a_permutation_of_a_huge_range_is_computed_where_it_is_asked_for(size: int, seed: int) -> None:
    asked = np.array([size * part // 500 for part in range(500)])
    found = permute(asked, size, seed, 0)
    assert len(np.unique(found)) == len(asked)
    assert (found >= 0).all()
    assert (found < size).all()
    assert permute(asked[7:8], size, seed, 0) == found[7]


def test_a_permutation_mixes() -> None:
    size = 4096
    for seed in range(5):
        moved = permute(np.arange(size), size, seed, 0)
        # |a - b| of two uniform draws has mean size/3; neighbours must not stay neighbours
        assert abs(np.abs(moved - np.arange(size)).mean() / size - 1 / 3) < 0.03
        assert (np.abs(np.diff(moved)) == 1).mean() < 0.01


@law
@given(plans, st.integers(1, 4))
def test_each_epoch_visits_every_row_once(plan: RowPlan, epochs: int) -> None:
    steps = -(-plan.rows * epochs // plan.rows_per_step)
    rows, of_epoch = read(plan, 0, steps)
    assert np.array_equal(of_epoch, np.arange(len(rows)) // plan.rows)
    for epoch in range(epochs):
        assert np.array_equal(np.sort(rows[of_epoch == epoch]), np.arange(plan.rows))


@law
@given(mixtures, st.integers(1, 4))
def test_each_epoch_of_a_mixture_draws_what_each_source_owes(plan: MixturePlan, epochs: int) -> None:
    """And a source is read evenly: no row comes again before all others of its source did."""
    size = sum(plan.drawn)
    rows, of_source = read(plan, 0, -(-size * epochs // plan.rows_per_step))
    ends = np.cumsum(plan.rows)
    sources = np.searchsorted(ends, rows, side="right")
    for epoch in range(epochs):
        here = slice(epoch * size, (epoch + 1) * size)
        assert np.bincount(sources[here], minlength=len(ends)).tolist() == list(plan.drawn)
    for source, count in enumerate(plan.rows):
        read_here = rows[: epochs * size][sources[: epochs * size] == source] - (ends[source] - count)
        epoch_here = of_source[: epochs * size][sources[: epochs * size] == source]
        times = np.bincount(read_here, minlength=count)
        assert times.max() - times.min() <= 1
        pairs = list(zip(read_here.tolist(), epoch_here.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)  # what depends on the epoch differs each time


@law
@given(st.one_of(plans, mixtures), st.integers(0, 10**9), st.sampled_from([2, 4]))
def test_workers_share_one_order(plan: RowPlan | MixturePlan, step: int, world: int) -> None:
    shares = [plan.at(step, rank, world) for rank in range(world)]
    for part, whole in enumerate(plan.at(step)):
        assert np.array_equal(np.concatenate([share[part] for share in shares]), whole)


@law
@given(st.one_of(plans, mixtures), st.integers(0, 50), st.integers(1, 5))
def test_a_plan_starts_at_any_step(plan: RowPlan | MixturePlan, first: int, steps: int) -> None:
    rows, epochs = read(plan, 0, first + steps)
    later_rows, later_epochs = read(replace(plan), first, first + steps)
    assert np.array_equal(later_rows, rows[first * plan.rows_per_step :])
    assert np.array_equal(later_epochs, epochs[first * plan.rows_per_step :])


def test_the_order_does_not_depend_on_how_many_rows_make_a_step() -> None:
    assert np.array_equal(read(RowPlan(100, 4, 0), 0, 60)[0], read(RowPlan(100, 12, 0), 0, 20)[0])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(read(RowPlan(50, 50, seed), epoch, epoch + 1)[0]) for seed in range(10) for epoch in range(5)}
    assert len(orders) == 50


def test_an_index_outside_of_the_range_is_refused() -> None:
    for index in (-1, 16, 2**62):
        with pytest.raises(AssertionError):
            permute(np.array([0, index]), 16, 0)


def test_the_order_stays_what_it_was() -> None:
    # a run that resumes after an update of ours must go on with the rows that it has not read
    assert RowPlan(10, 10, 0).at(0)[0].tolist() == [8, 7, 6, 3, 5, 4, 9, 1, 0, 2]
    rows, epochs = RowPlan(1000, 6, 3).at(200)
    assert rows.tolist() == [382, 592, 93, 341, 926, 189]
    assert epochs.tolist() == [1] * 6
    assert RowPlan(10, 4, 7).at(2)[1].tolist() == [0, 0, 1, 1]
    mixture = MixturePlan((3, 5), (6, 2), 8, 3)
    assert [mixture.at(step)[0].tolist() for step in range(2)] == [[0, 4, 2, 1, 0, 2, 3, 1], [5, 7, 0, 2, 2, 1, 0, 1]]
