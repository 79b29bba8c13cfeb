"""All kernels compute the same, forward and backward, however rows are cut into segments and tiles."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwlm.model import attention
from bwlm.model.attention import (
    AttentionKernel,
    Tile,
    TiledMask,
    attend,
    block_mask,
    dense_mask,
    positions_in,
    segment_mask,
)

D = 16
KERNELS = get_args(AttentionKernel)


def heads(time: int, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, T, D], k and v [2, K, T, D] as a model hands them over: views whose time and heads are swapped."""
    generator = torch.Generator().manual_seed(time)

    def one(count: int) -> Tensor:
        x = torch.randn(2, time, count, D, generator=generator, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    return one(4), one(kv_heads), one(kv_heads)


def of_lengths(*rows: list[int]) -> Tensor:
    """[B, T] segments of these lengths, counted upwards."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def of_documents(length: int, time: int, rows: int = 2) -> Tensor:
    """[B, T]: documents of one length, each row beginning somewhere else in one of them."""
    offsets = torch.arange(rows)[:, None] * 37
    return (torch.arange(time) + offsets) // length


LAYOUTS = {
    "none": lambda time: None,
    "one a row": lambda time: torch.zeros(2, time, dtype=torch.long),
    "of one token": lambda time: torch.arange(time).expand(2, -1),
    "of 50": lambda time: of_documents(50, time),
    "of 300": lambda time: of_documents(300, time),
    "unequal": lambda time: torch.stack([torch.zeros(time, dtype=torch.long), torch.arange(time) // 50]),
    "alike": lambda time: (torch.arange(time) // 290).expand(2, -1),
}


def reference(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """The formula, with all pairs of a query and a key."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    seen = dense_mask(torch.zeros(len(q), q.size(2)) if segments is None else segments)
    scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad(out, inputs, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("time", [1, 127, 129, 300, 1100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_the_formula(kernel: AttentionKernel, time: int, kv_heads: int, layout: str) -> None:
    inputs, segments = heads(time, kv_heads), LAYOUTS[layout](time)
    found, plain = attend(*inputs, segment_mask(segments, kernel, 4), kernel), reference(*inputs, segments)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for name, ours, theirs in zip("qkv", gradients(found, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"d{n}: {text}")


def test_the_gradient_is_the_numerical_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", 3)
    monkeypatch.setattr(attention, "_SEGMENT_BLOCK", 2)
    monkeypatch.setattr(attention, "_MOST_BLOCKS", 10)
    monkeypatch.setattr(attention, "_TILE_COST", 0)
    inputs = heads(7, dtype=torch.float64)
    mask = segment_mask(of_lengths([2, 4, 1], [7]), "blocked", 4)
    assert isinstance(mask, TiledMask)
    assert len({tile.first_row for tile in mask.listed()}) == 2
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask, "blocked"), inputs)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, None, "blocked"), inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_another_segment_holds_changes_no_bit(kernel: AttentionKernel) -> None:
    """Neither of what comes out nor of a gradient, also where the other segment shares a tile."""
    segments = of_lengths([400, 90, 110, 100, 400], [500, 20, 580])
    mask, inputs = segment_mask(segments, kernel, 4), heads(1100)
    with torch.no_grad():
        others = tuple(torch.where((segments == 1)[:, None, :, None], x, x * 3 + 1) for x in inputs)
    others = tuple(x.requires_grad_() for x in others)
    inside = (segments == 1)[:, None, :, None]
    out, changed = (attend(*x, mask, kernel) for x in (inputs, others))
    assert torch.equal(*(x[inside.expand_as(x)] for x in (out, changed)))
    for ours, theirs in zip(gradients(out, inputs), gradients(changed, others), strict=True):
        assert torch.equal(*(x[inside.expand_as(x)] for x in (ours, theirs)))


def test_bfloat16_is_as_close_as_torchs_own() -> None:
    """Scores are rounded once more than in a flash kernel, which costs less than twice its error."""
    exact = heads(512)
    with torch.no_grad():
        truth = attend(*exact, None, "sdpa")
        rounded = [x.bfloat16() for x in exact]
        error = {
            kernel: float((attend(*rounded, None, kernel) - truth).norm() / truth.norm())
            for kernel in ("blocked", "sdpa")
        }
    assert error["sdpa"] < 0.005
    assert error["blocked"] < 2 * error["sdpa"]


@pytest.mark.parametrize(("time", "block"), [(1, 128), (512, 128), (1024, 128), (2048, 256), (2049, 257)])
def test_a_row_has_at_most_eight_blocks(time: int, block: int) -> None:
    assert attention._block_size(time) == block


# ---- tiles ----

SEGMENTS = st.integers(1, 900).flatmap(
    lambda time: st.lists(
        st.lists(st.integers(1, 600), min_size=1, max_size=40).map(lambda lengths: _fill(lengths, time)),
        min_size=1,
        max_size=4,
    )
)


def _fill(lengths: list[int], time: int) -> list[int]:
    """Lengths repeated until a row is full."""
    ends = np.minimum(np.cumsum(np.resize(lengths, time)), time)
    return [int(n) for n in np.diff(np.unique(ends), prepend=0)]


def pairs(tiles: list[Tile], runs: Tensor) -> Tensor:
    """[B, T, T] how many tiles let a query see a key."""
    rows, time = runs.shape
    seen = torch.zeros(rows, time, time, dtype=torch.long)
    for tile in tiles:
        at = slice(tile.first_row, tile.end_row), slice(tile.start, tile.end), slice(tile.keys, tile.end)
        part = torch.ones(rows, time, time, dtype=torch.bool).tril()
        if tile.is_mixed:
            part &= runs[:, :, None] == runs[:, None, :]
        seen[at] += part[at].long()
    return seen


@given(SEGMENTS, st.sampled_from(["blocked", "sdpa"]), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_tiles_hold_each_visible_pair_once_and_no_other(rows: list[list[int]], kernel: AttentionKernel, H: int) -> None:
    runs = of_lengths(*rows)
    mask = segment_mask(runs + 5, kernel, H)
    assert isinstance(mask, TiledMask)
    assert torch.equal(mask.runs, runs.int())
    assert torch.equal(pairs(mask.listed(), runs), dense_mask(runs).squeeze(1).long())
    one = segment_mask(torch.zeros_like(runs), kernel, H)
    assert isinstance(one, TiledMask)
    assert one.tiles.shape == mask.tiles.shape, "a compiled block would be compiled anew"


def test_rows_of_one_segment_are_the_blocks_that_they_are_without_a_mask() -> None:
    mask = segment_mask(torch.full((3, 1100), 4), "blocked", 4)
    assert isinstance(mask, TiledMask)
    assert mask.listed() == list(attention._blocks(3, 1100, is_mixed=False))


def test_documents_of_500_tokens_cost_a_third_of_the_pairs() -> None:
    mask = segment_mask(of_documents(500, 2048), "blocked", 4)
    assert isinstance(mask, TiledMask)

    def multiplied(tiles: list[Tile]) -> int:
        return sum((t.end_row - t.first_row) * (t.end - t.start) * (t.end - t.keys) for t in tiles)

    assert multiplied(mask.listed()) < 0.34 * multiplied(list(attention._blocks(2, 2048, is_mixed=False)))


def test_positions_begin_anew_with_each_segment() -> None:
    segments = torch.tensor([[3, 3, 3, 7, 7, 8], [0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 0, 0]])
    expected = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]])
    assert torch.equal(positions_in(segments), expected)


def test_equal_numbers_apart_are_segments_apart() -> None:
    apart, counted = torch.tensor([[0] * 5 + [1] * 5 + [0] * 5]), of_lengths([5, 5, 5])
    inputs = tuple(x[:1] for x in heads(15))
    for kernel in KERNELS:
        found = attend(*inputs, segment_mask(apart, kernel, 4), kernel)
        torch.testing.assert_close(found, reference(*inputs, counted))


# ---- blocks for GPUs ----


@given(SEGMENTS)
@settings(deadline=None, max_examples=60)
def test_blocks_are_skipped_or_seen_whole_exactly_where_all_their_pairs_are(rows: list[list[int]]) -> None:
    runs = of_lengths(*rows)
    mask, block = block_mask(runs), attention._FLEX_BLOCK
    count = -(-runs.size(1) // block)
    exact = torch.nn.functional.pad(dense_mask(runs).squeeze(1), (0, count * block - runs.size(1)) * 2)
    exact = exact.view(len(runs), count, block, count, block).transpose(2, 3).flatten(3)
    listed = {
        "partial": (mask.kv_num_blocks, mask.kv_indices),
        "whole": (mask.full_kv_num_blocks, mask.full_kv_indices),
    }
    chosen = {}
    for name, (numbers, indices) in listed.items():
        assert numbers is not None
        assert indices is not None
        flags = torch.zeros(len(runs), count, count + 1, dtype=torch.bool)
        used = torch.where(torch.arange(count) < numbers.squeeze(1)[..., None], indices.squeeze(1), count)
        chosen[name] = flags.scatter_(2, used.long(), True)[..., :count]
    assert not (chosen["partial"] & chosen["whole"]).any()
    assert torch.equal(chosen["partial"] | chosen["whole"], exact.any(-1))
    assert (exact.all(-1) | ~chosen["whole"]).all()


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "none"])
def test_blocks_let_queries_see_what_a_dense_mask_does(layout: str, kv_heads: int) -> None:
    inputs, segments = [x.detach() for x in heads(300, kv_heads)], LAYOUTS[layout](300)
    found = attend(*inputs, block_mask(segments), "flex")
    torch.testing.assert_close(found, reference(*inputs, segments), rtol=1e-4, atol=1e-5)


def test_other_segments_compile_no_block_anew() -> None:
    """Neither the lists of blocks nor the segments may be part of a program: asked of the compiler's front end."""
    inputs = [x.detach() for x in heads(300)]
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", dynamic=False, fullgraph=True)
    compiled(*inputs, block_mask(of_documents(50, 300)), "flex")
    with torch.compiler.set_stance("fail_on_recompile"):
        for segments in (of_documents(290, 300), of_documents(7, 300), torch.zeros(2, 300, dtype=torch.long)):
            found = compiled(*inputs, block_mask(segments), "flex")
            torch.testing.assert_close(found, reference(*inputs, segments), rtol=1e-4, atol=1e-5)
