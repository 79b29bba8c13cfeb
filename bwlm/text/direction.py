"""Direction: a pure transform of token ids, applied to packed rows.

A segment of text tokens t1..tn becomes

    forward        BOS t1 .. tn
    backward       BOS tn .. t1
    bidirectional  BOS <|forward|> t1 .. tn   or   BOS <|backward|> tn .. t1, chosen segment by segment
    permuted       BOS and t1..tn in one fixed order, the same everywhere (a control)

No token crosses a segment or a row, so at every step every direction reads the same text. A row that is read backward
as a whole also has its segments in reverse order: its backward layout is the forward layout of its mirror. Otherwise
a model that attends across segments would read the end of one document just before the beginning of the next in one
direction, and nothing like it in the other: a gap that the text does not have.

Axes: R rows, T inputs of a row, S segments, N text tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Reversal
from bwlm.directions import DIRECTIONS, READINGS, is_marked
from bwlm.errors import UserError, nearest
from bwlm.text.plan import counter_hash, splitmix64

if TYPE_CHECKING:
    from bwlm.text.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]

FORWARD, BACKWARD, PERMUTED = range(3)

HEAD_SLOTS = 2
"""Slots that packing reserves before a segment's text: BOS and, in the widest direction, a marker."""

CLOSING_SLOTS = 1
"""Slots that packing reserves at a row's end: BOS, so that the end of the last segment can be a target like any
other."""

IGNORED = -1
"""Target id of a position that is not trained or scored."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens that a layout writes."""

    bos: int
    pad: int
    forward: int
    backward: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> SpecialIds:
        """Return the ids that a tokenizer gives to these special tokens."""
        return cls(tokenizer.bos, tokenizer.pad, tokenizer.forward, tokenizer.backward)


@dataclass(frozen=True)
class Rows:
    """Packed rows before direction. Segments of one row stand together, in the order of the row."""

    count: int
    """R, the number of rows"""
    tokens: Ints
    """[N] text tokens in reading order, segment after segment"""
    lengths: Ints
    """[S] text tokens of each segment, may be 0"""
    row: Ints
    """[S] row of the segment, 0..R-1"""
    segment: Ints
    """[S] id of the segment in its corpus"""
    document: Ints
    """[S] id of the document that the segment is cut from"""
    whole: NDArray[np.bool_]
    """[S] true where the segment is the whole document"""
    epoch: Ints
    """[S] epoch in which the row is read"""


@dataclass(frozen=True)
class Directed:
    """Rows as a model reads them."""

    ids: Ids
    """[R, T+1] token ids"""
    targets: Ids
    """[R, T] next ids, IGNORED where they are markers, padding or a false end"""
    starts: Ints
    """[S] slot of each segment's BOS in its row, segments in the order of the text"""
    text: Ints
    """[N] flat index into [R, T] of the position that predicts each text token, tokens in reading order"""
    ends: Ints
    """[S] flat index into [R, T] of the position that predicts the end of the segment, IGNORED where no end is scored
    """
    segments: Ids
    """[R, T] segment of each input, counted in the order of the laid-out row; padding belongs to the last segment"""


@dataclass(frozen=True)
class Layout:
    """Layout of rows, besides the reading of each segment; the default is that of documents."""

    mirrored: bool = False
    """The segments of each row stand in reverse order; see `is_mirrored`."""
    parts: Ints | None = None
    """[P] lengths that add up to those of the segments: each part is read for itself and stays in its place."""
    targets: NDArray[np.bool_] | None = None
    """[N] the text tokens that are targets, and nothing else is; None: all are, and the ends of whole documents."""
    markers: Ints | None = None
    """[S] the reading that each marker names; None: the one in which the segment is read."""


DOCUMENTS = Layout()


def check_direction(name: str) -> str:
    """Return `name` if it is a direction. Raises `UserError` if it is not."""
    if name not in DIRECTIONS:
        raise UserError(f"direction: {name!r} is not one of {', '.join(DIRECTIONS)}{nearest(name, DIRECTIONS)}")
    return name


def is_mirrored(name: str, reversal: Reversal = "whole") -> bool:
    """Return true for rows that are read backward as a whole, and so lay out their segments in reverse order.

    `name` is the direction of training, or the reading of an evaluation. Rows that a bidirectional model trains on,
    and rows with `reversal: turns`, keep the order of segments: the first are read both ways, and in the second the
    order of the turns stays.
    """
    return name == "backward" and reversal == "whole"


def readings(direction: str, rows: Rows, seed: int) -> Ints:
    """Return [S], the reading of each segment in training.

    A bidirectional model's coin is a hash of (seed, epoch, segment id).
    """
    if is_marked(direction):
        coins = counter_hash(seed, rows.epoch, rows.segment) >> np.uint64(63)
        return np.where(coins == 0, FORWARD, BACKWARD)
    return np.full(len(rows.lengths), READINGS.index(direction))


@lru_cache(maxsize=8)
def _ranks(width: int) -> Ints:
    """Return [width], the place of each index in the one fixed permutation of 0..width-1."""
    order = np.argsort(splitmix64(np.arange(width, dtype=np.uint64)), kind="stable")
    return np.argsort(order, kind="stable")


def _within(lengths: Ints) -> Ints:
    """Return [N], the index of each token inside its segment."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)


def _positions(lengths: Ints, reading: Ints, width: int) -> Ints:
    """Return [N], the place of each token (in reading order) after BOS and marker."""
    index = _within(lengths)
    token_reading = np.repeat(reading, lengths)
    position = np.where(token_reading == BACKWARD, np.repeat(lengths, lengths) - 1 - index, index)
    scrambled = np.flatnonzero(token_reading == PERMUTED)
    if len(scrambled):
        owner = np.repeat(np.arange(len(lengths)), lengths)[scrambled]
        order = np.lexsort((_ranks(width)[index[scrambled]], owner))
        position[scrambled[order]] = _within(np.where(reading == PERMUTED, lengths, 0))
    return position


def _places(lengths: Ints, reading: Ints, width: int, parts: Ints | None) -> Ints:
    """Return `_positions` where each of `parts` [P] is read on its own and stays in its place.

    No part is empty or crosses a segment.
    """
    if parts is None:
        return _positions(lengths, reading, width)
    starts = np.cumsum(parts) - parts
    segment = np.searchsorted(np.cumsum(lengths), starts, side="right")
    before = (np.cumsum(lengths) - lengths)[segment]
    return np.repeat(starts - before, parts) + _positions(parts, reading[segment], width)


def arrange(tokens: Ints, reading: str, width: int, parts: Ints | None = None) -> Ints:
    """Return the tokens of a segment in the order in which a model reads them; `width` is T.

    With `parts` [P], lengths that add up to the segment's, each part is read on its own.
    """
    positions = _places(np.array([len(tokens)]), np.array([READINGS.index(reading)]), width, parts)
    arranged = np.empty_like(tokens)
    arranged[positions] = tokens
    return arranged


def restore(arranged: Ints, reading: str, width: int, parts: Ints | None = None) -> Ints:
    """Return arranged tokens in reading order: the inverse of `arrange`."""
    return arranged[_places(np.array([len(arranged)]), np.array([READINGS.index(reading)]), width, parts)]


def lay_out(
    rows: Rows,
    reading: Ints,
    marked: bool,
    special: SpecialIds,
    width: int,
    layout: Layout = DOCUMENTS,
) -> Directed:
    """Lay rows out for a model that takes `width` = T inputs; `reading` [S] is that of each segment.

    `marked` puts a marker of the reading after the BOS of each segment. BOS is a target exactly after a segment that is
    a whole document, the last of a row too; markers and padding never are.
    """
    head = 1 + marked
    sizes = rows.lengths + head
    starts, is_last = _starts(rows, sizes, layout.mirrored)
    assert (starts + rows.lengths + HEAD_SLOTS + CLOSING_SLOTS <= width + 1).all(), (
        "packing left too little room for a segment"
    )
    true_end = rows.whole & (layout.targets is None)

    # Flat indices into [R, T+1]. A whole document is closed by the BOS of the segment behind it; the last of a row has
    # none behind it, so packing has kept a slot for one.
    opening = rows.row * (width + 1) + starts
    next_opening = opening + sizes
    slots = np.repeat(opening + head, rows.lengths) + _places(rows.lengths, reading, width, layout.parts)
    ids = np.full((rows.count, width + 1), special.pad, dtype=np.int32)
    ids.flat[opening] = special.bos
    ids.flat[next_opening[is_last & true_end]] = special.bos
    if marked:
        named = reading if layout.markers is None else layout.markers
        ids.flat[opening + 1] = np.where(named == FORWARD, special.forward, special.backward)
    ids.flat[slots] = rows.tokens

    # a slot is a target if it holds a chosen token, or the BOS behind a whole document
    scored = np.zeros((rows.count, width + 1), dtype=bool)
    scored.flat[slots] = True if layout.targets is None else layout.targets
    scored.flat[next_opening[true_end]] = True

    # the ordinal of a slot's segment is the number of BOS that open segments up to it, minus 1
    opens = np.zeros((rows.count, width + 1), dtype=np.int32)
    opens.flat[opening] = 1
    # Position p of [R, T] predicts slot p + 1 of [R, T+1]. A row has one slot more than positions, so a flat index of
    # a slot is that of its position, plus 1, plus the number of rows before it.
    owner_row = np.repeat(rows.row, rows.lengths)
    return Directed(
        ids=ids,
        targets=np.where(scored, ids, IGNORED)[:, 1:],
        starts=starts,
        text=slots - owner_row - 1,
        ends=np.where(true_end, next_opening - rows.row - 1, IGNORED),
        segments=np.maximum(np.cumsum(opens, axis=1, dtype=np.int32) - 1, 0)[:, :-1],
    )


def _starts(rows: Rows, sizes: Ints, mirrored: bool) -> tuple[Ints, NDArray[np.bool_]]:
    """Return [S], the slot of each segment's BOS, and [S], true for the last segment of the laid-out row."""
    first = np.ones(len(sizes), dtype=bool)
    first[1:] = rows.row[1:] != rows.row[:-1]
    last = np.append(first[1:], True)[: len(sizes)]
    before = np.cumsum(sizes) - sizes
    starts = before - before[first][np.cumsum(first) - 1] if len(sizes) else before
    if not mirrored:
        return starts, last
    ends = starts + sizes
    row_sizes = ends[last][np.cumsum(first) - 1] if len(sizes) else ends
    return row_sizes - ends, first


def read_row(ids: Ids, direction: str, special: SpecialIds, width: int) -> list[Ints]:
    """Return the segments of a directed row of documents that hold text, in the order of the text.

    Each is in reading order. This inverts `lay_out` from the ids alone.
    """
    borders = np.append(np.flatnonzero(ids == special.bos), len(ids))
    segments = []
    for start, stop in itertools.pairwise(borders):
        body = ids[start + 1 : stop].astype(np.int64)
        body = body[body != special.pad]
        reading = direction
        if is_marked(direction) and len(body):
            reading = READINGS[[special.forward, special.backward].index(int(body[0]))]
            body = body[1:]
        if len(body):  # nothing follows the BOS that closes a row
            segments.append(restore(body, reading, width))
    return segments[::-1] if is_mirrored(direction) else segments
