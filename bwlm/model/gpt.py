"""The GPT: nanochat's architecture of 2025, which transformers ships as `NanoChatForCausalLM`.

RoPE and then QK-norm, a norm after the embedding, RMSNorm without weights, ReLU squared, no biases, an untied head,
logits capped at 15. The model predicts position t + 1 from positions up to t and does not know the order in which the
ids of a text are read.

Not here: sizes and costs (`shape.py`), the kernels of attention and loss (`attention.py`, `loss.py`), the choice
among them (`compute.py`), optimizers (`optim.py`), the KV cache (`kv_cache.py`), decoding (`generate.py`).

Axes: B batch, T time, C width, H heads, K kv heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.attention import AttentionKernel, Mask, attend, positions_in, segment_mask
from bwlm.model.compute import SMALLEST_FLEX_HEAD
from bwlm.model.loss import ChunkGradient, Losses, chunk_gradient, fused_loss, plain_loss, softcap
from bwlm.model.shape import GPTConfig

NORM_EPS = 1.1920929e-07  # float32's, in every compute dtype
ROPE_BASE = 10_000

Rope = tuple[Tensor, Tensor]  # cos, sin: [T, D/2], or [B, 1, T, D/2] where rows have positions of their own
Attend = Callable[[Tensor, Tensor, Tensor, Mask, AttentionKernel], Tensor]  # `attend`, or the KV cache's form of it


class KVState(NamedTuple):
    """State for incremental decoding.

    RoPE tables at each row's positions, and one cached-attention function per layer.
    """

    rope: Rope
    attends: Sequence[Attend]


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm over the last axis, without weights (Zhang & Sennrich, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rope_tables(sequence_length: int, head_dim: int) -> Rope:
    """Return cos and sin [T, D/2], float32, of RoPE (Su et al., arXiv:2104.09864).

    Pair i at position t has angle t * base^(-2i/D).
    """
    frequencies = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(sequence_length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [B, H, T, D] by minus their angle.

    This is nanochat's sign, the opposite of Llama's.
    """
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Linear(nn.Linear):
    """Matrix without bias, kept in float32 and multiplied in the dtype of its input, as in nanochat.

    This is autocast without its cache and its lists: the optimizer sees float32, the matmul the dtype of the
    activations.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Fill the matrix with NaN, until `GPT.init_weights` or a checkpoint fills it."""
        nn.init.constant_(self.weight, torch.nan)  # until init_weights

    def forward(self, x: Tensor) -> Tensor:
        """Return x [.., inputs] times the matrix: [.., outputs], in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Table of vectors [V, C] in float32."""

    def reset_parameters(self) -> None:
        """Fill the table with NaN, until `GPT.init_weights` or a checkpoint fills it."""
        nn.init.constant_(self.weight, torch.nan)  # until init_weights


class Attention(nn.Module):
    """Causal self-attention; with fewer kv heads than heads, groups of heads share one (GQA, arXiv:2305.13245)."""

    def __init__(self, config: GPTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kernel = kernel
        self.query = Linear(config.width, config.heads * config.head_dim)
        self.key = Linear(config.width, config.kv_heads * config.head_dim)
        self.value = Linear(config.width, config.kv_heads * config.head_dim)
        self.output = Linear(config.heads * config.head_dim, config.width)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, attend: Attend = attend) -> Tensor:
        """Return [B, T, C] for x [B, T, C]; with the mask of segments, attention stays inside them."""
        y = attend(*self.qkv(x, rope), mask, self.kernel)
        out: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return out

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, H, T, D] and k, v [B, K, T, D] for x [B, T, C]; q and k are rotated first, then normed."""
        q, k, v = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        return norm(rotate(q, rope)), norm(rotate(k, rope)), v

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """Feed-forward layer: up to 4C, ReLU squared (So et al., Primer, arXiv:2109.08668), down to C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, C] for x [B, T, C]."""
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class Block(nn.Module):
    """Layer of the residual stream: attention, then MLP, each added to its input."""

    def __init__(self, config: GPTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention = Attention(config, kernel)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, attend: Attend = attend) -> Tensor:
        """Return the residual stream [B, T, C] after the layer, for x [B, T, C] before it."""
        x = x + self.attention(norm(x), rope, mask, attend)
        out: Tensor = x + self.mlp(norm(x))
        return out


class GPT(nn.Module):
    """The whole model. Weights are float32; activations run in `compute_dtype`; logits come out in float32.

    A new model holds NaN, so that a model without initialised or loaded weights cannot pass for a trained one.
    `attention` and `loss_chunk` (tokens whose logits exist at once in a loss; 0: all) change how it computes, not
    what. Raises `ValueError` for any `compute_dtype` but float32 and bfloat16.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        attention: AttentionKernel = "sdpa",
        loss_chunk: int = 0,
    ) -> None:
        super().__init__()
        if compute_dtype not in (torch.float32, torch.bfloat16):
            # float16 would underflow: the training step has no gradient scaler
            raise ValueError(f"compute_dtype must be torch.float32 or torch.bfloat16, not {compute_dtype}")
        self.config = config
        self.compute_dtype = compute_dtype
        self._kernel = attention
        self.loss_chunk = loss_chunk
        self._chunk_gradient: ChunkGradient = chunk_gradient
        self._is_compiled = False
        self.embedding = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.lm_head = Linear(config.width, config.vocab_size)
        cos, sin = rope_tables(config.sequence_length, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V] for the id after each of ids [B, T] (int64).

        With `segments` [B, T], an integer per position, attention stays inside each run of equal integers, and
        positions count from its beginning: so a segment gives the same logits wherever it stands. Without, each row
        is one segment. Raises `ValueError` if the shapes do not fit.
        """
        return softcap(self.lm_head(self._hidden(ids, segments)))

    def next_logits(self, ids: Tensor, last: Tensor, past: KVState) -> Tensor:
        """Return logits [B, V] for the id after place `last` [B] of ids [B, T]; the ids continue the rows of `past`."""
        rows = torch.arange(len(ids), device=ids.device)
        return softcap(self.lm_head(self._hidden(ids, None, past)[rows, last]))

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        predict: bool = False,
        importance: Tensor | None = None,
    ) -> Losses:
        """Return the cross-entropy in nats of targets [B, T] given ids [B, T]; with `predict` also the likeliest ids.

        A target of -1 costs 0; `importance` [B, T] is each target's weight in the sum. Raises `ValueError` as
        `forward` does.
        """
        x, flat = self._hidden(ids, segments).flatten(0, 1), targets.flatten()
        weights = None if importance is None else importance.flatten()
        if self.loss_chunk:
            losses = fused_loss(x, self.lm_head.weight, flat, self.loss_chunk, predict, self._chunk_gradient, weights)
        else:
            losses = plain_loss(x, self.lm_head.weight, flat, predict, weights)
        predicted = losses.predicted.view_as(targets) if predict else losses.predicted
        return Losses(losses.total, losses.each.view_as(targets), predicted)

    def compile_training(self) -> None:
        """Compile blocks and loss for training; in evaluation mode the model still runs uncompiled.

        The blocks share one compiled program, so that compilation time does not grow with depth.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self._chunk_gradient = torch.compile(chunk_gradient, dynamic=False)
        self._is_compiled = True

    def states(self, ids: Tensor, segments: Tensor | None = None, past: KVState | None = None) -> Iterator[Tensor]:
        """Yield the residual stream [B, T, C]: after the embedding, then after each block.

        Raises `ValueError` as `forward` does.
        """
        self._check(ids, segments)
        rope, attends = past or (self.rope(ids.size(1), segments), repeat(attend))
        has_blocks = self.training and self._is_compiled and self.config.head_dim >= SMALLEST_FLEX_HEAD
        mask = segment_mask(segments, self._kernel, self.config.heads, has_blocks)
        x = norm(self.embedding(ids).to(self.compute_dtype))
        yield x
        for block, attending in zip(self.blocks, attends, strict=False):
            x = (block if self.training else block.forward)(x, rope, mask, attending)
            yield x

    def rope(self, time: int, segments: Tensor | None = None) -> Rope:
        """Return the RoPE tables of positions 0 to `time` - 1 or, with segments [B, T], of each place in its segment.

        Positions are looked up before the cast to `compute_dtype`, so that a segment gets the same angles wherever it
        stands.
        """
        if segments is None:
            return self.cos[:time].to(self.compute_dtype), self.sin[:time].to(self.compute_dtype)
        positions = positions_in(segments)
        cos, sin = (table[positions][:, None].to(self.compute_dtype) for table in (self.cos, self.sin))
        return cos, sin

    def _hidden(self, ids: Tensor, segments: Tensor | None, past: KVState | None = None) -> Tensor:
        """Return the normed states [B, T, C] that the head reads."""
        for x in self.states(ids, segments, past):
            last = x  # earlier states are dropped
        return norm(last)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise as nanochat does (its `GPT.init_weights`, of 2026).

        One seed gives the same weights on every device. Embedding N(0, 0.8), head N(0, 0.001), query, key and value
        uniform with standard deviation 1/sqrt(C), `up` 0.4 times that, and zeros for the matrices that write into the
        residual stream, so that each block begins as the identity.
        """
        generator = torch.Generator().manual_seed(seed)
        _fill_normal(self.embedding.weight, 0.8, generator)
        bound = (3 / self.config.width) ** 0.5  # a uniform of this bound has variance 1/C, and no outliers
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.query, block.attention.key, block.attention.value):
                _fill_uniform(linear.weight, bound, generator)
            _fill_uniform(block.mlp.up.weight, 0.4 * bound, generator)
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.mlp.down.weight)
        _fill_normal(self.lm_head.weight, 0.001, generator)

    def _check(self, ids: Tensor, segments: Tensor | None) -> None:
        if ids.ndim != 2:
            raise ValueError(f"ids must be [B, T], not of shape {tuple(ids.shape)}")
        if ids.size(1) > self.config.sequence_length:
            raise ValueError(f"{ids.size(1)} ids in a row, but sequence_length is {self.config.sequence_length}")
        if segments is not None and segments.shape != ids.shape:
            raise ValueError(f"segments have shape {tuple(segments.shape)}, ids {tuple(ids.shape)}")


def _fill_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    # drawn on the CPU and copied: generators of other devices give other numbers for the same seed
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def _fill_uniform(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
