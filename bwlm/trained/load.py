"""Loads a trained model by the name of its checkpoint, with its tokenizer and its direction.

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
from bwlm.record.bucket import fetch_weights
from bwlm.record.checkpoint import (
    DamagedCheckpoint,
    Tensors,
    check_fits,
    checkpoint_steps,
    load_weights,
    read_meta,
    step_folder,
)
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, open_experiment
from bwlm.record.lineage import ParentLink
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
    link: ParentLink | None
    """Link to the run that it began from; None for a base run."""


def load_model(
    storage: Path,
    checkpoint: str,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Return the model of an experiment below `storage`: of its newest whole checkpoint, or of `ID@STEP` or `ID@best`.

    Raises `UserError` if there is no such experiment or checkpoint, if the checkpoint is damaged or another model's,
    and if the tokenizer is not the one that the model was trained with.
    """
    name = CheckpointName.parse(checkpoint)
    folder = open_experiment(storage, name.run)
    config = folder.config()
    chosen = name.step_in(folder)
    candidates = [chosen] if name.which else checkpoint_steps(folder.checkpoints)[::-1]
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    loaded_step, weights, meta = _read(folder, candidates, tokenizer)
    model = GPT(config.shape, compute_dtype)
    model.load_state_dict(weights)
    return LoadedModel(model.to(device).eval(), tokenizer, config, meta, loaded_step, folder.link())


def best_device() -> str:
    """Return `cuda` where torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read(folder: ExperimentFolder, candidates: list[int], tokenizer: Tokenizer) -> tuple[int, Tensors, dict[str, Any]]:
    """Return step, weights and metadata of the first candidate that is whole."""
    damage: list[str] = []
    for step in candidates:
        try:
            _check_model(folder, tokenizer, read_meta(folder.checkpoints, step), step)
            fetch_weights(folder, step)
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
