"""The optimizer step: forward and backward over a batch in as many passes as its rows need, then the update.

The result does not depend on the device batch size or the number of ranks: losses are summed over all targets and
divided once. The module imports torch alone, so that a machine without anything else can time it.

Not here: what comes before and after a step (`bwlm/train/loop.py`), schedules (`optim.py`).

Axes: R rows of this rank, T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bwlm.model.gpt import GPT
from bwlm.model.loss import Losses
from bwlm.model.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step over all ranks; only `token_losses` and `predicted` are this rank's."""

    loss: float
    """Nats per target."""
    grad_norm: float
    """Global norm before clipping."""
    token_losses: Tensor
    """Nats of each target [R, T], 0 where there is no target."""
    predicted: Tensor
    """Likeliest id at each place of this rank [R, T]; empty unless it was asked for."""
    asked_to_stop: bool
    """True if any rank was asked to stop."""

    @property
    def is_finite(self) -> bool:
        """True if loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainStep:
    """Trains a model that is on its device, on one rank or as one of the ranks of the default process group."""

    def __init__(self, model: GPT, optimizer: Optimizer, micro_rows: int, grad_clip: float, world: int = 1) -> None:
        """Prepare the steps; `micro_rows` is the device batch size, `grad_clip` a global norm, 0 for no clipping."""
        self.model = model
        self.optimizer = optimizer
        self.micro_rows = micro_rows
        self._grad_clip = grad_clip or math.inf
        self._world = world
        self._loss = self._distributed(_Loss(model)) if world > 1 else _Loss(model)

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        importance: Tensor | None = None,
        stop: bool = False,
        predict: bool = False,
        before_update: Callable[[Tensor], None] = lambda token_losses: None,
    ) -> StepResult:
        """Compute the gradients of the mean loss over all ranks' targets, clip them and update once; return the result.

        Skips the update when a gradient is not finite, and when every gradient is zero, as when no sample of RL is
        better than another: Muon's momentum alone would still move the weights at full size.

        `inputs`, `targets` and `segments` are [R, T]; a target of -1 is ignored, and `importance` [R, T] weights each
        loss in the sum, not in the number of targets. `stop` says that this rank was asked to end. `before_update` is
        called with this rank's `token_losses` when the gradients are complete and not yet clipped: a read from the
        device there does not wait for the update.
        """
        counts = torch.tensor([0, stop], device=inputs.device)
        counts[0] = (targets >= 0).sum()
        self._sum_over_ranks(counts)
        total, each, predicted = torch.zeros((), device=inputs.device), [], []
        for start in range(0, len(inputs), self.micro_rows):
            rows = slice(start, start + self.micro_rows)
            with self._synchronised(last=start + self.micro_rows >= len(inputs)):
                optional = [None if tensor is None else tensor[rows] for tensor in (segments, importance)]
                losses = self._loss(inputs[rows], targets[rows], *optional, predict)
                # DistributedDataParallel averages over ranks, hence times their number: targets weigh alike everywhere
                (losses.total * (self._world / counts[0])).backward()
            total += losses.total.detach()
            each.append(losses.each)
            predicted.append(losses.predicted)
        self._sum_over_ranks(total)
        token_losses = torch.cat(each)
        before_update(token_losses)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        result = StepResult(float(total / counts[0]), float(norm), token_losses, torch.cat(predicted), bool(counts[1]))
        if result.is_finite and result.grad_norm > 0:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    @staticmethod
    def _distributed(loss: _Loss) -> DistributedDataParallel:
        # no broadcast: the only buffers are RoPE tables, which every rank computes itself
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, broadcast_buffers=False)

    def _sum_over_ranks(self, value: Tensor) -> None:
        if self._world > 1:
            dist.all_reduce(value)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are exchanged between ranks only in the last pass."""
        if last or not isinstance(self._loss, DistributedDataParallel):
            return nullcontext()
        return self._loss.no_sync()


class _Loss(nn.Module):
    """Summed loss as a module: DistributedDataParallel averages the gradients of what a module's forward computes."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Tensor, targets: Tensor, segments: Tensor | None, importance: Tensor | None, predict: bool
    ) -> Losses:
        return self.model.loss(inputs, targets, segments, predict, importance)
