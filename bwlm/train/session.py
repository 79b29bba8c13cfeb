"""What the loop knows of the place that it runs in: who it is among the workers, and how to say how far it came."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from bwlm.train.termination import Termination


class Session(Protocol):
    rank: int
    world: int
    device: torch.device

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Tells the scheduler; every rank calls it at the same steps. The scheduler may end the run here."""

    def stopping(self) -> bool:
        """Whether this process was asked to end (SIGTERM). Ranks may differ: the loop ends all of them together."""


@dataclass
class AloneSession:
    """One process without a scheduler: tests, benchmarks, a debugger."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    termination: Termination | None = None

    def report(self, step: int, metrics: dict[str, float]) -> None:
        return

    def stopping(self) -> bool:
        return self.termination is not None and self.termination.asked
