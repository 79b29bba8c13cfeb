"""The base phase: next-token prediction on packed documents, in one direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bwlm.errors import Interrupted, RunError, UserError
from bwlm.evaluate.loss import SegmentLosses
from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.record.checkpoint import refuse_foreign
from bwlm.record.lineage import ExperimentFolder, RunConfig, Status
from bwlm.text.batches import Batch, DirectedPlan, open_rows
from bwlm.text.direction import SpecialIds, is_marked
from bwlm.text.plan import RowPlan
from bwlm.train.loop import Evaluated, Phase, train
from bwlm.train.records import cannot_write
from bwlm.train.session import Session, together
from bwlm.train.validation import Validation

Stream = Callable[[DirectedPlan, int, int], Iterator[Batch]]
"""Yields a rank's batches of steps first..last-1: Ray Data, or the in-process reader of tests."""


def build_model(config: RunConfig, device: torch.device) -> GPT:
    """The initialised model of a run; the seed decides its weights."""
    compute = config.compute
    model = GPT(config.shape, getattr(torch, compute.precision), compute.attention, compute.loss_chunk)
    model.init_weights(config.experiment.seed)
    if compute.compile:
        # a process compiles a function for eight models only, then runs it as it is: each cell starts anew
        torch.compiler.reset()
        model.compile_training()
    return model.to(device)


def loss_by_direction(direction: str, special: SpecialIds, batch: Batch, losses: Tensor) -> dict[str, Tensor]:
    """[sum in nats, targets] of a batch by the reading of its segments; losses [R, T]."""
    targets = torch.from_numpy(batch["targets"] >= 0).to(losses.device)
    if not is_marked(direction):
        return {direction: torch.stack([losses.sum(), targets.sum()])}
    # each segment opens with BOS and its marker, so the last marker before a place tells its reading
    is_forward, is_backward = (batch["inputs"] == marker for marker in (special.forward, special.backward))
    place = np.where(is_forward | is_backward, np.arange(batch["inputs"].shape[1]), 0)
    last = np.maximum.accumulate(place, axis=1)
    forward = torch.from_numpy(np.take_along_axis(is_forward, last, axis=1)).to(losses.device)
    masks = {"forward": targets & forward, "backward": targets & ~forward}
    return {name: torch.stack([losses[mask].sum(), mask.sum()]) for name, mask in masks.items()}


def rows_per_step(config: RunConfig) -> int:
    return config.experiment.budget.batch_tokens // config.experiment.model.sequence_length


def run_base(folder: ExperimentFolder, session: Session, stream: Stream) -> Status:
    """Trains, evaluates and records one base run; returns how it ended. A run that had finished is left alone.

    What went wrong by the run's own doing, or lies wrong in its folder, is its state `failed`; all else is raised. A
    run that was asked to end is `stopped`, without a reason: it has not ended.
    """
    done = folder.status()
    if done.ended:
        return done
    try:
        metrics = _train_base(folder, session, stream)
    except Interrupted:
        return Status("stopped", "", folder.status().step)
    except (RunError, UserError) as error:
        status = Status("failed", str(error), folder.status().step)
    else:
        status = Status("finished", "", folder.config().steps, metrics)
    if session.rank == 0:
        try:
            folder.write_status(status)
        except OSError as error:  # on a full disk; the reason of the run's own failure comes first
            return Status("failed", status.reason or str(cannot_write(folder.path, error)), status.step)
    return status


def _train_base(folder: ExperimentFolder, session: Session, stream: Stream) -> dict[str, float]:
    return train(together(session, lambda: _base_phase(folder, session, stream)), folder, session)


def _base_phase(folder: ExperimentFolder, session: Session, stream: Stream) -> Phase:
    config = folder.config()
    experiment, optim = config.experiment, config.experiment.optim
    meta = config.checkpoint_meta()
    refuse_foreign(folder.checkpoints, {name: value for name, value in meta.items() if name != "id"})
    model = build_model(config, session.device)
    validation = Validation.of(config, session.device)
    rows = RowPlan(len(open_rows(config.corpus, "train")), rows_per_step(config), experiment.seed)
    special = validation.evaluation.special
    plan = DirectedPlan(config.corpus, experiment.direction, special, rows, session.rank, session.world)

    def evaluate(model: GPT, step: int) -> Evaluated:
        measured = validation.measure(model)
        losses = {reading: segments for reading, (segments, _) in measured.items()}
        if step == config.steps:
            misled = validation.misled(model)
            together(session, lambda: _save_losses(folder, losses | misled) if session.rank == 0 else None)
        entries = validation.entries(model, measured) if session.rank == 0 else {}
        return Evaluated(validation.metrics(losses), entries)

    return Phase(
        name=experiment.phase,
        model=model,
        optimizer=build_optimizer(model, experiment.lr, optim.weight_decay, optim.kind, session.rank, session.world),
        batches=lambda first, last: stream(plan, first, last),
        split_loss=lambda batch, losses: loss_by_direction(experiment.direction, special, batch, losses),
        evaluate=evaluate,
        rows_at=lambda step: rows.at(step)[0],
        steps=config.steps,
        seed=experiment.seed,
        compute=config.compute,
        masked=experiment.model.document_mask,
        evaluate_every=experiment.evaluation.every,
        optim=optim,
        checkpoint=experiment.checkpoint,
        research_log=experiment.research_log,
        fixed=validation.fixed(),
        meta=meta,
    )


def _save_losses(folder: ExperimentFolder, losses: dict[str, SegmentLosses]) -> None:
    for reading, measured in losses.items():
        target = folder.evaluation("base", reading)
        try:
            measured.save(target)
        except OSError as error:
            raise cannot_write(target, error) from None
