"""One optimizer step: forward and backward over a batch in as many passes as its rows need, then the update.

It is the same batch whatever the device batch size and the number of ranks: losses are summed over all targets and
divided once. Knows torch alone, so that a machine without anything else can time it.

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
    """What a step was like, over all ranks; only `token_losses` are this rank's."""

    loss: float
    """Nats per target."""
    grad_norm: float
    """Before clipping."""
    token_losses: Tensor
    """Nats of each target [R, T], 0 where there is none."""
    predicted: Tensor
    """The likeliest id at each place of this rank [R, T]; empty unless it was asked for."""
    asked_to_stop: bool
    """Whether any rank was."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainStep:
    """Trains a model that is on its device, alone or as one of the ranks of the default process group."""

    def __init__(self, model: GPT, optimizer: Optimizer, micro_rows: int, grad_clip: float, world: int = 1) -> None:
        """`micro_rows` is the device batch size; `grad_clip` a global norm, 0 for none."""
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
        """Gradients of the mean loss over all ranks' targets, clipped, and one update unless they are not finite.

        Nor is there one where they are all zero, as where no sample of RL is better than another: of its momentum alone
        Muon would move the weights as far as ever.

        inputs, targets and segments [R, T]; a target of -1 is none, and `importance` [R, T] weighs each loss in the
        sum, not in the number of targets. `stop` says that this rank was asked to end.
        `before_update` is called when they are complete and not yet clipped, with what will be `token_losses`: what is
        read from the device there does not wait for the update.
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
                # ranks are averaged afterwards, hence times their number: each target weighs the same on every rank
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
        # the only buffers are tables of angles, which every rank makes for itself
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, broadcast_buffers=False)

    def _sum_over_ranks(self, value: Tensor) -> None:
        if self._world > 1:
            dist.all_reduce(value)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel with the last pass only."""
        if last or not isinstance(self._loss, DistributedDataParallel):
            return nullcontext()
        return self._loss.no_sync()


class _Loss(nn.Module):
    """The summed loss as a module, since DistributedDataParallel averages gradients of what its forward computes."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Tensor, targets: Tensor, segments: Tensor | None, importance: Tensor | None, predict: bool
    ) -> Losses:
        return self.model.loss(inputs, targets, segments, predict, importance)
