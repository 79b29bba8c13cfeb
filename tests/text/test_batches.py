"""Directed batches: what the predecessor's loader got wrong, and that every direction reads the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bwlm.config import Reversal
from bwlm.directions import DIRECTIONS
from bwlm.text.batches import Batch, DirectedPlan, join, open_rows, row_plan
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.direction import IGNORED, SpecialIds, read_row
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared

ROWS, SEED = 8, 3


def plan_of(prepared: Prepared, direction: str, seed: int = SEED, rank: int = 0, world: int = 1) -> DirectedPlan:
    folder = str(prepared.folder)
    rows = RowPlan(len(open_rows(folder, "train")), ROWS, seed)
    return DirectedPlan(folder, direction, SpecialIds.from_tokenizer(prepared.tokenizer), rows, rank, world)


def whole_rows(batch: Batch, special: SpecialIds) -> np.ndarray:
    """[R, T+1]: the inputs and the last target, or padding where there is none."""
    last = batch["targets"][:, -1:]
    return np.concatenate([batch["inputs"], np.where(last == IGNORED, special.pad, last)], axis=1)


def read(plan: DirectedPlan, batch: Batch) -> list[list[list[int]]]:
    """Text tokens of each segment of each row, in reading order, from the ids alone."""
    width = batch["inputs"].shape[1]
    rows = whole_rows(batch, plan.special)
    return [[s.tolist() for s in read_row(row, plan.direction, plan.special, width)] for row in rows]


def packed(plan: DirectedPlan, step: int) -> list[list[list[int]]]:
    rows = open_rows(plan.folder, "train").take(plan.plan.at(step, plan.rank, plan.world)[0])
    content: list[list[list[int]]] = [[] for _ in range(rows.count)]
    for row, tokens in zip(rows.row, np.split(rows.tokens, np.cumsum(rows.lengths)[:-1]), strict=True):
        content[row].append(tokens.tolist())
    return content


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_row_and_segment_starts_with_bos(prepared: Prepared, direction: str) -> None:
    plan = plan_of(prepared, direction)
    closed = 0
    for step, batch in enumerate(plan.batches(0, 40)):
        is_bos = batch["inputs"] == plan.special.bos
        assert is_bos[:, 0].all()
        # a segment's ordinal counts up exactly where its BOS stands
        opens = np.diff(batch["segments"], axis=1, prepend=-1) == 1
        assert is_bos[opens].all()
        assert opens.sum() == sum(map(len, packed(plan, step)))
        # another BOS closes its row: nothing is predicted from it on
        for row, at in np.argwhere(is_bos & ~opens):
            assert (batch["targets"][row, at:] == IGNORED).all()
            closed += 1
    assert closed


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_token_crosses_a_segment_and_every_direction_reads_the_same_text(prepared: Prepared, direction: str) -> None:
    plan = plan_of(prepared, direction)
    for step, batch in enumerate(plan.batches(0, 10)):
        assert read(plan, batch) == packed(plan, step)


def test_directions_differ_in_order_alone(prepared: Prepared) -> None:
    special = SpecialIds.from_tokenizer(prepared.tokenizer)

    def text_of(inputs: np.ndarray) -> np.ndarray:
        """The tokens of each row, sorted; which BOS closes a row is another one in each direction."""
        return np.sort(np.where(inputs == special.bos, special.pad, inputs), axis=1)

    batches = {name: plan_of(prepared, name).batch(4)["inputs"] for name in DIRECTIONS}
    for name in ("backward", "permuted"):
        assert not np.array_equal(batches[name], batches["forward"])
        assert np.array_equal(text_of(batches[name]), text_of(batches["forward"]))


def test_every_bidirectional_segment_has_its_own_marker(prepared: Prepared) -> None:
    plan = plan_of(prepared, "bidirectional")
    mixed_rows = 0
    for batch in plan.batches(0, 10):
        rows = whole_rows(batch, plan.special)
        row, start = np.nonzero(np.diff(batch["segments"], axis=1, prepend=-1) == 1)
        markers = rows[row, start + 1]
        assert np.isin(markers, [plan.special.forward, plan.special.backward]).all()
        assert np.isin(rows, [plan.special.forward, plan.special.backward]).sum() == len(row)
        assert len(set(markers.tolist())) == 2
        mixed_rows += sum(len(set(markers[row == one].tolist())) == 2 for one in range(ROWS))
        assert not np.isin(batch["targets"], [plan.special.forward, plan.special.backward]).any()
    assert mixed_rows > 0


@pytest.mark.parametrize("reversal", ["whole", "turns"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_segments_stand_in_reverse_order_only_in_rows_that_are_read_backward_as_a_whole(
    mixture_for: Callable[[str], Prepared], direction: str, reversal: Reversal
) -> None:
    mixture = mixture_for("mid")
    turns = TurnLayout(TurnIds.from_tokenizer(mixture.tokenizer), reversal, supervised=False)
    rows_of_corpus, special = row_plan(str(mixture.folder), ROWS, SEED), SpecialIds.from_tokenizer(mixture.tokenizer)
    plan = DirectedPlan(str(mixture.folder), direction, special, rows_of_corpus, turns=turns)
    rows = plan.rows(0)
    steps = np.diff(plan.lay_out(rows).starts)[rows.row[1:] == rows.row[:-1]]
    assert len(steps)
    is_reversed = direction == "backward" and reversal == "whole"
    assert (steps < 0).all() if is_reversed else (steps > 0).all()


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_batches_start_at_any_step(prepared: Prepared, direction: str) -> None:
    whole = list(plan_of(prepared, direction).batches(0, 9))
    later = list(plan_of(prepared, direction).batches(6, 9))
    for one, other in zip(whole[6:], later, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("direction", ["backward", "bidirectional"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_what_one_reads(prepared: Prepared, direction: str, world: int) -> None:
    for step in (0, 7):
        whole = plan_of(prepared, direction).batch(step)
        shares = [plan_of(prepared, direction, rank=rank, world=world).batch(step) for rank in range(world)]
        together = join(shares)
        assert shares[0]["inputs"].shape == (ROWS // world, 64)
        assert all(np.array_equal(together[name], whole[name]) for name in whole)


def test_a_batch_is_three_arrays_of_one_shape(prepared: Prepared) -> None:
    for direction in DIRECTIONS:
        batch = plan_of(prepared, direction).batch(0)
        assert list(batch) == ["inputs", "targets", "segments"]
        for array in batch.values():
            assert array.shape == (ROWS, 64)
            assert array.dtype == np.int32
        shifted = batch["targets"][:, :-1]
        scored = shifted != IGNORED
        assert np.array_equal(shifted[scored], batch["inputs"][:, 1:][scored])


def test_a_row_read_again_in_another_epoch_has_the_same_text_and_other_coins(prepared: Prepared) -> None:
    plan = plan_of(prepared, "bidirectional")
    plan = replace(plan, plan=replace(plan.plan, rows_per_step=plan.plan.rows))
    texts, markers = [], []
    for epoch in (0, 1):
        batch, order = plan.batch(epoch), np.argsort(plan.plan.at(epoch)[0])
        read_in_epoch = read(plan, batch)
        texts.append([read_in_epoch[row] for row in order])
        ids = batch["inputs"][order]
        markers.append(ids[np.isin(ids, [plan.special.forward, plan.special.backward])])
    assert texts[0] == texts[1]
    assert 0.4 < (markers[0] == markers[1]).mean() < 0.6
