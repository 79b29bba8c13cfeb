"""Loads a trained model by its experiment's id, with its tokenizer and its direction.

Not here: the state of training, which only a run that resumes needs (`record/checkpoint.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bwlm.errors import UserError
from bwlm.model.gpt import GPT
from bwlm.record.checkpoint import (
    DamagedCheckpoint,
    Tensors,
    check_fits,
    checkpoint_steps,
    load_weights,
    read_meta,
    step_folder,
)
from bwlm.record.experiment import ExperimentFolder, open_experiment
from bwlm.record.run_config import RunConfig
from bwlm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Trained model with its tokenizer and the run that it comes from."""

    model: GPT
    """Model in evaluation mode; weights are float32."""
    tokenizer: Tokenizer
    config: RunConfig
    meta: dict[str, Any]
    """Metadata of the checkpoint: phase, direction, progress, ..."""
    step: int
    """Step of the checkpoint."""


def load_model(
    storage: Path,
    experiment_id: str,
    step: int | None = None,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Return the model of an experiment below `storage`: its newest whole checkpoint, or the one of `step`.

    Raises `UserError` if there is no such experiment or checkpoint, if the checkpoint is damaged or another model's,
    and if the tokenizer is not the one that the model was trained with.
    """
    folder = open_experiment(storage, experiment_id)
    config = folder.config()
    candidates = _candidates(folder, step)
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    loaded_step, weights, meta = _read(folder, candidates, tokenizer)
    model = GPT(config.shape, compute_dtype)
    model.load_state_dict(weights)
    return LoadedModel(model.to(device).eval(), tokenizer, config, meta, loaded_step)


def _candidates(folder: ExperimentFolder, step: int | None) -> list[int]:
    """Return the steps to try, in order."""
    known = checkpoint_steps(folder.checkpoints)
    if not known:
        raise UserError(f"{folder.id}: no checkpoint in {folder.checkpoints} yet: train the run until it saves one")
    if step is None:
        return known[::-1]
    if step not in known:
        raise UserError(f"{folder.id}: no checkpoint of step {step}: choose from {', '.join(map(str, known))}")
    return [step]


def _read(folder: ExperimentFolder, candidates: list[int], tokenizer: Tokenizer) -> tuple[int, Tensors, dict[str, Any]]:
    """Return step, weights and metadata of the first candidate that is whole."""
    damage: list[str] = []
    for step in candidates:
        try:
            _check_model(folder, tokenizer, read_meta(folder.checkpoints, step), step)
            weights, meta = load_weights(folder.checkpoints, step)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        for fault in damage:
            log.warning("%s; took the checkpoint of step %d instead", fault, step)
        return step, weights, meta
    raise UserError(f"{damage[0]}: choose another step, or train {folder.id} again")


def _check_model(folder: ExperimentFolder, tokenizer: Tokenizer, meta: dict[str, Any], step: int) -> None:
    """Raise `UserError` for another tokenizer or direction.

    With them a model would not fail, but read and write other text.
    """
    config = folder.config()
    for name, own in (("tokenizer", tokenizer.digest), ("vocab_size", tokenizer.vocab_size)):
        if meta.get(name) != own:
            raise UserError(
                f"{config.tokenizer}: not the tokenizer that {folder.id} was trained with "
                f"({own} instead of {meta.get(name)}): put that one back"
            )
    expected = {name: value for name, value in config.checkpoint_meta().items() if name != "id"}
    check_fits(step_folder(folder.checkpoints, step), meta, expected)
