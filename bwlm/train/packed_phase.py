"""The common part of phases that read packed rows: base, mid and SFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bwlm.directions import is_marked
from bwlm.evaluate.windows import SegmentLosses
from bwlm.model.gpt import GPT
from bwlm.model.optim import Optimizer, build_optimizer
from bwlm.phases import PHASES
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.parent import inherited_weights
from bwlm.record.run_config import RunConfig
from bwlm.text.batches import Batch, DirectedPlan, row_plan
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.direction import SpecialIds
from bwlm.text.tokenizer import Tokenizer
from bwlm.train.loop import Evaluated, PhaseSetup
from bwlm.train.records import cannot_write
from bwlm.train.session import Session, raise_on_all_ranks
from bwlm.train.validation import Validation

Stream = Callable[[DirectedPlan, int, int], Iterator[Batch]]
"""Yields a rank's batches of steps first..last-1: Ray Data, or the in-process reader of tests."""


def build_model(config: RunConfig, device: torch.device) -> GPT:
    """Return the initialised model of a run, on `device`; the seed decides its weights."""
    compute = config.compute
    model = GPT(config.shape, getattr(torch, compute.precision), compute.attention, compute.loss_chunk)
    model.init_weights(config.experiment.seed)
    if compute.compile:
        # torch compiles a function for at most eight models in a process, then runs it uncompiled: reset for each cell
        torch.compiler.reset()
        model.compile_training()
    return model.to(device)


def loss_by_direction(direction: str, special: SpecialIds, batch: Batch, losses: Tensor) -> dict[str, Tensor]:
    """Return [sum in nats, targets] of a batch for each reading of its segments, by metric; losses are [R, T]."""
    targets = torch.from_numpy(batch["targets"] >= 0).to(losses.device)
    if not is_marked(direction):
        return {f"train_loss_{direction}": torch.stack([losses.sum(), targets.sum()])}
    # each segment begins with BOS and its marker, so the last marker up to a place gives its reading
    is_forward, is_backward = (batch["inputs"] == marker for marker in (special.forward, special.backward))
    place = np.where(is_forward | is_backward, np.arange(batch["inputs"].shape[1]), 0)
    last = np.maximum.accumulate(place, axis=1)
    forward = torch.from_numpy(np.take_along_axis(is_forward, last, axis=1)).to(losses.device)
    masks = {"train_loss_forward": targets & forward, "train_loss_backward": targets & ~forward}
    return {name: torch.stack([losses[mask].sum(), mask.sum()]) for name, mask in masks.items()}


def rows_per_step(config: RunConfig) -> int:
    """Return the rows of a step, over all ranks."""
    return config.experiment.budget.batch_tokens // config.experiment.model.sequence_length


def packed_phase(
    folder: ExperimentFolder, session: Session, stream: Stream, turns: TurnLayout | None = None
) -> PhaseSetup:
    """Return the setup of next-token prediction on the rows of the run's corpus.

    The rows hold documents or, with `turns`, conversations.
    """
    config = folder.config()
    experiment = config.experiment
    model = starting_model(folder, config, session.device)
    validation = Validation.from_config(config, session.device, turns)
    rows = row_plan(config.corpus, rows_per_step(config), experiment.seed)
    special = validation.evaluation.special
    plan = DirectedPlan(config.corpus, experiment.direction, special, rows, session.rank, session.world, turns)
    return PhaseSetup(
        name=experiment.phase,
        model=model,
        optimizer=_optimizer(model, config, session),
        batches=lambda first, last: stream(plan, first, last),
        measure=lambda batch, losses: loss_by_direction(experiment.direction, special, batch, losses),
        evaluate=partial(_evaluate, folder, config, session, validation),
        rows_at=lambda step: rows.at(step)[0],
        steps=config.steps,
        seed=experiment.seed,
        compute=config.compute,
        masked=experiment.model.document_mask,
        evaluate_every=experiment.evaluation.every,
        optim=experiment.optim,
        checkpoint=experiment.checkpoint,
        research_log=experiment.research_log,
        fixed=validation.fixed(),
        meta=config.checkpoint_meta(),
    )


def _optimizer(model: GPT, config: RunConfig, session: Session) -> Optimizer:
    optim, lr = config.experiment.optim, config.experiment.lr
    return build_optimizer(model, lr * optim.init_lr_frac, optim.weight_decay, optim.kind, session.rank, session.world)


def _evaluate(
    folder: ExperimentFolder, config: RunConfig, session: Session, validation: Validation, model: GPT, step: int
) -> Evaluated:
    """Measure the validation windows, on all ranks; after the last step, save the losses of every segment."""
    measured = validation.measure(model)
    if step == config.steps:
        losses = {reading: segments for reading, (segments, _) in measured.items()}
        losses |= validation.wrong_marker_losses(model)
        counts = validation.evaluation.byte_counts
        raise_on_all_ranks(session, lambda: _save_losses(folder, losses, counts) if session.rank == 0 else None)
    entries = validation.entries(model, measured) if session.rank == 0 else {}
    return Evaluated(validation.metrics(measured), entries)


def starting_model(folder: ExperimentFolder, config: RunConfig, device: torch.device) -> GPT:
    """Return the model that a run begins with.

    A base run is initialised by its seed. Any other takes its parent's weights, unless it resumes from a checkpoint.
    """
    model = build_model(config, device)
    if not PHASES[config.experiment.phase].is_first and not checkpoint_steps(folder.checkpoints):
        model.load_state_dict(inherited_weights(folder, config))
    return model


def turn_layout(config: RunConfig, supervised: bool) -> TurnLayout:
    """Return how a run lays its conversations out; `supervised`: only what the model writes is a target."""
    tokenizer = Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"])
    return TurnLayout(TurnIds.from_tokenizer(tokenizer), config.experiment.data.reversal, supervised)


def _save_losses(folder: ExperimentFolder, losses: dict[str, SegmentLosses], byte_counts: str) -> None:
    for reading, measured in losses.items():
        target = folder.evaluation(folder.config().experiment.phase, reading)
        try:
            measured.save(target, byte_counts, folder.check_lease)
        except OSError as error:
            raise cannot_write(target, error) from None
