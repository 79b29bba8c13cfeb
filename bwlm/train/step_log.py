"""The research log's entries of a training step, gathered from all ranks at the steps that log them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bwlm.config import ResearchLogSettings
from bwlm.model.gpt import GPT
from bwlm.model.observe import (
    activation_statistics,
    gradient_statistics,
    histogram_edges,
    parameters,
    places,
)
from bwlm.model.train_step import StepResult
from bwlm.record.researchlog_schema import GROUPS
from bwlm.train.records import Entries
from bwlm.train.session import Session

_ACTIVATION_TOKENS = 2**11
"""Tokens of rank 0 that the model reads again for its activations."""

_SCALARS = {
    name: {"lr": "lr_multiplier"}.get(name, f"train_{name}" if name.startswith("loss") else name)
    for name in GROUPS["train"].columns
    if name != "step"
}
"""Metric of each column of the group `train`."""


@dataclass(frozen=True)
class Observer:
    """Decides what a step must show, and turns it into entries of the research log."""

    model: GPT
    settings: ResearchLogSettings
    session: Session
    masked: bool
    rows_at: Callable[[int], NDArray[np.int64]]
    """step, counted from 0 -> rows of the whole batch, rank after rank"""

    def fixed(self) -> dict[str, Any]:
        """Return the contents of the groups `gradients` and `activations` that hold for the whole run."""
        layers, seen = parameters(self.model), places(self.model.config.depth)
        return {
            "gradients/parameter": np.array(list(layers)),
            "gradients/layer": np.array(list(layers.values()), np.int16),
            "gradients/edges": np.array(histogram_edges()),
            "activations/place": np.array([place for place, _ in seen]),
            "activations/layer": np.array([layer for _, layer in seen], np.int16),
            "activations/edges": np.array(histogram_edges()),
        }

    def step(self, step: int, tensors: dict[str, Tensor]) -> StepView:
        """Return the view of a step that is about to run; `step` is counted from 1."""
        return StepView(self, step, tensors)

    def is_due(self, group: str, step: int) -> bool:
        """Return true if this step writes to `group`."""
        every: int = getattr(self.settings, group)
        return bool(every) and step % every == 0


@dataclass
class StepView:
    """Observations of one step, while it runs."""

    observer: Observer
    number: int
    tensors: dict[str, Tensor]
    seen: Entries = field(default_factory=dict)

    @property
    def predict(self) -> bool:
        """True if the step needs the likeliest ids."""
        return self.observer.is_due("tokens", self.number)

    def see_gradients(self) -> None:
        """Observe the complete gradients, before the update. They are equal on all ranks, so rank 0 reads its own."""
        observer = self.observer
        if observer.session.rank != 0:
            return
        if observer.is_due("gradients", self.number):
            self.seen["gradients"] = _arrays(gradient_statistics(observer.model))
        if observer.is_due("activations", self.number):
            rows = slice(max(1, _ACTIVATION_TOKENS // self.tensors["inputs"].size(1)))
            segments = self.tensors["segments"][rows] if observer.masked else None
            statistics = activation_statistics(observer.model, self.tensors["inputs"][rows], segments)
            self.seen["activations"] = _arrays(statistics)

    def entries(self, result: StepResult, metrics: dict[str, float]) -> Entries:
        """Return the entries that rank 0 writes for the step; a collective."""
        if self.predict:
            self._see_tokens(result)
        if self.observer.is_due("scalars", self.number):
            self.seen["train"] = {name: metrics[key] for name, key in _SCALARS.items() if key in metrics}
        return self.seen

    def _see_tokens(self, result: StepResult) -> None:
        session = self.observer.session
        ids = torch.stack([self.tensors["inputs"], self.tensors["targets"], result.predicted]).int()
        everywhere, losses = _gathered(ids, session), _gathered(result.token_losses.half(), session)
        if session.rank != 0:
            return
        kind = np.int16 if self.observer.model.config.vocab_size <= 2**15 else np.int32
        read, target, predicted = np.concatenate(everywhere, axis=1).astype(kind)
        ranks = np.repeat(np.arange(session.world, dtype=np.int16), len(losses[0]))
        self.seen["tokens"] = {
            "rank": ranks,
            "row": self.observer.rows_at(self.number - 1),  # takes a millisecond
            "input": read,
            "target": target,
            "predicted": predicted,
            "loss": np.concatenate(losses),
        }


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _gathered(tensor: Tensor, session: Session) -> list[NDArray[Any]]:
    """Return the tensor of every rank, on rank 0; a collective."""
    if session.world == 1:
        return [tensor.cpu().numpy()]
    parts = [torch.empty_like(tensor) for _ in range(session.world)] if session.rank == 0 else None
    dist.gather(tensor.contiguous(), parts, dst=0)
    return [part.cpu().numpy() for part in parts or []]
