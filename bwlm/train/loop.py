"""The training loop that every phase shares.

A phase says what is trained on what (`PhaseSetup`). The loop steps, evaluates, checkpoints, resumes and keeps the
journal. It knows nothing of direction or Ray.

Not here: the step itself (`bwlm/model/train_step.py`), what is measured (`meter.py`), files (`bwlm/record`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bwlm.config import CheckpointSettings, OptimSettings, ResearchLogSettings
from bwlm.errors import Interrupted, TrainingDiverged, UserError
from bwlm.model.compute import Compute, peak_flops
from bwlm.model.gpt import GPT
from bwlm.model.optim import Optimizer, lr_schedule, muon_momentum, weight_decay_schedule
from bwlm.model.shape import flops_per_token
from bwlm.model.train_step import StepResult, TrainStep
from bwlm.record.checkpoint import Snapshot, Tensors, copy_to_host, load_checkpoint, load_newest, step_folder
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.batches import Batch
from bwlm.text.plan import counter_hash
from bwlm.train.meter import Meter, TrainingProgress
from bwlm.train.records import Entries, Records
from bwlm.train.session import Session, raise_on_all_ranks
from bwlm.train.step_log import Observer, StepView


@dataclass(frozen=True)
class PhaseSetup:
    """Everything that a phase gives to the loop: what it trains, on what, and how it is measured."""

    name: str
    model: GPT
    optimizer: Optimizer
    batches: Callable[[int, int], Iterator[Batch]]
    """(first, last) -> this rank's rows of steps first..last-1"""
    measure: Callable[[Batch, Tensor], dict[str, Tensor]]
    """(batch, nats of each target) -> [sum, count] of this rank for each metric that is a mean over all ranks"""
    evaluate: Callable[[GPT, int], Evaluated]
    """(model, step) -> results of the validation after a step; called on every rank"""
    rows_at: Callable[[int], NDArray[np.int64]]
    """step -> rows that all ranks read at it, rank after rank"""
    steps: int
    seed: int
    compute: Compute
    masked: bool
    """True: attention stays inside a segment"""
    evaluate_every: int
    optim: OptimSettings
    checkpoint: CheckpointSettings
    research_log: ResearchLogSettings
    fixed: dict[str, Any]
    """Contents of its validation entries in the research log that hold for the whole run"""
    meta: dict[str, object]
    """Metadata that goes into every checkpoint: what a reader must know before loading it"""


@dataclass(frozen=True)
class Evaluated:
    """Results of a validation."""

    metrics: dict[str, float]
    entries: Entries
    """Entries of the research log; used on rank 0."""


def train(phase: PhaseSetup, folder: ExperimentFolder, session: Session) -> dict[str, float]:
    """Train to the phase's last step, resuming from the newest checkpoint if there is one; return the final metrics.

    Raises `TrainingDiverged` at the first loss, gradient or validation figure that is not finite, and `RunError` if a
    checkpoint cannot be written. If any rank is asked to end, all ranks save a checkpoint and raise `Interrupted`.
    """
    progress = _resume(phase, folder, session)
    train_step = TrainStep(phase.model, phase.optimizer, phase.compute.micro_rows, phase.optim.grad_clip, session.world)
    peak = peak_flops(session.device, phase.compute.precision) * session.world
    meter = Meter(progress, phase.steps, flops_per_token(phase.model.config), peak, session.device, folder.path)
    observer = Observer(phase.model, phase.research_log, session, phase.masked, phase.rows_at)
    opened = raise_on_all_ranks(session, lambda: _records(phase, folder, session, observer.fixed(), progress.step))
    with opened or nullcontext() as records:
        for batch in phase.batches(progress.step, phase.steps):
            began = time.perf_counter()
            result, metrics, view = _step(phase, train_step, batch, progress.step, observer)
            seconds = time.perf_counter() - began
            metrics |= meter.stepped(result.loss, batch["inputs"].size * session.world, seconds)
            entries = view.entries(result, meter.resources | metrics)
            if validation := _validate(phase, progress):
                metrics |= validation.metrics
                entries |= validation.entries
                meter.validated()
            if records is not None:
                records.log(progress.step, metrics, entries)
            if result.asked_to_stop or _is_due(progress.step, phase.checkpoint.every, phase.steps):
                _save(phase, session, progress, metrics.get("val_bpb_tuning"), records)
            session.report(progress.step, metrics)
            if result.asked_to_stop and progress.step < phase.steps:
                raise Interrupted(f"stopped on request at step {progress.step}")
        _wait_for_save(session, records, last=True)
    if progress.validation is None:  # resumed after the last step
        _evaluate(phase, progress)
    assert progress.validation is not None
    speed = progress.tokens_per_second
    return progress.validation | {"train_loss_smooth": progress.smooth_loss, "tokens_per_second": speed}


def _records(
    phase: PhaseSetup, folder: ExperimentFolder, session: Session, fixed: dict[str, Any], step: int
) -> Records | None:
    if session.rank != 0:
        return None
    return Records(folder, phase.name, fixed | phase.fixed, phase.checkpoint, step)


def _resume(phase: PhaseSetup, folder: ExperimentFolder, session: Session) -> TrainingProgress:
    checkpoint = _newest(folder, session)
    own = f"rank{session.rank}/"
    rng = {name: state for name, state in (checkpoint.rng if checkpoint else {}).items() if name.startswith(own)}
    progress = _restored(phase, folder, checkpoint) if checkpoint else TrainingProgress()
    if rng:
        torch.set_rng_state(rng[f"{own}cpu"])
        if session.device.type == "cuda" and f"{own}cuda" in rng:
            torch.cuda.set_rng_state(rng[f"{own}cuda"], session.device)
    else:  # a new run, or one that resumes with more ranks than it had
        torch.manual_seed(int(counter_hash(phase.seed, progress.step, session.rank)))
    return progress


def _restored(phase: PhaseSetup, folder: ExperimentFolder, checkpoint: Snapshot) -> TrainingProgress:
    """Load a checkpoint into model and optimizer; return its progress.

    Raises `UserError` if it does not fit what this version saves.
    """
    try:
        phase.model.load_state_dict(checkpoint.model)
        phase.optimizer.load_state_tensors(checkpoint.optimizer)
        return TrainingProgress(**checkpoint.meta["progress"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        path, reason = step_folder(folder.checkpoints, checkpoint.step), " ".join(str(error).split())
        raise UserError(
            f"{path}: not damaged, but this version of bwlm cannot load it ({reason}): resume with the version that "
            "saved it, or move this checkpoint away"
        ) from None


def _newest(folder: ExperimentFolder, session: Session) -> Snapshot | None:
    """Return the checkpoint that all ranks resume from. Rank 0 chooses: ranks might see different newest ones."""
    newest = raise_on_all_ranks(session, lambda: load_newest(folder.checkpoints) if session.rank == 0 else None)
    if session.world == 1:
        return newest
    chosen = torch.tensor(newest.step if newest else -1, device=session.device)
    dist.broadcast(chosen, src=0)
    if chosen < 0:
        return None
    return raise_on_all_ranks(session, lambda: newest or load_checkpoint(folder.checkpoints, int(chosen)))


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or bool(every and step % every == 0)


def _step(
    phase: PhaseSetup, train_step: TrainStep, batch: Batch, step: int, observer: Observer
) -> tuple[StepResult, dict[str, float], StepView]:
    session = observer.session
    tensors = {name: _tensor(array, session.device) for name, array in batch.items()}
    multiplier = _multiplier(step, phase)
    phase.optimizer.set_schedule(multiplier, muon_momentum(step), weight_decay_schedule(step, phase.steps))
    rates = {f"lr_{name}": rate for name, rate in phase.optimizer.learning_rates().items()}
    segments = tensors["segments"] if phase.masked else None
    view, means = observer.step(step + 1, tensors), dict[str, float]()

    def before_update(token_losses: Tensor) -> None:
        view.see_gradients()
        means.update(_means(phase, session, batch, token_losses))

    importance = tensors.get("importance")
    stop = session.stopping()
    result = train_step(tensors["inputs"], tensors["targets"], segments, importance, stop, view.predict, before_update)
    if not result.is_finite:
        rows = ", ".join(map(str, phase.rows_at(step)))
        raise TrainingDiverged(
            f"loss {result.loss} and gradient norm {result.grad_norm} at step {step + 1}, "
            f"on rows {rows}; lower lr, or look at these rows with `bwlm data inspect`",
            step + 1,
        )
    metrics = {"train_loss": result.loss, "grad_norm": result.grad_norm, "lr_multiplier": multiplier, **rates, **means}
    return result, metrics, view


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the device: integers as int64, with which torch indexes; floats as they are."""
    tensor = torch.from_numpy(array).to(device)
    return tensor if tensor.is_floating_point() else tensor.long()


def _means(phase: PhaseSetup, session: Session, batch: Batch, token_losses: Tensor) -> dict[str, float]:
    """Return the phase's metrics of a step, as means over all ranks; a mean of nothing is left out."""
    means = {}
    for name, sums in phase.measure(batch, token_losses).items():
        if session.world > 1:
            dist.all_reduce(sums)
        if sums[1]:
            means[name] = float(sums[0] / sums[1])
    return means


def _multiplier(step: int, phase: PhaseSetup) -> float:
    optim = phase.optim
    return lr_schedule(step, phase.steps, optim.warmup_steps, optim.warmdown_ratio, optim.final_lr_frac)


def _validate(phase: PhaseSetup, progress: TrainingProgress) -> Evaluated | None:
    """Return the results of a validation if one is due, else None."""
    if not _is_due(progress.step, phase.evaluate_every, phase.steps):
        return None
    began = time.perf_counter()
    validation = _evaluate(phase, progress)
    return replace(validation, metrics=validation.metrics | {"validation_seconds": time.perf_counter() - began})


def _evaluate(phase: PhaseSetup, progress: TrainingProgress) -> Evaluated:
    validation = phase.evaluate(phase.model, progress.step)
    if broken := [name for name, figure in validation.metrics.items() if not math.isfinite(figure)]:
        raise TrainingDiverged(
            f"{', '.join(broken)} not finite at step {progress.step}, though the training loss was; lower lr",
            progress.step,
        )
    progress.validation = validation.metrics
    return validation


def _save(
    phase: PhaseSetup, session: Session, progress: TrainingProgress, metric: float | None, records: Records | None
) -> None:
    """Save a checkpoint; a collective: every rank gives what it alone has, rank 0 copies and writes."""
    _wait_for_save(session, records)  # so that only one copy of the state lies in memory
    optimizer, rng = phase.optimizer.state_tensors(), _random_states(session)
    if records is not None:
        model, state = copy_to_host(phase.model.state_dict()), copy_to_host(optimizer)
        meta = phase.meta | {"progress": dict(vars(progress))}
        records.save(Snapshot(progress.step, model, state, rng, meta, metric))


def _wait_for_save(session: Session, records: Records | None, last: bool = False) -> None:
    """Wait until rank 0 has saved. If any of its writes failed, all ranks raise `RunError`."""
    raise_on_all_ranks(session, lambda: records.wait_for_save(last) if records is not None else None)


def _random_states(session: Session) -> Tensors:
    """Return the state of every rank's random generators, as bytes, by `rank0/cpu`, `rank0/cuda`, .."""
    own = {"cpu": torch.get_rng_state()}
    if session.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(session.device)
    if session.world == 1:
        return {f"rank0/{name}": state for name, state in own.items()}
    states: Tensors = {}
    for name, state in own.items():
        here = state.to(session.device)
        gathered = [torch.empty_like(here) for _ in range(session.world)]
        dist.all_gather(gathered, here)
        states |= {f"rank{rank}/{name}": of_rank.cpu() for rank, of_rank in enumerate(gathered)}
    return states
