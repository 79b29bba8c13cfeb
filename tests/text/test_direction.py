"""Direction: its laws for any ids, its layout worked out by hand, and that no model sees what it has not read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.directions import DIRECTIONS, READINGS, is_marked, own_readings
from bwlm.errors import UserError
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.text.direction import (
    BACKWARD,
    CLOSING_SLOTS,
    FORWARD,
    HEAD_SLOTS,
    IGNORED,
    PERMUTED,
    Directed,
    Layout,
    Rows,
    SpecialIds,
    arrange,
    check_direction,
    is_mirrored,
    lay_out,
    read_row,
    readings,
    restore,
)

law = settings(derandomize=True, deadline=None, max_examples=80)
SPECIAL = SpecialIds(bos=100, pad=101, forward=102, backward=103)
BOS, PAD, FWD, BWD = 100, 101, 102, 103

Segment = tuple[list[int], bool]
"""(text tokens, whether they are a whole document)"""


def rows_of(*rows: list[Segment]) -> Rows:
    segments = [(row, tokens, whole) for row, content in enumerate(rows) for tokens, whole in content]
    count = len(segments)
    return Rows(
        count=len(rows),
        tokens=np.array([token for _, tokens, _ in segments for token in tokens], dtype=np.int64),
        lengths=np.array([len(tokens) for _, tokens, _ in segments], dtype=np.int64),
        row=np.array([row for row, _, _ in segments], dtype=np.int64),
        segment=np.arange(count),
        document=np.arange(count),
        whole=np.array([whole for _, _, whole in segments], dtype=bool),
        epoch=np.zeros(count, dtype=np.int64),
    )


@st.composite
def packed(draw: st.DrawFn) -> tuple[Rows, int]:
    """(rows, width): rows of any number of segments of any length, 0 and whole rows included, that fit with markers."""
    width = draw(st.integers(8, 40))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row: list[Segment] = []
        free = width + 1 - CLOSING_SLOTS
        while free >= HEAD_SLOTS and draw(st.integers(0, 4)):
            length = draw(st.one_of(st.just(free - HEAD_SLOTS), st.integers(0, min(6, free - HEAD_SLOTS))))
            row.append((draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)), draw(st.booleans())))
            free -= length + HEAD_SLOTS
        rows.append(row)
    return rows_of(*rows), width


def directed(rows: Rows, direction: str, width: int, seed: int = 0) -> Directed:
    mirrored = is_mirrored(direction)
    return lay_out(rows, readings(direction, rows, seed), is_marked(direction), SPECIAL, width, Layout(mirrored))


def mirror(rows: Rows) -> Rows:
    """Each row with its segments in reverse order, each of them reversed."""
    order = np.lexsort((-np.arange(len(rows.row)), rows.row))
    ends = np.cumsum(rows.lengths)
    tokens = [rows.tokens[end - length : end][::-1] for end, length in zip(ends, rows.lengths, strict=True)]
    return replace(
        rows,
        tokens=np.concatenate([np.zeros(0, np.int64), *(tokens[index] for index in order)]),
        lengths=rows.lengths[order],
        segment=rows.segment[order],
        document=rows.document[order],
        whole=rows.whole[order],
    )


def laid_order(content: list[Any], direction: str) -> list[Any]:
    """The segments of a row in the order in which they are laid out."""
    return content[::-1] if is_mirrored(direction) else content


def texts(rows: Rows) -> list[list[list[int]]]:
    """Tokens of each segment of each row."""
    ends = np.cumsum(rows.lengths)
    content: list[list[list[int]]] = [[] for _ in range(rows.count)]
    for row, start, end in zip(rows.row, ends - rows.lengths, ends, strict=True):
        content[row].append(rows.tokens[start:end].tolist())
    return content


def bodies(ids: np.ndarray) -> list[list[int]]:
    """What follows each BOS of a row, up to the next or to the padding."""
    content: list[list[int]] = []
    for token in ids.tolist():
        if token == BOS:
            content.append([])
        elif token != PAD:
            content[-1].append(token)
    return content


# ---- one segment ----


@law
@given(st.lists(st.integers(0, 2**31 - 1), max_size=64), st.sampled_from(READINGS))
def test_restore_is_the_inverse_of_arrange_for_any_ids(ids: list[int], reading: str) -> None:
    tokens = np.array(ids, dtype=np.int64)
    arranged = arrange(tokens, reading, 64)
    assert sorted(arranged.tolist()) == sorted(ids)
    assert restore(arranged, reading, 64).tolist() == ids


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("length", [0, 1, 63, 64])
def test_restore_is_the_inverse_at_the_edges(length: int, reading: str) -> None:
    tokens = np.arange(length) + 100
    assert restore(arrange(tokens, reading, 64), reading, 64).tolist() == tokens.tolist()


@law
@given(st.lists(st.integers(0, 200), max_size=64))
def test_forward_keeps_the_order_and_backward_reverses_it(ids: list[int]) -> None:
    tokens = np.array(ids, dtype=np.int64)
    assert arrange(tokens, "forward", 64).tolist() == ids
    assert arrange(tokens, "backward", 64).tolist() == ids[::-1]


@law
@given(st.integers(8, 200), st.data())
def test_permuted_is_one_order_restricted_to_the_indices_a_segment_has(width: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, width))
    whole = arrange(np.arange(width), "permuted", width).tolist()
    assert arrange(np.arange(length), "permuted", width).tolist() == [index for index in whole if index < length]


def test_permuted_is_neither_forward_nor_backward_and_stays_what_it_is() -> None:
    # the indices in the order of splitmix64 of them
    assert arrange(np.arange(11), "permuted", 11).tolist() == [10, 3, 5, 7, 4, 1, 2, 8, 9, 6, 0]
    moved = arrange(np.arange(1024), "permuted", 1024)
    assert abs(np.corrcoef(moved, np.arange(1024))[0, 1]) < 0.1
    assert (np.abs(np.diff(moved)) == 1).mean() < 0.01


# ---- rows ----


@law
@given(packed(), st.sampled_from(list(DIRECTIONS)), st.integers(0, 5))
def test_rows_come_back_from_the_ids_alone(case: tuple[Rows, int], direction: str, seed: int) -> None:
    rows, width = case
    laid = directed(rows, direction, width, seed)
    for row, content in enumerate(texts(rows)):
        found = [s.tolist() for s in read_row(laid.ids[row], direction, SPECIAL, width)]
        assert found == [segment for segment in content if segment]


@law
@given(packed(), st.integers(0, 5))
def test_every_direction_holds_the_same_tokens_in_each_segment(case: tuple[Rows, int], seed: int) -> None:
    rows, width = case
    for direction in DIRECTIONS:
        laid = directed(rows, direction, width, seed)
        for row, content in enumerate(texts(rows)):
            found = [sorted(t for t in body if t not in (FWD, BWD)) for body in bodies(laid.ids[row])]
            assert found[: len(content)] == laid_order([sorted(segment) for segment in content], direction)
            assert found[len(content) :] in ([], [[]])  # what closes the row


@law
@given(packed(), st.sampled_from(list(DIRECTIONS)))
def test_special_and_padding_ids_keep_their_place(case: tuple[Rows, int], direction: str) -> None:
    rows, width = case
    laid = directed(rows, direction, width)
    head = 1 + is_marked(direction)
    for row, content in enumerate(texts(rows)):
        ids = laid.ids[row]
        sizes = np.array([head + len(segment) for segment in laid_order(content, direction)], dtype=np.int64)
        starts = (np.cumsum(sizes) - sizes).tolist()
        whole = laid_order(rows.whole[rows.row == row].tolist(), direction)
        closing = [sum(sizes)] if whole and whole[-1] else []
        assert np.flatnonzero(ids == BOS).tolist() == starts + closing
        assert laid.starts[rows.row == row].tolist() == laid_order(starts, direction)
        marked = np.flatnonzero((ids == FWD) | (ids == BWD)).tolist()
        assert marked == ([start + 1 for start in starts] if is_marked(direction) else [])
        assert np.flatnonzero(ids == PAD).tolist() == list(range(sum(sizes) + len(closing), width + 1))


@law
@given(packed(), st.sampled_from(list(DIRECTIONS)))
def test_targets_are_text_and_true_ends_and_nothing_else(case: tuple[Rows, int], direction: str) -> None:
    rows, width = case
    laid = directed(rows, direction, width)
    true_ends = rows.whole
    scored = laid.targets != IGNORED
    assert np.array_equal(laid.targets[scored], laid.ids[:, 1:][scored])
    assert np.isin([PAD, FWD, BWD], laid.targets).sum() == 0
    assert (laid.targets == BOS).sum() == true_ends.sum()
    assert scored.sum() == rows.lengths.sum() + true_ends.sum()
    flat = laid.targets.reshape(-1)
    assert flat[laid.text].tolist() == rows.tokens.tolist()
    assert np.array_equal(laid.ends != IGNORED, true_ends)
    assert (flat[laid.ends[true_ends]] == BOS).all()
    # what predicts a segment's text and its end stands inside that segment
    owner = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    counts = [(rows.row == row).sum() for row in range(rows.count)]
    ordinal = np.concatenate([laid_order(list(range(count)), direction) for count in counts]).astype(np.int64)
    assert np.array_equal(laid.segments.reshape(-1)[laid.text], ordinal[owner])
    assert np.array_equal(laid.segments.reshape(-1)[laid.ends[true_ends]], ordinal[true_ends])


@law
@given(packed(), st.booleans())
def test_the_backward_layout_of_a_row_is_the_forward_layout_of_its_mirror(case: tuple[Rows, int], marked: bool) -> None:
    rows, width = case
    other, backwards = mirror(rows), np.full(len(rows.lengths), BACKWARD)
    # a marked row, of a bidirectional model that is measured in one reading, differs in its markers alone
    backward = lay_out(rows, backwards, marked, SPECIAL, width, Layout(mirrored=True))
    forward = lay_out(other, np.full(len(rows.lengths), FORWARD), marked, SPECIAL, width, Layout(markers=backwards))
    assert np.array_equal(backward.ids, forward.ids)
    assert np.array_equal(backward.targets, forward.targets)
    assert np.array_equal(backward.segments, forward.segments)
    order = np.lexsort((-np.arange(len(rows.row)), rows.row))
    assert np.array_equal(backward.starts[order], forward.starts)
    assert np.array_equal(backward.ends[order], forward.ends)
    tokens = np.arange(len(rows.tokens))
    assert np.array_equal(backward.text[mirror(replace(rows, tokens=tokens)).tokens], forward.text)


@law
@given(packed(), st.integers(0, 5))
def test_the_same_ends_are_targets_in_every_direction(case: tuple[Rows, int], seed: int) -> None:
    rows, width = case
    found = [directed(rows, direction, width, seed) for direction in DIRECTIONS]
    assert all(np.array_equal(laid.ends != IGNORED, rows.whole) for laid in found)


def test_rows_are_mirrored_where_they_are_read_backward_as_a_whole() -> None:
    assert [name for name in DIRECTIONS if is_mirrored(name)] == ["backward"]
    assert not is_mirrored("backward", "turns")


def test_segments_that_fill_a_row_leave_the_closing_slot_alone_in_the_widest_direction() -> None:
    rows = rows_of([([1] * 8, True)], [([2] * 3, True), ([3] * 3, False)], [([], True), ([4] * 6, False)])
    laid = lay_out(rows, np.full(5, BACKWARD), True, SPECIAL, 10)
    assert np.argwhere(laid.ids == PAD).tolist() == [[1, 10], [2, 10]]
    assert laid.ids[0, 10] == BOS
    assert [len(body) for row in laid.ids for body in bodies(row)] == [9, 0, 4, 4, 1, 7]


def test_a_segment_that_would_not_fit_in_every_direction_is_refused() -> None:
    with pytest.raises(AssertionError, match="too little room"):
        lay_out(rows_of([([1] * 9, True)]), np.array([FORWARD]), False, SPECIAL, 10)


# ---- worked out by hand: 12 slots, 1-3 a whole document, 4 a piece, 5 a whole document that ends its row ----

HAND = rows_of([([1, 2, 3], True), ([4], False), ([5], True)], [([10, 11, 12, 13, 14, 15, 16, 17, 18], False)])
LONG = list(range(10, 19))
SCRAMBLED = [13, 15, 17, 14, 11, 12, 18, 16, 10]  # places 3 5 7 4 1 2 8 6 0 of splitmix64's order of 0..10


@pytest.mark.parametrize(
    ("reading", "ids", "targets"),
    [
        (
            FORWARD,
            [[BOS, 1, 2, 3, BOS, 4, BOS, 5, BOS, PAD, PAD, PAD], [BOS, *LONG, PAD, PAD]],
            [[1, 2, 3, BOS, 4, -1, 5, BOS, -1, -1, -1], [*LONG, -1, -1]],
        ),
        (
            PERMUTED,
            [[BOS, 2, 3, 1, BOS, 4, BOS, 5, BOS, PAD, PAD, PAD], [BOS, *SCRAMBLED, PAD, PAD]],
            [[2, 3, 1, BOS, 4, -1, 5, BOS, -1, -1, -1], [*SCRAMBLED, -1, -1]],
        ),
    ],
    ids=["forward", "permuted"],
)
def test_one_direction_by_hand(reading: int, ids: list[list[int]], targets: list[list[int]]) -> None:
    laid = lay_out(HAND, np.full(4, reading), False, SPECIAL, 11)
    assert laid.ids.tolist() == ids
    assert laid.targets.tolist() == targets
    assert laid.segments.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0] * 11]
    assert laid.starts.tolist() == [0, 4, 6, 0]
    assert laid.ends.tolist() == [3, -1, 7, -1]


def test_backward_by_hand() -> None:
    laid = lay_out(HAND, np.full(4, BACKWARD), False, SPECIAL, 11, Layout(mirrored=True))
    assert laid.ids.tolist() == [[BOS, 5, BOS, 4, BOS, 3, 2, 1, BOS, PAD, PAD, PAD], [BOS, *LONG[::-1], PAD, PAD]]
    assert laid.targets.tolist() == [[5, BOS, 4, -1, 3, 2, 1, BOS, -1, -1, -1], [*LONG[::-1], -1, -1]]
    assert laid.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2], [0] * 11]
    assert laid.starts.tolist() == [4, 2, 0, 0]
    assert laid.text.tolist() == [6, 5, 4, 2, 0, *range(19, 10, -1)]
    assert laid.ends.tolist() == [7, -1, 1, -1]


def test_two_directions_by_hand() -> None:
    laid = lay_out(HAND, np.array([BACKWARD, FORWARD, BACKWARD, BACKWARD]), True, SPECIAL, 11)
    assert laid.ids.tolist() == [[BOS, BWD, 3, 2, 1, BOS, FWD, 4, BOS, BWD, 5, BOS], [BOS, BWD, *LONG[::-1], PAD]]
    assert laid.targets.tolist() == [[-1, 3, 2, 1, BOS, -1, 4, -1, -1, 5, BOS], [-1, *LONG[::-1], -1]]
    assert laid.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 11]
    assert laid.starts.tolist() == [0, 5, 8, 0]
    assert laid.text.tolist() == [3, 2, 1, 6, 9, *range(20, 11, -1)]
    assert laid.ends.tolist() == [4, -1, 10, -1]


# ---- who reads how ----


def many(count: int, epoch: int = 0) -> Rows:
    rows = rows_of([([1], True)] * count)
    return replace(rows, epoch=np.full(count, epoch))


def test_one_direction_reads_every_segment_alike() -> None:
    for direction, reading in (("forward", FORWARD), ("backward", BACKWARD), ("permuted", PERMUTED)):
        for seed in (0, 1):
            assert (readings(direction, many(50), seed) == reading).all()


def test_half_of_the_segments_are_read_each_way() -> None:
    count = 40_000
    for seed in range(3):
        coins = readings("bidirectional", many(count), seed)
        assert set(coins.tolist()) == {FORWARD, BACKWARD}
        assert abs(coins.mean() - 0.5) < 4 * 0.5 / count**0.5
        assert abs(np.corrcoef(coins[1:], coins[:-1])[0, 1]) < 4 / count**0.5


def test_the_coin_follows_from_seed_epoch_and_segment_alone() -> None:
    rows = many(200)
    coins = readings("bidirectional", rows, 5)
    order = np.random.default_rng(0).permutation(200)[:70]
    fewer = rows_of(*[[([1, 2, 3], False)]] * 70)
    fewer = replace(fewer, segment=rows.segment[order], document=fewer.document + 999)
    assert np.array_equal(readings("bidirectional", fewer, 5), coins[order])


def test_every_epoch_and_seed_tosses_again() -> None:
    tossed = [readings("bidirectional", many(1000, epoch), seed) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(tossed):
        for other in tossed[:i]:
            assert 0.4 < (one == other).mean() < 0.6


def test_names() -> None:
    assert [check_direction(name) for name in DIRECTIONS] == list(DIRECTIONS)
    with pytest.raises(UserError, match=r"direction: 'bakward' is not one of .*did you mean 'backward'"):
        check_direction("bakward")
    assert [is_marked(name) for name in DIRECTIONS] == [False, False, True, False]
    assert [own_readings(name) for name in DIRECTIONS] == [
        ("forward",), ("backward",), ("forward", "backward"), ("permuted",),
    ]  # fmt: skip


# ---- through a model ----


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(vocab_size=104, depth=2, width=32, heads=2, kv_heads=2, sequence_length=23)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the usual initialisation has zeros where attention comes back
        torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perturbed_token_changes_no_logit_before_it(model: GPT, direction: str, masked: bool) -> None:
    rows = rows_of([(list(range(1, 9)), True), (list(range(11, 16)), False), ([21, 22, 23], True)])
    reading = np.array([BACKWARD, FORWARD, BACKWARD]) if is_marked(direction) else readings(direction, rows, 0)

    @torch.no_grad()
    def logits(tokens: np.ndarray) -> tuple[Directed, torch.Tensor]:
        laid = lay_out(
            replace(rows, tokens=tokens), reading, is_marked(direction), SPECIAL, 23, Layout(is_mirrored(direction))
        )
        segments = torch.from_numpy(laid.segments) if masked else None
        return laid, model(torch.from_numpy(laid.ids[:, :-1]).long(), segments)[0]

    laid, before = logits(rows.tokens)
    owner = np.repeat(laid_order([0, 1, 2], direction), rows.lengths)
    for index in range(len(rows.tokens)):
        tokens = rows.tokens.copy()
        tokens[index] = 99
        other, after = logits(tokens)
        (slot,) = np.flatnonzero(laid.ids[0] != other.ids[0])
        assert slot == laid.text[index] + 1
        changed = (before != after).any(dim=1).numpy()
        assert not changed[:slot].any()
        reach = (
            slice(slot, None) if not masked else slice(slot, np.flatnonzero(laid.segments[0] == owner[index])[-1] + 1)
        )
        assert changed[reach].all()
        if masked:
            assert not changed[reach.stop :].any()


def test_a_wrong_marker_changes_the_marker_alone() -> None:
    reading = np.array([BACKWARD, FORWARD, BACKWARD, BACKWARD])
    right, wrong = (
        lay_out(HAND, reading, True, SPECIAL, 11, Layout(markers=told)) for told in (None, FORWARD + BACKWARD - reading)
    )
    changed = right.ids != wrong.ids
    assert sorted(set(right.ids[changed].tolist())) == sorted({SPECIAL.forward, SPECIAL.backward})
    assert changed.sum() == 4
    assert np.array_equal(right.targets, wrong.targets)
