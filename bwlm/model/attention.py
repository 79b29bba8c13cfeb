"""Causal self-attention over whole rows or inside their segments, by one of three kernels that compute the same.

- 'blocked' is for CPUs, where torch's own kernel multiplies slowly. It cuts the queries into tiles and multiplies
  each tile with the keys that it may see, as plain batched matmuls. It keeps the probabilities for the backward pass,
  at most about B H T^2 / 2 of them, so it is not for very long rows.
- 'sdpa' is torch's `scaled_dot_product_attention`. On a GPU it is flash attention, torch's or cuDNN's; to keep
  attention inside segments it takes a dense mask. On a CPU it is called segment by segment.
- 'flex' is torch's `flex_attention` where a GPU trains compiled blocks with attention inside segments, and 'sdpa'
  everywhere else. It skips every block of keys that no query of the block may see.

All layers need the same facts about the segments, so `segment_mask` makes the mask once for each forward pass. Masks
are data: a new mask does not trigger a new compilation.

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
"""Fewest queries of a block, where 'blocked' cuts all rows alike."""
_MOST_BLOCKS = 8
"""Most blocks that 'blocked' cuts a row into."""
_SEGMENT_BLOCK = 256
"""Positions that short neighbouring segments may share in one tile. A longer segment is cut into smaller pieces only
if it must be."""
_TILE_COST = 2**17
"""Cost of starting a tile, counted in query-key pairs of one head."""
_FLEX_BLOCK = 128
"""Queries, and keys, of a block of 'flex'."""


class Tile(NamedTuple):
    """Queries of neighbouring rows, and their keys: from `keys` to the last query of the tile, in the same rows."""

    first_row: int
    end_row: int
    keys: int
    start: int
    end: int
    is_mixed: bool
    """True if the tile holds several segments, so that keys are masked one by one."""


class TiledMask(NamedTuple):
    """Mask for the kernels that run on a CPU tile by tile: the segments of the rows, and the tiles that cover them."""

    runs: Tensor
    """[B, T] int32, segment of each position, counted from 0"""
    tiles: Tensor
    """[B n, 6] int32, fields in the order of `Tile`. The number of tiles is the same for every batch of a shape;
    unused tiles are empty."""

    def listed(self) -> list[Tile]:
        """Return the tiles that hold queries."""
        return [Tile(*tile) for tile in self.tiles.tolist() if tile[3] < tile[4]]


Mask = Tensor | TiledMask | BlockMask | None
"""Result of `segment_mask`: a dense mask [B, 1, T, T], tiles, or blocks. None: each row is one segment."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: AttentionKernel) -> Tensor:
    """Return the attention [B, H, T, D] of queries q [B, H, T, D] over k and v [B, K, T, D]; K divides H.

    A query sees the keys at its own and earlier positions; with a mask, only those keys that lie in its segment.
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
    """Return the mask that keeps attention inside `segments` [B, T], in the form that `kernel` takes; None for None.

    A segment is a run of equal integers. `compiled` says that torch.compile compiled the blocks: only there is 'flex'
    fast.
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
    """Return the position of each place [B, T] in its own segment, counted from 0."""
    places = torch.arange(segments.size(1), device=segments.device)
    return places - torch.where(_opens(segments), places, 0).cummax(1).values


def dense_mask(runs: Tensor) -> Tensor:
    """Return a mask [B, 1, T, T] of segments [B, T].

    True where a query (row) may see a key: not a later one, and in the same segment.
    """
    same = runs[:, None, :, None] == runs[:, None, None, :]
    return same.tril()


def block_mask(runs: Tensor) -> BlockMask:
    """Return the mask of segments [B, T], counted upwards, in the form that 'flex' takes.

    It lists the blocks to skip, to mask pair by pair, and to see whole. Everything is computed on the segments'
    device, so that the host does not wait for it.
    """

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (runs[row, key] == runs[row, query])

    time = runs.size(1)
    starts = torch.arange(0, time, _FLEX_BLOCK, device=runs.device)
    first, last = runs[:, starts], runs[:, (starts + _FLEX_BLOCK).clamp_max(time) - 1]
    begun = starts[:, None] >= starts
    seen = begun & (last[:, None, :] >= first[:, :, None])
    whole = begun.tril(-1) & (first[:, None, :] == last[:, :, None])
    whole &= (starts + _FLEX_BLOCK <= time)[:, None]  # mask a block that crosses the row's end, as torch does
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=may_see,
        seq_lengths=(time, time),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many flags of [B, blocks, blocks] each line has set, and their indices first: [B, 1, ..] int32."""
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _opens(segments: Tensor) -> Tensor:
    """Return [B, T], true where a segment begins."""
    opens = torch.ones_like(segments, dtype=torch.bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return opens


# ---- tiles ----


def _block_size(time: int) -> int:
    """Return the queries of a block: small blocks waste less above the diagonal, large ones multiply faster."""
    return max(_SMALLEST_BLOCK, -(-time // _MOST_BLOCKS))


def _blocks(rows: int, time: int, is_mixed: bool) -> tuple[Tile, ...]:
    """Return blocks of queries of all rows at once, each with all keys up to its end."""
    block = _block_size(time)
    return tuple(Tile(0, rows, 0, at, min(at + block, time), is_mixed) for at in range(0, time, block))


def _tiled(runs: Tensor, tiles: Sequence[Tile]) -> TiledMask:
    """Return the mask with its tiles padded to the number that any batch of this shape can need."""
    # Upper bound on the tiles of a row, so that their number depends on the shape of the batch alone. A segment
    # longer than _SEGMENT_BLOCK makes at most two pieces per _SEGMENT_BLOCK of its length, and closes at most one
    # group of short segments before it. Any two other neighbouring groups together exceed _SEGMENT_BLOCK.
    capacity = len(runs) * (3 * -(-runs.size(1) // _SEGMENT_BLOCK) + 2)
    assert len(tiles) <= capacity, f"{len(tiles)} tiles, but at most {capacity} were expected"
    filled = torch.zeros(capacity, len(Tile._fields), dtype=torch.int32)
    filled[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
    return TiledMask(runs, filled)


def _cheapest(runs: Tensor, heads: int) -> Sequence[Tile]:
    """Return tiles by segment, or blocks of all rows where so many small tiles would cost more than they save.

    Rows of one segment each get the blocks that they have without a mask.
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
    """Return tiles that hold all keys of their queries: a long segment, or several short ones."""
    return tuple(_by_segment(runs, runs.size(1)))


def _by_segment(runs: Tensor, longest: int) -> Iterator[Tile]:
    """Yield tiles of whole short segments, or pieces of longer ones. Rows with equal borders share tiles."""
    borders_of: list[list[int]] = [[] for _ in runs]
    for row, place in _opens(runs).nonzero().tolist():
        borders_of[row].append(place)
    row = 0
    for borders, alike in itertools.groupby([*borders, runs.size(1)] for borders in borders_of):
        end_row = row + len(list(alike))
        yield from (Tile(row, end_row, *tile) for tile in _cut(borders, longest))
        row = end_row


def _cut(borders: Sequence[int], longest: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (keys, start, end, is mixed) of the tiles of a row, given the borders of its segments."""
    group, members = borders[0], 0  # start and number of the short segments that no tile holds yet
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
    """Return the length of equal pieces of a segment, each at most `longest`."""
    pieces = -(-length // longest)
    return -(-length // pieces)


# ---- kernels for CPUs ----


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _blocked(q: Tensor, k: Tensor, v: Tensor, mask: TiledMask | None) -> Tensor:
    """Return attention by tiles. Runs uncompiled: the shapes of the tiles change with the text."""
    runs, tiles = (mask.runs, mask.listed()) if mask else (None, _blocks(len(q), q.size(2), is_mixed=False))
    out: Tensor = _Blocked.apply(q, k, v, runs, tiles)  # type: ignore[no-untyped-call]
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sdpa_in_segments(q: Tensor, k: Tensor, v: Tensor, mask: TiledMask) -> Tensor:
    """Return attention by torch's kernel, tile by tile, each with its own keys; k and v may have fewer heads than q."""
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
    """softmax(q k^T / sqrt(D)) v and its gradient, tile by tile: keys outside a tile are never multiplied."""

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
    """Return the slices of a tile: rows, queries and keys."""
    return slice(tile.first_row, tile.end_row), slice(tile.start, tile.end), slice(tile.keys, tile.end)


def _hide(scores: Tensor, tile: Tile, runs: Tensor | None) -> None:
    """Set scores [rows, H, Q, S] of a tile to -inf at later keys and, in a mixed tile, at keys of other segments."""
    queries = tile.end - tile.start
    later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    if not tile.is_mixed or runs is None:
        scores[..., tile.start - tile.keys :].masked_fill_(later, -torch.inf)
        return
    rows, at_queries, at_keys = _slices(tile)
    hidden = runs[rows, None, at_queries, None] != runs[rows, None, None, at_keys]
    hidden[..., tile.start - tile.keys :] |= later
    scores.masked_fill_(hidden, -torch.inf)
