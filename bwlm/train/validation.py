"""Validation of a run: loss of its windows in both readings and its own, and the research log's entries of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bwlm.config import ResearchLogSettings
from bwlm.directions import TEXT_READINGS, evaluated_readings, is_marked, opposite, own_readings
from bwlm.evaluate.states import ActivationProbe
from bwlm.evaluate.windows import LossEvaluation, Measured, SegmentLosses
from bwlm.model.gpt import GPT
from bwlm.model.observe import evaluating
from bwlm.record.run_config import RunConfig
from bwlm.text.conversation import TurnLayout
from bwlm.text.tokenizer import Tokenizer
from bwlm.train.records import Entries


@dataclass(frozen=True)
class Validation:
    """Measures a model of one direction on the validation windows, in both readings and its own."""

    evaluation: LossEvaluation
    inside: ActivationProbe
    research_log: ResearchLogSettings
    direction: str
    turns: TurnLayout | None
    """Layout of conversations; None: documents."""

    @classmethod
    def from_config(cls, config: RunConfig, device: torch.device, turns: TurnLayout | None = None) -> Validation:
        """Return the validation of a run; it measures all text of conversations, whatever is supervised."""
        tokenizer = Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"])
        experiment = config.experiment
        evaluation = LossEvaluation.from_corpus(
            config.corpus,
            tokenizer,
            experiment.evaluation.tokens,
            config.compute.micro_rows,
            device,
            experiment.model.document_mask,
            turns,
        )
        inside = ActivationProbe(
            evaluation.rows,
            evaluation.windows,
            evaluation.special,
            experiment.research_log.representations,
            device,
            evaluation.masked,
            evaluation.turns,
        )
        return cls(evaluation, inside, experiment.research_log, experiment.direction, turns)

    @property
    def readings(self) -> tuple[str, ...]:
        """Forward and backward, and the direction's own reading if it is another."""
        return evaluated_readings(self.direction)

    def measure(self, model: GPT) -> dict[str, Measured]:
        """Return the losses of the windows, by reading."""
        with evaluating(model):
            return {name: self.evaluation.measure(model, name, is_marked(self.direction)) for name in self.readings}

    def wrong_marker_losses(self, model: GPT) -> dict[str, SegmentLosses]:
        """Return the losses of the windows with the opposite marker: does a bidirectional model obey its marker?

        By name, `<reading>_marked_<opposite>`; empty for a model of one direction.
        """
        if not is_marked(self.direction):
            return {}
        with evaluating(model):
            return {
                f"{name}_marked_{opposite(name)}": self.evaluation.measure(model, name, True, opposite(name))[0]
                for name in TEXT_READINGS
            }

    def fixed(self) -> dict[str, Any]:
        """Return what the research log's entries refer to, for the whole run: tokens, windows and readings."""
        readings, own = np.array(self.readings), np.array(own_readings(self.direction))
        fixed: dict[str, Any] = {f"validation/{name}": values for name, values in self.evaluation.tokens_of().items()}
        fixed |= {f"representations/{name}": values for name, values in self.inside.tokens_of().items()}
        return fixed | {"validation/reading": readings, "attention/reading": own, "representations/reading": own}

    def entries(self, model: GPT, measured: dict[str, Measured]) -> Entries:
        """Return the research log's entries of a validation; states and attention in the direction's own readings."""
        entries: Entries = {}
        own, marked, wanted = own_readings(self.direction), is_marked(self.direction), self.research_log
        if wanted.validation:
            tokens = [measured[name][1] for name in self.readings]
            entries["validation"] = {
                "loss": np.stack([one.nll for one in tokens]),
                "correct": np.stack([one.correct for one in tokens]),
            }
        if wanted.attention:
            looked = [vars(self.inside.attention(model, name, marked)) for name in own]
            entries["attention"] = {name: torch.stack([one[name] for one in looked]).numpy() for name in looked[0]}
        if wanted.representations:
            states = np.stack([self.inside.states(model, name, marked) for name in own])
            entries["representations"] = {"states": states}
        return entries

    def metrics(self, measured: dict[str, Measured]) -> dict[str, float]:
        """Return `val_bpb` and `val_loss` of the own direction (bidirectional: the mean of both), and by reading.

        `val_bpb_tuning` is over the even windows. If only what the model writes is trained on, `val_loss_written` is
        the loss of that text alone.
        """
        losses = {name: segments for name, (segments, _) in measured.items()}
        figures = {name: measured.summary() for name, measured in losses.items()}
        own = [figures[name] for name in own_readings(self.direction)]
        metrics = {f"val_{key}": sum(f[key] for f in own) / len(own) for key in own[0]}
        tuning = [losses[name].even_windows().summary()["bpb"] for name in own_readings(self.direction)]
        metrics["val_bpb_tuning"] = sum(tuning) / len(tuning)
        for name in TEXT_READINGS:
            metrics |= {f"val_{key}_{name}": value for key, value in figures[name].items()}
        if self.turns and self.turns.supervised:
            metrics |= self._written_loss(measured, self.turns)
        return metrics

    def _written_loss(self, measured: dict[str, Measured], turns: TurnLayout) -> dict[str, float]:
        losses = []
        for reading in own_readings(self.direction):
            losses.append(measured[reading][1].nll[self.evaluation.loss_mask(reading, turns.reversal, turns.turns)])
        # windows may hold no such text, where conversations were cut short
        return {"val_loss_written": float(np.mean([nll.mean() for nll in losses]))} if all(map(len, losses)) else {}
