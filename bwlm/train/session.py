"""The loop's view of where it runs: rank, world size, device, and how to report a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from bwlm.errors import BwlmError, RunError, UserError
from bwlm.train.termination import Termination

T = TypeVar("T")

_LONGEST_WORDS = 2000
"""Bytes of an error message that other ranks receive."""


class Session(Protocol):
    """Process in which the loop runs, one of `world` ranks."""

    rank: int
    world: int
    device: torch.device

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Report a step to the scheduler; every rank calls it at the same steps. The scheduler may end the run here."""

    def stopping(self) -> bool:
        """Return true if this process was asked to end (SIGTERM).

        Ranks may differ: the loop ends all of them together.
        """


@dataclass
class LocalSession:
    """Single process without a scheduler: tests, benchmarks, a debugger."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    termination: Termination | None = None

    def report(self, step: int, metrics: dict[str, float]) -> None:
        return

    def stopping(self) -> bool:
        return self.termination is not None and self.termination.asked


def raise_on_all_ranks(session: Session, action: Callable[[], T]) -> T:
    """Return what `action` returns on this rank; a collective.

    If it raises `RunError` or `UserError` on any rank, all ranks raise, so that none waits for a rank that has gone.
    A rank without an error of its own raises a `RunError` with the message of the first rank that has one.
    """
    error: BwlmError | None = None
    try:
        result = action()
    except (RunError, UserError) as failed:
        error = failed
    if session.world > 1:
        error = _first_failure(session, error)
    if error is not None:
        raise error
    return result


def _first_failure(session: Session, error: BwlmError | None) -> BwlmError | None:
    first = torch.tensor(session.rank if error else session.world, device=session.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first == session.world:
        return None
    words = torch.zeros(_LONGEST_WORDS, dtype=torch.uint8, device=session.device)
    if session.rank == first:
        text = str(error).encode()[:_LONGEST_WORDS]
        words[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(words, src=int(first))
    message = bytes(words.tolist()).rstrip(b"\0").decode(errors="replace")
    return error or RunError(f"rank {int(first)}: {message}")
