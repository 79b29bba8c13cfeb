"""Bits per byte of a trained model on texts: the documents of its base, and conversations, in each reading."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwlm.directions import TEXT_READINGS, evaluated_readings, is_marked, own_readings
from bwlm.errors import UserError
from bwlm.evaluate.windows import LossEvaluation
from bwlm.model.observe import evaluating
from bwlm.phases import BUILTIN_MIXTURE, PHASES
from bwlm.record.bucket import fetch_text
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, open_experiment
from bwlm.record.repeat import repeat_command
from bwlm.record.run_config import RunConfig
from bwlm.remote import address_of
from bwlm.storage.opened import push
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.mixture import prepare_mixture
from bwlm.text.packing import run_here
from bwlm.text.prepare import find_packed
from bwlm.trained.load import LoadedModel, load_model
from tasks.sources import sources_of

_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class TextLoss:
    """Loss of a model on a text in one reading."""

    id: str
    step: int
    """Step of the model's checkpoint."""
    task: str
    """`documents` or `conversations`."""
    direction: str
    """Reading of the text."""
    native: bool
    """True if the model was trained to read so."""
    bpb: float
    loss: float
    """Nats per token."""
    tokens: int
    bytes: int
    token_bytes: str
    """Digest of the table of bytes per token: bits per byte compare only where it is equal."""


def evaluate_texts(
    loaded: LoadedModel, corpora: dict[str, str], readings: tuple[str, ...], folder: ExperimentFolder
) -> list[TextLoss]:
    """Return the loss of the validation windows of each corpus, by `task`.

    Conversations are read forward and backward alone: they have no other order.
    Saves the loss of every segment in the run's folder, as `evaluations/<phase>/<direction>/<task>.parquet` with a
    summary beside it; of an earlier checkpoint as `<task>@<step>.parquet`.
    """
    results = []
    of_step = "" if loaded.step == loaded.config.steps else f"@{loaded.step}"
    for task, corpus in corpora.items():
        evaluation = _evaluation(loaded, task, corpus)
        for reading in readings:
            if task == "conversations" and reading not in TEXT_READINGS:
                continue
            with evaluating(loaded.model):
                segments, _ = evaluation.measure(loaded.model, reading, is_marked(loaded.config.experiment.direction))
            home = folder.evaluation(loaded.config.experiment.phase, reading)
            segments.save(home, evaluation.byte_counts, name=f"{task}{of_step}")
            figures: dict[str, Any] = segments.summary()
            results.append(
                TextLoss(
                    id=folder.id,
                    step=loaded.step,
                    task=task,
                    direction=reading,
                    native=reading in own_readings(loaded.config.experiment.direction),
                    bpb=figures["bpb"],
                    loss=figures["loss"],
                    tokens=int(segments.tokens.sum()),
                    bytes=int(segments.bytes.sum()),
                    token_bytes=evaluation.byte_counts,
                )
            )
    return results


def _evaluation(loaded: LoadedModel, task: str, corpus: str) -> LossEvaluation:
    experiment, tokenizer = loaded.config.experiment, loaded.tokenizer
    talks = task == "conversations"
    turns = TurnLayout(TurnIds.from_tokenizer(tokenizer), experiment.data.reversal, supervised=False)
    return LossEvaluation.from_corpus(
        corpus,
        tokenizer,
        experiment.evaluation.tokens,
        _ROWS_AT_ONCE,
        loaded.model.embedding.weight.device,
        masked=talks or experiment.model.document_mask,
        turns=turns if talks else None,
    )


def evaluate_run(
    storage: Path, checkpoint: str, readings: tuple[str, ...] | None, progress: Callable[[str], None]
) -> list[TextLoss]:
    """Evaluate a finished run on its base's documents, and on conversations: its own mixture's, or built-in ones.

    `checkpoint` is `ID` for the newest, `ID@STEP` or `ID@best`. `readings`: None for forward, backward and the
    model's own. Raises `UserError` if there is no such run, it is not finished or has no such checkpoint, and if its
    text is gone: the message gives the command that makes the text again.
    """
    folder = open_experiment(storage, CheckpointName.parse(checkpoint).run)
    if (state := folder.status().state) != "finished":
        raise UserError(f"{folder.id} is {state}, not finished: finish it first, or evaluate another run")
    loaded = load_model(storage, checkpoint)
    corpora = {
        "documents": str(_documents(storage, folder, loaded.config)),
        "conversations": str(_conversations(storage, loaded.config, progress)),
    }
    direction = loaded.config.experiment.direction
    losses = evaluate_texts(loaded, corpora, readings or evaluated_readings(direction), folder)
    push(folder.path, trained=True)
    return losses


def _documents(storage: Path, folder: ExperimentFolder, config: RunConfig) -> Path:
    link = folder.link()
    base = ExperimentFolder(storage, link.chain[0]).config() if link else config
    fetch_text(Path(base.corpus))
    packed = find_packed(storage, Path(base.corpus), base.identity["data"])
    if packed is None:
        place = shlex.quote(address_of(storage))
        raise UserError(
            f"{base.corpus}: the packed text of {base.id} is gone: pack it again, without training, with: "
            f"{repeat_command(base, place)} --storage {place}"
        )
    return packed


def _conversations(storage: Path, config: RunConfig, progress: Callable[[str], None]) -> Path:
    recipe = config.experiment
    if PHASES[recipe.phase].packs_whole:  # the run's own rows already hold whole conversations
        fetch_text(Path(config.corpus))
        packed = find_packed(storage, Path(config.corpus), config.identity["data"])
        if packed is not None:
            return packed
    if not recipe.data.mixture:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": BUILTIN_MIXTURE})})
    sources, width = sources_of(recipe), recipe.model.sequence_length
    return prepare_mixture(sources, Path(config.tokenizer), width, True, storage, run_here, progress).folder
