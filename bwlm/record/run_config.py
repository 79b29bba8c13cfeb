"""Content of config.json: what a run trains, by which code, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.model.shape import GPTConfig, ParameterCounts, count_parameters
from bwlm.record.code import IDENTITY_VERSION, changed_modules, code_digest
from bwlm.record.fingerprint import fingerprint, modules_of


def shape_of(experiment: Experiment) -> GPTConfig:
    """Return the shape of the model. Raises ValueError if head_dim, kv_heads and depth do not fit together."""
    model = experiment.model
    return GPTConfig.from_depth(
        experiment.depth, experiment.tokenizer.vocab_size, model.sequence_length, model.head_dim, model.kv_heads
    )


@dataclass(frozen=True)
class RunConfig:
    """Content of config.json: everything that a worker needs to train, and a reader to know what was trained."""

    id: str
    experiment: Experiment
    identity: dict[str, Any]
    steps: int
    compute: Compute
    corpus: str
    """Folder of the packed corpus. In the file, this and the next path are relative to the storage, which may move."""
    tokenizer: str
    """Folder of the tokenizer."""
    grid: str | None = None
    identity_version: int = 1
    """Version of `identity["code"]`; a run from before versions were counted has version 1."""
    modules: dict[str, str] = field(default_factory=dict)
    """Digest of each module that `identity["code"]` covers."""
    accepted_code: list[dict[str, Any]] = field(default_factory=list)
    """Resumes with other code, on the user's word, each with step, time, code, and the modules that had changed."""

    @property
    def code(self) -> str:
        """Digest of the code that trained the run; several, joined by +, if it resumed with other code."""
        return "+".join([str(self.identity.get("code", "")), *(accepted["code"] for accepted in self.accepted_code)])

    def other_code(self, experiment: Experiment | None = None) -> str:
        """Return how today's code differs from the code that trained the run: `code: bwlm.model.gpt changed`.

        '' where it does not. Today's code is the one that `experiment`, by default the run's own, would be trained by.
        """
        modules = modules_of(experiment or self.experiment)
        current = self.accepted_code[-1]["code"] if self.accepted_code else self.identity["code"]
        if current == code_digest(modules):
            return ""
        if self.identity_version < IDENTITY_VERSION:
            return f"code: identity version {self.identity_version}, not comparable with today's {IDENTITY_VERSION}"
        changed = changed_modules(self.modules, modules)
        return f"code: {', '.join(changed)} changed" if changed else "code: another version of torch"

    @property
    def compared(self) -> dict[str, Any]:
        """Identity by which runs are compared: with all the code that trained the run."""
        return self.identity | {"code": self.code}

    @property
    def fingerprint(self) -> str:
        """Short hash of the identity."""
        return fingerprint(self.identity)

    @property
    def shape(self) -> GPTConfig:
        """Shape of the model."""
        return shape_of(self.experiment)

    @property
    def parameters(self) -> ParameterCounts:
        """Return the counts of the model's parameters."""
        return count_parameters(self.shape)

    def checkpoint_meta(self) -> dict[str, object]:
        """Return the fields that a reader of a checkpoint checks before it takes memory for it."""
        experiment = self.experiment
        return {
            "id": self.id,
            "phase": experiment.phase,
            "direction": experiment.direction,
            "reversal": experiment.data.reversal,
            "depth": experiment.depth,
            "vocab_size": experiment.tokenizer.vocab_size,
            "tokenizer": self.identity["tokenizer"],
            "fingerprint": self.fingerprint,
        }
