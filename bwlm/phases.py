"""Records of the phases of training. A new phase is a record here and a module `bwlm/train/<name>.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

PhaseName = Literal["base", "mid", "sft", "rl"]

BUILTIN_MIXTURE = {"builtin:docs_qa": 1.0, "builtin:arithmetic": 10.0, "builtin:spelling": 10.0}
"""Mixture that needs no network. With these weights the two small sources give about half of its rows."""


@dataclass(frozen=True)
class Phase:
    """Phase of training: its data, its objective, and how its runs are judged."""

    follows: tuple[str, ...]
    """Phases whose runs it can begin from; empty for the phase that begins with new weights."""
    reads: Literal["documents", "conversations", "prompts"]
    packs_whole: bool
    """True if each conversation stays whole and alone in its row, as in a chat. Attention is then always masked."""
    supervised: Literal["all", "written"]
    """Loss mask: all tokens are targets, or only the text that the model writes in a conversation."""
    learns_by: Literal["loss", "reward"]
    compared: bool
    """True if reports give verdicts on directions: all directions learn all of the same text."""
    metric: str
    """Validation metric that tells how well a run learnt its objective."""
    best_metric: str
    """Validation metric by which the best checkpoint is shown."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings of a run that are not given. Learning rates: nanochat's of October 2025."""

    @property
    def is_first(self) -> bool:
        """True for the phase that begins with new weights."""
        return not self.follows

    @property
    def reads_documents(self) -> bool:
        """True for a phase on documents; all others read conversations of a mixture."""
        return self.reads == "documents"

    @property
    def has_reward(self) -> bool:
        """True for a phase that learns from rewards of its samples instead of the loss."""
        return self.learns_by == "reward"


PHASES: Mapping[str, Phase] = MappingProxyType(
    {
        "base": Phase(
            follows=(),
            reads="documents",
            packs_whole=False,
            supervised="all",
            learns_by="loss",
            compared=True,
            metric="val_loss",
            best_metric="val_bpb",
        ),
        "mid": Phase(
            follows=("base",),
            reads="conversations",
            packs_whole=False,
            supervised="all",
            learns_by="loss",
            compared=True,
            metric="val_loss",
            best_metric="val_bpb",
            defaults={
                "data.mixture": BUILTIN_MIXTURE,
                "optim.init_lr_frac": 1.0,
                "budget.tokens_per_parameter": 1.0,
            },
        ),
        "sft": Phase(
            follows=("base", "mid"),
            reads="conversations",
            packs_whole=True,
            supervised="written",
            learns_by="loss",
            compared=False,  # directions learn to write different parts of a conversation
            metric="val_loss_written",
            best_metric="val_bpb",
            defaults={
                "data.mixture": BUILTIN_MIXTURE,
                "optim.init_lr_frac": 0.02,
                "budget.tokens_per_parameter": 0.5,
                "model.document_mask": True,
            },
        ),
        "rl": Phase(
            follows=("sft",),
            reads="prompts",
            packs_whole=True,
            supervised="written",
            learns_by="reward",
            compared=False,
            metric="val_reward",
            best_metric="val_reward",
            defaults={
                "data.mixture": {"builtin:arithmetic": 1.0},
                "optim.init_lr_frac": 0.05,
                "budget.steps": 100,
                "model.document_mask": True,
            },
        ),
    }
)
"""Phases by name, in the order of training."""
FIRST: PhaseName = "base"
LATER = tuple(name for name in PHASES if name != FIRST)
"""Phases that begin from a run."""


def order(name: str) -> int:
    """Return the place of a phase in the order of training, from 0."""
    return tuple(PHASES).index(name)
