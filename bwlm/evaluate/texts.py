"""Bits per byte of a trained model on texts: the documents of its base, and conversations, in both readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bwlm.evaluate.load import LoadedModel
from bwlm.evaluate.loss import LossEvaluation
from bwlm.model.observe import evaluating
from bwlm.record.lineage import ExperimentFolder
from bwlm.text.batches import open_rows
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.direction import SpecialIds, is_marked, own_readings

_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class TextLoss:
    """What a text costs a model in one reading."""

    id: str
    task: str
    """`documents` or `conversations`."""
    direction: str
    """In which the text was read."""
    native: bool
    """Whether the model was trained to read so."""
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
    """The loss of the validation windows of each corpus, by `task`; every segment's is kept in the run's folder.

    `evaluations/<phase>/<direction>/<task>.parquet`, with its summary beside it.
    """
    found = []
    for task, corpus in corpora.items():
        evaluation = _evaluation(loaded, task, corpus)
        for reading in readings:
            with evaluating(loaded.model):
                segments, _ = evaluation.measure(loaded.model, reading, is_marked(loaded.config.experiment.direction))
            home = folder.evaluation(loaded.config.experiment.phase, reading)
            segments.save(home, evaluation.byte_counts, name=task)
            figures: dict[str, Any] = segments.summary()
            found.append(
                TextLoss(
                    id=folder.id,
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
    return found


def _evaluation(loaded: LoadedModel, task: str, corpus: str) -> LossEvaluation:
    experiment, tokenizer = loaded.config.experiment, loaded.tokenizer
    talks = task == "conversations"
    return LossEvaluation(
        rows=open_rows(corpus, "validation"),
        special=SpecialIds.of(tokenizer),
        token_bytes=tokenizer.token_bytes().astype(np.int64),
        tokens=experiment.evaluation.tokens,
        batch_rows=_ROWS_AT_ONCE,
        device=loaded.model.embedding.weight.device,
        masked=talks or experiment.model.document_mask,
        turns=TurnLayout(TurnIds.of(tokenizer), experiment.data.reversal, supervised=False) if talks else None,
    )
