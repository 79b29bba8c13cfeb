"""The training loop that every phase shares.

A phase says what is trained on what (`Phase`); the loop steps, evaluates, checkpoints, resumes and keeps the journal.
It knows nothing of direction or Ray, nor whether it is one of several workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bwlm.config import CheckpointSettings, OptimSettings
from bwlm.errors import TrainingDiverged
from bwlm.model.gpt import GPT
from bwlm.model.optim import Optimizer, muon_momentum, schedule
from bwlm.record.checkpoint import Checkpoint, load_checkpoint, load_newest, save_checkpoint
from bwlm.record.journal import Journal
from bwlm.record.lineage import ExperimentFolder
from bwlm.text.batches import Batch
from bwlm.train.session import Session

_UNTIMED_STEPS = 2
"""Steps after a start that tokens per second leave out: caches and allocators warm up in them."""

_SMOOTHING = 0.9


@dataclass(frozen=True)
class Phase:
    """What one phase trains, and how it is measured."""

    model: GPT
    optimizer: Optimizer
    batches: Callable[[int, int], Iterator[Batch]]
    """(first, last) -> this rank's rows of steps first..last-1"""
    evaluate: Callable[[GPT, int], dict[str, float]]
    """Validation metrics after a step; called on every rank"""
    rows_at: Callable[[int], str]
    """Names the rows of a step, for a message"""
    steps: int
    micro_rows: int
    """Rows of one forward pass"""
    masked: bool
    """Attention stays inside a segment"""
    evaluate_every: int
    optim: OptimSettings
    checkpoint: CheckpointSettings
    meta: dict[str, object]
    """Goes into every checkpoint: what a reader must know before loading it"""


@dataclass
class Progress:
    """The loop's own state, kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    average: float = 0.0
    seconds: float = 0.0
    timed_tokens: int = 0
    validation: dict[str, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.seconds if self.seconds else 0.0

    def measured(self, step: int, loss: float, tokens: int) -> None:
        self.step = step
        self.tokens += tokens
        self.average = _SMOOTHING * self.average + (1 - _SMOOTHING) * loss

    @property
    def smooth_loss(self) -> float:
        """An exponential average without the bias of its start (Kingma and Ba 2015, section 3)."""
        return self.average / (1 - _SMOOTHING**self.step) if self.step else 0.0


class _Loss(nn.Module):
    """The summed loss as a module, since DistributedDataParallel averages gradients of what its forward computes."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        return self.model.loss(inputs, targets, segments, reduction="sum")


def train(phase: Phase, folder: ExperimentFolder, session: Session) -> dict[str, float]:
    """Trains to the phase's last step, from the newest checkpoint if there is one; returns the final metrics.

    Raises `TrainingDiverged` at the first loss or gradient that is not finite.
    """
    progress = _resume(phase, _newest(folder, session))
    journal = Journal(folder.path, progress.step) if session.rank == 0 else None
    loss_of: nn.Module = _Loss(phase.model)
    if session.world > 1:
        loss_of = DistributedDataParallel(loss_of)
    start = progress.step
    stream = phase.batches(start, phase.steps)
    try:
        for step, batch in enumerate(stream, start):
            began = time.perf_counter()
            metrics = _step(phase, loss_of, batch, step, session)
            seconds = time.perf_counter() - began
            progress.measured(step + 1, metrics["train_loss"], int(metrics["tokens"]))
            if step >= start + _UNTIMED_STEPS:
                progress.seconds += seconds
                progress.timed_tokens += int(metrics["tokens"])
            metrics |= {"train_loss_smooth": progress.smooth_loss, "tokens": progress.tokens, "step_seconds": seconds}
            metrics |= {"tokens_per_second": progress.tokens_per_second}
            metrics |= _validate(phase, progress)
            if journal is not None:
                journal.append(step + 1, metrics)
            _checkpoint(phase, folder, session, progress, journal)
            session.report(step + 1, metrics)
    finally:
        if journal is not None:
            journal.close()
    if progress.validation is None:  # resumed at the very end
        progress.validation = phase.evaluate(phase.model, progress.step)
    return progress.validation | {"train_loss": progress.smooth_loss, "tokens_per_second": progress.tokens_per_second}


def _newest(folder: ExperimentFolder, session: Session) -> Checkpoint | None:
    """The checkpoint that all ranks resume from: rank 0 chooses, since each might see another one as the newest."""
    if session.world == 1:
        return load_newest(folder.checkpoints)
    newest = load_newest(folder.checkpoints) if session.rank == 0 else None
    chosen = torch.tensor(newest.step if newest else -1, device=session.device)
    dist.broadcast(chosen, src=0)
    if session.rank == 0 or chosen < 0:
        return newest
    return load_checkpoint(folder.checkpoints, int(chosen))


def _resume(phase: Phase, checkpoint: Checkpoint | None) -> Progress:
    if checkpoint is None:
        return Progress()
    phase.model.load_state_dict(checkpoint.model)
    phase.optimizer.load_state_tensors(checkpoint.optimizer)
    return Progress(**checkpoint.meta["progress"])


def _step(phase: Phase, loss_of: nn.Module, batch: Batch, step: int, session: Session) -> dict[str, float]:
    """One optimizer step over the whole batch, in as many passes as its rows need; loss in nats per target."""
    tensors = {name: torch.from_numpy(array).to(session.device).long() for name, array in batch.items()}
    targets = _sum_over_ranks((tensors["targets"] >= 0).sum(), session)
    multiplier = _multiplier(step, phase)
    phase.optimizer.set_schedule(multiplier, muon_momentum(step))
    rows = len(tensors["inputs"])
    total = torch.zeros((), device=session.device)
    for start in range(0, rows, phase.micro_rows):
        part = {name: tensor[start : start + phase.micro_rows] for name, tensor in tensors.items()}
        last = start + phase.micro_rows >= rows
        with _synchronised(loss_of, last):
            loss = loss_of(part["inputs"], part["targets"], part["segments"] if phase.masked else None)
            # averaged over ranks afterwards, hence times world: each target weighs the same on every rank
            (loss * (session.world / targets)).backward()
        total += loss.detach()
    mean_loss = float(_sum_over_ranks(total, session) / targets)
    grad_norm = float(nn.utils.clip_grad_norm_(phase.model.parameters(), phase.optim.grad_clip or math.inf))
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        raise TrainingDiverged(
            f"loss {mean_loss} and gradient norm {grad_norm} at step {step + 1}, on rows {phase.rows_at(step)}; "
            "lower lr, or look at these rows with `bwlm data inspect`"
        )
    rates = {f"lr_{name}": rate for name, rate in phase.optimizer.learning_rates().items()}
    phase.optimizer.step()
    phase.optimizer.zero_grad()
    scalars = {"train_loss": mean_loss, "grad_norm": grad_norm, "lr_multiplier": multiplier}
    return {**scalars, **rates, "tokens": float(rows * tensors["inputs"].shape[1] * session.world)}


def _multiplier(step: int, phase: Phase) -> float:
    warmup = min(phase.optim.warmup_steps, phase.steps // 10)
    return schedule(step, phase.steps, warmup, phase.optim.warmdown_ratio, phase.optim.final_lr_frac)


def _synchronised(loss_of: nn.Module, last: bool) -> AbstractContextManager[None]:
    if last or not isinstance(loss_of, DistributedDataParallel):
        return nullcontext()
    return loss_of.no_sync()


def _sum_over_ranks(value: Tensor, session: Session) -> Tensor:
    if session.world > 1:
        dist.all_reduce(value)
    return value


def _validate(phase: Phase, progress: Progress) -> dict[str, float]:
    """Validation metrics, where they are due."""
    last = progress.step == phase.steps
    if not last and (not phase.evaluate_every or progress.step % phase.evaluate_every):
        return {}
    began = time.perf_counter()
    progress.validation = phase.evaluate(phase.model, progress.step)
    return progress.validation | {"validation_seconds": time.perf_counter() - began}


def _checkpoint(
    phase: Phase, folder: ExperimentFolder, session: Session, progress: Progress, journal: Journal | None
) -> None:
    """Saves where it is due, after the journal is safe up to this step: a resumed run does not write it again."""
    every = phase.checkpoint.every
    if progress.step != phase.steps and (not every or progress.step % every):
        return
    if journal is not None:
        journal.sync()
        _save(phase, folder, progress)
    if session.world > 1:
        dist.barrier()


def _save(phase: Phase, folder: ExperimentFolder, progress: Progress) -> None:
    save_checkpoint(
        folder.checkpoints,
        progress.step,
        phase.model.state_dict(),
        phase.optimizer.state_tensors(),
        phase.meta | {"progress": vars(progress)},
        phase.checkpoint.keep,
    )
