"""Causal self-attention over whole rows, by one of two kernels that compute the same.

'sdpa' is torch's `scaled_dot_product_attention`: on a GPU flash attention, its own or cuDNN's. 'blocked' is for CPUs,
where torch's kernel multiplies slowly: blocks of queries against the keys up to them, as plain batched matmuls, with
the probabilities kept for the backward pass. It holds about B H T^2 / 2 of them, so it is not for very long rows.

Axes: B batch, T time, H heads, K kv heads, D head dimension, S keys up to the end of a block, Q queries of a block.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKernel = Literal["sdpa", "blocked"]

_SMALLEST_BLOCK = 128
_MOST_BLOCKS = 8


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, kernel: AttentionKernel) -> Tensor:
    """q [B, H, T, D], k and v [B, K, T, D] to [B, H, T, D]; K divides H.

    A query sees the keys that are not later than itself and, with segments [B, T], of its own segment.
    """
    grouped = k.size(1) < q.size(1)
    if kernel == "blocked":
        if grouped:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        out: Tensor = _Blocked.apply(q, k, v, segments)  # type: ignore[no-untyped-call]
        return out
    mask = None if segments is None else segment_mask(segments)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def segment_mask(segments: Tensor) -> Tensor:
    """[B, T] segment ids to [B, 1, T, T]: True where a query (row) may look at a key: not later, same segment."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


def _block_size(time: int) -> int:
    """Small blocks waste less above the diagonal, large ones multiply faster."""
    return max(_SMALLEST_BLOCK, -(-time // _MOST_BLOCKS))


class _Blocked(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v and its gradient, block by block: no key after a block is ever multiplied."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
        block, time = _block_size(q.size(2)), q.size(2)
        q, k, v = q * q.size(-1) ** -0.5, k.contiguous(), v.contiguous()
        out = torch.empty_like(v)
        probabilities = []
        for start in range(0, time, block):
            end = min(start + block, time)
            scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)  # [B, H, Q, S]
            _hide(scores, start, segments)
            p = torch.softmax(scores, -1)
            out[:, :, start:end] = p @ v[:, :, :end]
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        dout = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for p in probabilities:
            end = p.size(-1)
            here = dout[:, :, start:end]
            dscores = torch._softmax_backward_data(here @ v[:, :, :end].transpose(-1, -2), p, -1, p.dtype)
            dq[:, :, start:end] = dscores @ k[:, :, :end]
            dk[:, :, :end] += dscores.transpose(-1, -2) @ q[:, :, start:end]
            dv[:, :, :end] += p.transpose(-1, -2) @ here
            start = end
        return dq.mul_(q.size(-1) ** -0.5), dk, dv, None


def _hide(scores: Tensor, start: int, segments: Tensor | None) -> None:
    """Sets scores [B, H, Q, S] of queries start.. to -inf at later keys and at those of other segments."""
    queries, keys = scores.shape[-2:]
    later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    if segments is not None:
        other = segments[:, None, start:keys, None] != segments[:, None, None, :keys]
        scores.masked_fill_(other, -torch.inf)
