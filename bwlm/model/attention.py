"""Causal self-attention over whole rows or inside their segments, by one of three kernels that compute the same.

'blocked' is for CPUs, where torch's kernel multiplies slowly: tiles of queries against the keys that they may see, as
plain batched matmuls, with the probabilities kept for the backward pass. It holds at most about B H T^2 / 2 of them, so
it is not for very long rows. 'sdpa' is torch's `scaled_dot_product_attention`: on a GPU flash attention, its own or
cuDNN's, with a dense mask where attention stays inside segments; on a CPU it is called segment by segment. 'flex' is
torch's `flex_attention` where a GPU trains compiled blocks inside segments, and 'sdpa' elsewhere: it skips the blocks
that no query of theirs may see.

What a kernel needs to know of the segments is the same for all layers, so `segment_mask` makes it once for a pass.
Masks are data: another mask compiles nothing anew.

Axes: B batch, T time, H heads, K kv heads, D head dimension, Q queries of a tile, S keys of a tile, N tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionKernel = Literal["sdpa", "blocked", "flex"]


_SMALLEST_BLOCK = 128
_MOST_BLOCKS = 8
_SEGMENT_BLOCK = 256
"""Positions of neighbouring short segments that share a tile; no piece of a longer one is smaller unless it must be."""
_TILE_COST = 2**17
"""The cost of starting a tile, in pairs of a query and a key of one head."""
_FLEX_BLOCK = 128


class Tile(NamedTuple):
    """Queries of some rows, multiplied with the keys of these rows from `keys` to the last query."""

    first_row: int
    end_row: int
    keys: int
    start: int
    end: int
    is_mixed: bool
    """Several segments lie in it, so that keys are hidden one by one."""


class TiledMask(NamedTuple):
    """Which keys the queries of each row may see, for kernels that run on the CPU tile by tile."""

    runs: Tensor
    """[B, T] int32, the segment of each position, counted from 0"""
    tiles: Tensor
    """[B n, 6] int32 in the order of `Tile`, as many for every batch of a shape; the tiles left over are empty"""

    def listed(self) -> list[Tile]:
        """The tiles that hold queries."""
        return [Tile(*tile) for tile in self.tiles.tolist() if tile[3] < tile[4]]


Mask = Tensor | TiledMask | BlockMask | None
"""The result of `segment_mask`: a dense mask [B, 1, T, T], tiles, or blocks. None: rows are one segment."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: AttentionKernel) -> Tensor:
    """q [B, H, T, D], k and v [B, K, T, D] to [B, H, T, D]; K divides H.

    A query sees the keys that are not later than itself and, with a mask, of its own segment.
    """
    grouped = k.size(1) < q.size(1)
    out: Tensor
    if kernel == "blocked":
        assert mask is None or isinstance(mask, TiledMask), "a mask of another kernel"
        if grouped:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        out = _blocked(q, k, v, mask)
    elif isinstance(mask, TiledMask):
        out = _sdpa_in_segments(q, k, v, mask)
    elif isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out


# ---- masks, made once for a pass ----


def segment_mask(segments: Tensor | None, kernel: AttentionKernel, heads: int, compiled: bool = False) -> Mask:
    """The mask that keeps attention inside segments [B, T], stretches of equal integers, for a kernel; None for None.

    `compiled`: for blocks that torch.compile compiled, the only ones in which 'flex' is fast.
    """
    if segments is None:
        return None
    runs = _opens(segments).cumsum(1, dtype=torch.int32) - 1
    if kernel == "blocked":
        return _tiled(runs, _cheapest(runs, heads))
    if runs.device.type == "cpu":
        return _tiled(runs, _whole_segments(runs))
    return block_mask(runs) if kernel == "flex" and compiled else dense_mask(runs)


def positions_in(segments: Tensor) -> Tensor:
    """[B, T] segments to the position of each place in its own segment, from 0."""
    places = torch.arange(segments.size(1), device=segments.device)
    return places - torch.where(_opens(segments), places, 0).cummax(1).values


def dense_mask(runs: Tensor) -> Tensor:
    """[B, T] segments to [B, 1, T, T]: True where a query (row) may look at a key: not later, same segment."""
    same = runs[:, None, :, None] == runs[:, None, None, :]
    return same.tril()


def block_mask(runs: Tensor) -> BlockMask:
    """[B, T] segments, counted upwards, as 'flex' takes them: blocks to skip, to mask pair by pair, and to see whole.

    All of it is computed on the segments' device, so that the host does not wait for it.
    """

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (runs[row, key] == runs[row, query])

    time = runs.size(1)
    starts = torch.arange(0, time, _FLEX_BLOCK, device=runs.device)
    first, last = runs[:, starts], runs[:, (starts + _FLEX_BLOCK).clamp_max(time) - 1]
    begun = starts[:, None] >= starts
    seen = begun & (last[:, None, :] >= first[:, :, None])
    whole = begun.tril(-1) & (first[:, None, :] == last[:, :, None])
    whole &= (starts + _FLEX_BLOCK <= time)[:, None]  # a block beyond the row's end is masked, as torch's own are
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=may_see,
        seq_lengths=(time, time),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, blocks, blocks] of flags to how many of each line are set, and their indices first: [B, 1, ..] int32."""
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _opens(segments: Tensor) -> Tensor:
    """[B, T] True where a segment begins."""
    opens = torch.ones_like(segments, dtype=torch.bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return opens


# ---- tiles ----


def _block_size(time: int) -> int:
    """Small blocks waste less above the diagonal, large ones multiply faster."""
    return max(_SMALLEST_BLOCK, -(-time // _MOST_BLOCKS))


def _blocks(rows: int, time: int, is_mixed: bool) -> tuple[Tile, ...]:
    """Blocks of queries of all rows at once, each with all keys up to its end."""
    block = _block_size(time)
    return tuple(Tile(0, rows, 0, at, min(at + block, time), is_mixed) for at in range(0, time, block))


def _tiled(runs: Tensor, tiles: Sequence[Tile]) -> TiledMask:
    # A segment longer than _SEGMENT_BLOCK makes at most two pieces for each _SEGMENT_BLOCK of its length, and ends at
    # most one group of short ones before it; of other groups, two neighbours are longer than _SEGMENT_BLOCK together.
    capacity = len(runs) * (3 * -(-runs.size(1) // _SEGMENT_BLOCK) + 2)
    assert len(tiles) <= capacity, f"{len(tiles)} tiles, but at most {capacity} were expected"
    filled = torch.zeros(capacity, len(Tile._fields), dtype=torch.int32)
    filled[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
    return TiledMask(runs, filled)


def _cheapest(runs: Tensor, heads: int) -> Sequence[Tile]:
    """Tiles by segments, or blocks of all rows where those would be so many and so small that starting them costs more.

    Rows of one segment each are the blocks that they are without a mask.
    """
    rows, time = runs.shape
    return min(
        _blocks(rows, time, is_mixed=bool(runs[:, -1].any())),
        tuple(_by_segment(runs, max(_SEGMENT_BLOCK, _block_size(time)))),
        key=lambda tiles: (
            sum((t.end_row - t.first_row) * (t.end - t.start) * (t.end - t.keys) for t in tiles)
            + len(tiles) * _TILE_COST // heads
        ),
    )


def _whole_segments(runs: Tensor) -> Sequence[Tile]:
    """Tiles that hold the keys of all their queries: a long segment, or some short ones."""
    return tuple(_by_segment(runs, runs.size(1)))


def _by_segment(runs: Tensor, longest: int) -> Iterator[Tile]:
    """Tiles of whole short segments, or pieces of a longer one; neighbouring rows that are cut alike share tiles."""
    borders_of: list[list[int]] = [[] for _ in runs]
    for row, place in _opens(runs).nonzero().tolist():
        borders_of[row].append(place)
    row = 0
    for borders, alike in itertools.groupby([*borders, runs.size(1)] for borders in borders_of):
        end_row = row + len(list(alike))
        yield from (Tile(row, end_row, *tile) for tile in _cut(borders, longest))
        row = end_row


def _cut(borders: Sequence[int], longest: int) -> Iterator[tuple[int, int, int, bool]]:
    """Borders of a row's segments to (keys, start, end, is mixed) of its tiles."""
    group, members = borders[0], 0  # where short segments begin that no tile holds yet, and how many they are
    for start, end in itertools.pairwise(borders):
        if members and end - group > _SEGMENT_BLOCK:
            yield group, group, start, members > 1
            group, members = start, 0
        if end - start > _SEGMENT_BLOCK:
            piece = _piece(end - start, longest)
            yield from ((start, at, min(at + piece, end), False) for at in range(start, end, piece))
            group = end
        else:
            members += 1
    if members:
        yield group, group, borders[-1], members > 1


def _piece(length: int, longest: int) -> int:
    """The length of equal pieces of a segment, none longer than `longest`."""
    pieces = -(-length // longest)
    return -(-length // pieces)


# ---- kernels for CPUs ----


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _blocked(q: Tensor, k: Tensor, v: Tensor, mask: TiledMask | None) -> Tensor:
    """Runs uncompiled, since the shapes of the tiles are those of the text."""
    runs, tiles = (mask.runs, mask.listed()) if mask else (None, _blocks(len(q), q.size(2), is_mixed=False))
    out: Tensor = _Blocked.apply(q, k, v, runs, tiles)  # type: ignore[no-untyped-call]
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sdpa_in_segments(q: Tensor, k: Tensor, v: Tensor, mask: TiledMask) -> Tensor:
    """torch's kernel tile by tile, whose keys are those of its queries; k and v may have fewer heads than q."""
    rows: dict[int, list[Tensor]] = {}
    for tile in mask.listed():
        at = slice(tile.first_row, tile.end_row), slice(None), slice(tile.start, tile.end)
        inside = dense_mask(mask.runs[at[0], at[2]]) if tile.is_mixed else None
        part = F.scaled_dot_product_attention(
            q[at], k[at], v[at], attn_mask=inside, is_causal=inside is None, enable_gqa=k.size(1) < q.size(1)
        )
        rows.setdefault(tile.first_row, []).append(part)
    return torch.cat([torch.cat(parts, dim=2) for parts in rows.values()])


class _Blocked(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v and its gradient, tile by tile: no key outside of a tile is ever multiplied."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Tensor | None, tiles: Sequence[Tile]) -> Tensor:
        q, k, v = q * q.size(-1) ** -0.5, k.contiguous(), v.contiguous()
        out = torch.empty_like(v)
        probabilities = []
        for tile in tiles:
            rows, queries, keys = _slices(tile)
            scores = q[rows, :, queries] @ k[rows, :, keys].transpose(-1, -2)  # [rows, H, Q, S]
            _hide(scores, tile, runs)
            p = torch.softmax(scores, -1)
            out[rows, :, queries] = p @ v[rows, :, keys]
            probabilities.append(p)
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, *probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        dout = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, p in zip(ctx.tiles, probabilities, strict=True):
            rows, queries, keys = _slices(tile)
            here = dout[rows, :, queries]
            dscores = torch._softmax_backward_data(here @ v[rows, :, keys].transpose(-1, -2), p, -1, p.dtype)
            dq[rows, :, queries] = dscores @ k[rows, :, keys]
            dk[rows, :, keys] += dscores.transpose(-1, -2) @ q[rows, :, queries]
            dv[rows, :, keys] += p.transpose(-1, -2) @ here
        return dq.mul_(q.size(-1) ** -0.5), dk, dv, None, None


def _slices(tile: Tile) -> tuple[slice, slice, slice]:
    """Rows, queries and keys."""
    return slice(tile.first_row, tile.end_row), slice(tile.start, tile.end), slice(tile.keys, tile.end)


def _hide(scores: Tensor, tile: Tile, runs: Tensor | None) -> None:
    """Sets scores [rows, H, Q, S] of a tile to -inf at later keys and, in a mixed one, at those of other segments."""
    queries = tile.end - tile.start
    later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    if not tile.is_mixed or runs is None:
        scores[..., tile.start - tile.keys :].masked_fill_(later, -torch.inf)
        return
    rows, at_queries, at_keys = _slices(tile)
    hidden = runs[rows, None, at_queries, None] != runs[rows, None, None, at_keys]
    hidden[..., tile.start - tile.keys :] |= later
    scores.masked_fill_(hidden, -torch.inf)
