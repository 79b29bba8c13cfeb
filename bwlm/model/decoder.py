"""The forward pass of decoding: the GPT's numbers with few operations, since small ones cost more to start than to do.

Of one token a CPU multiplies each matrix in microseconds. So query, key and value are one matrix here, a residual is
added by the product that it follows, embeddings are normed once, and RoPE turns pairs as complex numbers. Matrices are
stored as inputs x outputs: a CPU multiplies few rows by them up to twice as fast.

Axes: B rows, T ids, C width, H heads, K kv heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.gpt import GPT, NORM_EPS, Block, norm
from bwlm.model.loss import LOGIT_CAP

CachedAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer: [B, H, T, D] for its number, q [B, H, T, D], k and v [B, K, T, D]."""


class Matrix:
    """Weight [outputs, inputs] as few rows are multiplied by it, stored as inputs x outputs."""

    def __init__(self, weight: Tensor) -> None:
        self.stored = weight.t().contiguous()

    def times(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the products [.., outputs] of x [.., inputs], plus what is `added`."""
        return x @ self.stored if added is None else torch.addmm(added, x, self.stored)


class _Layer(NamedTuple):
    qkv: Matrix
    output: Matrix
    up: Matrix
    down: Matrix


class Decoder:
    """Weights of a model, as they are when it is made, laid out for reading few ids at a time."""

    def __init__(self, model: GPT, layout: type[Matrix] = Matrix) -> None:
        self.dtype, self._layout = model.compute_dtype, layout
        config = model.config
        self._head_dim, self._width = config.head_dim, config.heads * config.head_dim
        self._turned_width = self._width + config.kv_heads * config.head_dim
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.kernel = blocks[0].attention.kernel
        with torch.no_grad():
            self._embedding = norm(model.embedding.weight.to(self.dtype))
            self._layers = [self._layer(block) for block in blocks]
            self._head = self._laid_out(model.lm_head.weight)
        self._turns = torch.complex(model.cos, -model.sin)
        """[T, D/2], RoPE's rotation of each pair; `gpt.rotate` turns by minus the angle too."""
        device = model.embedding.weight.device
        self._mean = {size: torch.full((size, 1), 1 / size, device=device) for size in (config.width, config.head_dim)}
        self._eps = torch.full((1,), NORM_EPS, device=device)

    def states(self, ids: Tensor, places: Tensor, attention: CachedAttention) -> Tensor:
        """Return the normed states [B, T, C] that the head reads, for ids and their places in the rows, both [B, T]."""
        rows, time = ids.shape
        turns = self._turns[places].view(rows * time, 1, -1)
        x = self._embedding[ids.flatten()]  # [B T, C]
        for number, layer in enumerate(self._layers):
            q, k, v = self._turned(layer.qkv.times(self._norm(x)), turns)
            y = attention(number, *(self._split(part, rows, time) for part in (q, k, v)))
            x = layer.output.times(self._joined(y), x)
            h = F.relu_(layer.up.times(self._norm(x)))
            x = layer.down.times(h.mul_(h), x)
        return self._norm(x).view(rows, time, -1)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [.., V] of states [.., C]."""
        return softcap_(self._head.times(states))

    def _turned(self, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [N, H D], k and v [N, K D] of their product [N, (H + 2 K) D]; q and k are rotated and normed."""
        pairs = qkv[:, : self._turned_width].float().view(len(qkv), -1, self._head_dim // 2, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns).view(-1, self._head_dim)
        normed = self._norm(turned.to(self.dtype)).view(len(qkv), -1)
        return normed[:, : self._width], normed[:, self._width :], qkv[:, self._turned_width :]

    def _split(self, x: Tensor, rows: int, time: int) -> Tensor:
        """Return [B, H, T, D] of x [B T, H D]; without a copy where T is 1."""
        if time == 1:
            return x.view(rows, -1, 1, self._head_dim)
        return x.view(rows, time, -1, self._head_dim).transpose(1, 2)

    def _joined(self, y: Tensor) -> Tensor:
        """Return [B T, H D] of y [B, H, T, D]."""
        if y.size(2) > 1:
            y = y.transpose(1, 2)
        return y.reshape(-1, self._width).to(self.dtype)

    def _norm(self, x: Tensor) -> Tensor:
        """Return the RMSNorm of x [N, C]; in float32 by a product with 1/C, in half the time of torch's own."""
        if self.dtype != torch.float32:
            return norm(x)
        return x * torch.addmm(self._eps, x * x, self._mean[x.size(1)]).rsqrt_()

    def _layer(self, block: Block) -> _Layer:
        attention, mlp = block.attention, block.mlp
        query, key = (self._paired(linear.weight) for linear in (attention.query, attention.key))
        qkv = torch.cat([query, key, attention.value.weight])
        return _Layer(*map(self._laid_out, (qkv, attention.output.weight, mlp.up.weight, mlp.down.weight)))

    def _paired(self, weight: Tensor) -> Tensor:
        """Return the weight [H D, C] with the members of each pair, D/2 apart, side by side, as complex numbers stand.

        Queries and keys are reordered alike, so their products stay the same.
        """
        halves = weight.view(-1, 2, self._head_dim // 2, weight.size(1))
        return halves.transpose(1, 2).reshape(weight.shape)

    def _laid_out(self, weight: Tensor) -> Matrix:
        return self._layout(weight.detach().to(self.dtype))


def softcap_(logits: Tensor) -> Tensor:
    """Return `loss.softcap` of logits, bit for bit, written over them if they are float32: in a tenth of the time."""
    return logits.float().mul_(2 / LOGIT_CAP).sigmoid_().mul_(2 * LOGIT_CAP).sub_(LOGIT_CAP)
