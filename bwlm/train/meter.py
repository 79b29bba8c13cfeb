"""Speed, MFU, memory and time left of a run, step by step."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_UNTIMED_STEPS = 2
"""Steps after a start that speeds leave out: compilers, caches and allocators warm up in them."""

_SMOOTHING = 0.9
_LOOK_SECONDS = 1.0
"""Seconds between looks at memory and disk: a look is slow on a shared file system."""


@dataclass
class TrainingProgress:
    """State of the loop, saved in checkpoints: with the seed, `step` fixes the position in data and schedules."""

    step: int = 0
    tokens: int = 0
    average: float = 0.0
    """Exponential average of the training loss, with the bias of its start."""
    seconds: float = 0.0
    """Seconds of the timed steps."""
    timed_tokens: int = 0
    """Tokens of the timed steps."""
    validation: dict[str, float] | None = None
    """Metrics of the last validation; None before the first."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the whole run, over all processes and machines that it ran on."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0

    @property
    def smooth_loss(self) -> float:
        """Exponential average of the training loss, without the bias of its start (Kingma and Ba 2015, section 3)."""
        return self.average / (1 - _SMOOTHING**self.step) if self.step else 0.0


class TrainingClock:
    """Clock of a process that trains; it stands still while the process does something else."""

    def __init__(self) -> None:
        self._paused = 0.0

    def now(self) -> float:
        """Return seconds since some point in time, without the pauses."""
        return time.monotonic() - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock until the block ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began


CLOCK = TrainingClock()
"""Clock of this process, which trains one run at a time."""


class Meter:
    """Measures one rank's process; figures of speed and tokens are those of all ranks."""

    def __init__(
        self,
        progress: TrainingProgress,
        steps: int,
        flops_per_token: int,
        peak: float,
        device: torch.device,
        folder: Path,
    ) -> None:
        """Begin to measure; `peak` is the FLOP/s of all ranks, `folder` is where the run's records grow."""
        self._progress = progress
        self._first = progress.step
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._device = device
        self._folder = folder
        self._looked = -math.inf
        self.resources: dict[str, float] = {}
        """Result of the last look at memory, disk and power."""
        self._timed_from = self._last = CLOCK.now()
        self._seconds = 0.0
        self._tokens = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def stepped(self, loss: float, tokens: int, step_seconds: float) -> dict[str, float]:
        """Count a step of all ranks and return the metrics after it; `loss` is in nats per target.

        Speeds are those of this process since it began, including all that a step waits for: data, and the copy for a
        checkpoint.
        """
        progress, now = self._progress, CLOCK.now()
        progress.step += 1
        progress.tokens += tokens
        progress.average = _SMOOTHING * progress.average + (1 - _SMOOTHING) * loss
        waited = max(0.0, now - self._last - step_seconds)
        timed = progress.step - self._first - _UNTIMED_STEPS
        if timed > 0:
            self._seconds += now - self._last
            self._tokens += tokens
            progress.seconds += now - self._last
            progress.timed_tokens += tokens
        else:
            self._timed_from = now
        self._last = now
        metrics = {
            "train_loss_smooth": progress.smooth_loss,
            "tokens": progress.tokens,
            "flops": float(progress.tokens * self._flops_per_token),
            "step_seconds": step_seconds,
            "wait_seconds": waited,
        }
        if self._seconds:
            metrics["tokens_per_second"] = speed = self._tokens / self._seconds
            metrics["mfu"] = speed * self._flops_per_token / self._peak
        if timed > 0:
            metrics["seconds_left"] = (now - self._timed_from) / timed * (self._steps - progress.step)
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self.resources = self._look()
            metrics |= self.resources
        return metrics

    def validated(self) -> None:
        """Leave the time since the last step out of the speeds: it was not training."""
        self._last = CLOCK.now()

    def _look(self) -> dict[str, float]:
        """Return memory, size of the run's records and free disk in bytes, and on a GPU its watts.

        Memory is what this process holds, from earlier cells too; on a GPU it is the most that this run's tensors
        took.
        """
        on_gpu = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) if on_gpu else psutil.Process().memory_info().rss
        records = [path for pattern in ("*.jsonl", "*.h5", "*.h5.tail") for path in self._folder.glob(pattern)]
        return {
            "memory_bytes": memory,
            "research_log_bytes": sum(path.stat().st_size for path in records),
            "disk_free_bytes": shutil.disk_usage(self._folder).free,
            **(_power(self._device) if on_gpu else {}),
        }


def _power(device: torch.device) -> dict[str, float]:
    """Return the watts of this rank's GPU, whoever else uses it; nothing if its driver does not tell."""
    try:
        return {"gpu_watts": torch.cuda.power_draw(device) / 1000}
    except Exception:  # NVML can fail in many ways, and a missing figure must not end a run
        return {}
