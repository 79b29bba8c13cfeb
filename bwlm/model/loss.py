"""Cross-entropy of capped logits, straight from the last hidden states.

The fused loss never holds all logits: it takes some tokens at a time, and computes their gradients while their logits
are still in the cache (as Liger Kernel does, arXiv:2410.10989). The plain one keeps all of them, as nanochat does.

Axes: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_CAP = 15.0  # nanochat's
IGNORED = -1

ChunkGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cap(logits: Tensor) -> Tensor:
    """15 tanh(logits / 15), float32."""
    return LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over targets, and the loss of each [N], in nats; x [N, C], weight [V, C], targets [N].

    A target of -1 costs 0. No mean: ranks and micro-batches with unequal numbers of targets add up only as sums.
    """
    losses = F.cross_entropy(cap(F.linear(x, weight.to(x.dtype))), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(), losses.detach()


def fused_loss(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int, gradient: ChunkGradient | None = None
) -> tuple[Tensor, Tensor]:
    """What `plain_loss` gives, `chunk` tokens at a time. Only the sum has a gradient, and only once.

    `gradient` is `chunk_gradient` or a compiled form of it.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        fused: tuple[Tensor, Tensor] = _Fused.apply(  # type: ignore[no-untyped-call]
            x, weight, targets, chunk, gradient or chunk_gradient
        )
        return fused
    multiplied = weight.to(x.dtype)
    starts = range(0, len(x), chunk)
    losses = torch.cat([plain_loss(x[i : i + chunk], multiplied, targets[i : i + chunk])[1] for i in starts])
    return losses.sum(), losses


def chunk_gradient(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each target [N], and the gradient of their sum by the logits before the cap [N, V].

    With z = tanh(logits / 15), p = softmax(15 z) and y the target: (p - 1[y]) (1 - z^2). The cap bounds 15 z, so that
    the softmax needs no maximum.
    """
    z = F.linear(x, weight).float().div_(LOGIT_CAP).tanh_()
    p = z.mul(LOGIT_CAP)
    valid, index = targets >= 0, targets.clamp_min(0)[:, None]
    wanted = p.gather(1, index).squeeze(1)
    total = p.exp_().sum(1)
    losses = torch.where(valid, total.log() - wanted, 0.0)
    p.mul_((valid / total)[:, None]).scatter_add_(1, index, -valid.to(p.dtype)[:, None])
    return losses, p.mul_(z.square_().neg_().add_(1)).to(x.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, gradient: ChunkGradient
    ) -> tuple[Tensor, Tensor]:
        multiplied = weight.to(x.dtype)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        losses = []
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            loss, dlogits = gradient(x[here], multiplied, targets[here])
            losses.append(loss)
            dx[here] = dlogits @ multiplied
            dweight += dlogits.T @ x[here]
        each = torch.cat(losses)
        ctx.gradients = dx, dweight
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dweight = ctx.gradients
        ctx.gradients = None  # a second pass would scale them again
        return dx.mul_(grads[0]), dweight.mul_(grads[0]), None, None, None
