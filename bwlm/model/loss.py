"""Cross-entropy of capped logits, straight from the last hidden states.

The fused loss never holds all logits: it takes some tokens at a time and computes their gradients while their logits
are still in the CPU's or GPU's cache (as Liger Kernel does, arXiv:2410.10989). The plain loss keeps all logits, as
nanochat does.

Axes: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_CAP = 15.0  # nanochat's
IGNORED = -1

ChunkGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Losses(NamedTuple):
    """Losses of N targets, or of targets [B, T]."""

    total: Tensor
    """Sum in nats, each loss times its weight; the only field with a gradient."""
    each: Tensor
    """Nats of each target, 0 where there is no target."""
    predicted: Tensor
    """Id with the largest logit at each place; empty unless it was asked for."""


def softcap(logits: Tensor) -> Tensor:
    """Return 15 tanh(logits / 15), in float32, to about 2e-6.

    Computed as 30 sigmoid(2 logits / 15) - 15: the same function, in two thirds of the time on CPUs.
    """
    return torch.sigmoid(logits.float() * (2 / LOGIT_CAP)) * (2 * LOGIT_CAP) - LOGIT_CAP


def plain_loss(
    x: Tensor, weight: Tensor, targets: Tensor, predict: bool = False, importance: Tensor | None = None
) -> Losses:
    """Return the cross-entropy of targets [N] given x [N, C] and weight [V, C]; `importance` [N] weights the sum.

    A target of -1 costs 0. The result is a sum, not a mean: only sums add up over ranks and micro-batches with
    unequal numbers of targets.
    """
    logits = F.linear(x, weight.to(x.dtype))
    losses = F.cross_entropy(softcap(logits), targets, ignore_index=IGNORED, reduction="none")
    return Losses(_sum(losses, importance), losses.detach(), _largest(logits.detach(), predict))


def _sum(losses: Tensor, importance: Tensor | None) -> Tensor:
    return losses.sum() if importance is None else (losses * importance).sum()


def _largest(logits: Tensor, wanted: bool) -> Tensor:
    """Return the id with the largest logit; the softcap keeps the order, so logits before the cap are enough."""
    return logits.max(-1).indices if wanted else torch.empty(0, dtype=torch.long, device=logits.device)


def fused_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    predict: bool = False,
    gradient: ChunkGradient | None = None,
    importance: Tensor | None = None,
) -> Losses:
    """Return the same as `plain_loss`, computed `chunk` tokens at a time. The sum can be differentiated only once.

    `gradient` is `chunk_gradient` or a compiled form of it.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Losses(
            *_Fused.apply(  # type: ignore[no-untyped-call]
                x, weight, targets, chunk, predict, gradient or chunk_gradient, importance
            )
        )
    multiplied = weight.to(x.dtype)
    parts = [plain_loss(x[i : i + chunk], multiplied, targets[i : i + chunk], predict) for i in range(0, len(x), chunk)]
    each = torch.cat([part.each for part in parts])
    return Losses(_sum(each, importance), each, torch.cat([part.predicted for part in parts]))


def chunk_gradient(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each target [N], the gradient of their sum by the uncapped logits [N, V], and these logits.

    With z = tanh(logits / 15), p = softmax(15 z) and y the target, the gradient is (p - 1[y]) (1 - z^2). The cap
    bounds 15 z, so the softmax does not need to subtract the maximum.
    """
    logits = F.linear(x, weight)
    z = logits.to(torch.float32, copy=True).mul_(2 / LOGIT_CAP).sigmoid_().mul_(2).sub_(1)  # as in `softcap`
    p = z.mul(LOGIT_CAP)
    valid, index = targets >= 0, targets.clamp_min(0)[:, None]
    wanted = p.gather(1, index).squeeze(1)
    total = p.exp_().sum(1)
    losses = torch.where(valid, total.log() - wanted, 0.0)
    p.mul_((valid / total)[:, None])
    if torch.compiler.is_compiling():  # a scatter would end the fused kernel: p would pass a GPU's memory twice
        p = p - (torch.arange(p.size(1), device=p.device) == targets[:, None]).to(p.dtype)
    else:
        p.scatter_add_(1, index, -valid.to(p.dtype)[:, None])
    return losses, p.mul_(z.square_().neg_().add_(1)).to(x.dtype), logits


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        predict: bool,
        gradient: ChunkGradient,
        importance: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        multiplied = weight.to(x.dtype)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        losses, predictions = [], []
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            loss, dlogits, logits = gradient(x[here], multiplied, targets[here])
            losses.append(loss)
            if importance is not None:
                dlogits = dlogits * importance[here, None].to(dlogits.dtype)
            # outside of `gradient`, which may be compiled: asking for predictions must not change a run's rounding
            predictions.append(_largest(logits, predict))
            dx[here] = dlogits @ multiplied
            dweight += dlogits.T @ x[here]
        each, largest = torch.cat(losses), torch.cat(predictions)
        ctx.gradients = dx, dweight
        ctx.mark_non_differentiable(each, largest)
        return _sum(each, importance), each, largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        dx, dweight = ctx.gradients
        ctx.gradients = None  # a second backward pass would scale them again
        return dx.mul_(grads[0]), dweight.mul_(grads[0]), None, None, None, None, None
