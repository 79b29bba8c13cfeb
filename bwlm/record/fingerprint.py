"""Identity of a run: every setting, digest and code that changes its result, and nothing else.

Two runs with equal fingerprints are the same run. Workers, storage, concurrency and checkpoint intervals say where
and how fast a run trains, so they are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bwlm.config import Experiment
from bwlm.phases import PHASES
from bwlm.record.checkpoint_name import BEST
from bwlm.record.code import code_digest, module_digests

if TYPE_CHECKING:
    from bwlm.record.lineage import ParentLink

_NOT_IDENTITY: Any = {
    "data": True,
    "tasks": True,
    "parent": True,
    "differs": True,
    "budget": True,
    "checkpoint": True,
    "research_log": True,
    "compute": True,
    "resources": True,
    "tokenizer": {"path"},
    "evaluation": {"tasks", "max_examples"},
}

INHERITED = ("parent", "parent_seed", "parent_recipe", "parent_checkpoint")
"""Fields of an identity that say what the run began from."""
OF_ONE_PARENT = INHERITED[:2]
"""Fields that differ with the direction and seed of the parent run."""
VARIED = ("direction", "lr", "seed", *OF_ONE_PARENT)
"""Fields in which compared runs may differ: direction, what is tuned for it, seed, and so the parent run."""


def modules_of(experiment: Experiment) -> dict[str, str]:
    """Return the digest of each module that decides the run's result; see `bwlm.record.code`."""
    return module_digests(experiment.phase, tuple(sorted(experiment.data.mixture)))


def identity(
    experiment: Experiment,
    *,
    data: str,
    tokenizer: str,
    precision: str,
    steps: int,
    parent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the flat fields that decide a run's result. `data` and `tokenizer` are digests of content, not paths.

    `parent` is `inherited` of the run that it begins from.
    """
    phase = PHASES[experiment.phase]
    settings = experiment.model_dump(exclude=_NOT_IDENTITY | ({} if phase.has_reward else {"rl": True}))
    fields = {
        "code": code_digest(modules_of(experiment)),
        "data": data,
        "tokenizer": tokenizer,
        "precision": precision,
        "steps": steps,
        "batch_tokens": experiment.budget.batch_tokens,
    }
    if not phase.is_first:
        fields |= {"reversal": experiment.data.reversal, **(parent or {})}
    for name, value in settings.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            fields[name] = value
    return fields


def inherited(parent: Mapping[str, Any], link: ParentLink) -> dict[str, Any]:
    """Return the fields of a child's identity that come from its parent: the weights, and how they were made.

    Runs of two directions begin from different weights; they are a pair if the weights were made alike, with one
    seed. `parent_checkpoint` is there if the checkpoint is not the last one: a step, or the best, whatever its step.
    """
    alike = {name: value for name, value in parent.items() if name not in VARIED}
    fields = {"parent": link.sha256, "parent_seed": parent["seed"], "parent_recipe": fingerprint(alike)}
    if link.best or link.step != parent["steps"]:
        fields["parent_checkpoint"] = BEST if link.best else f"step {link.step}"
    return fields


def fingerprint(fields: dict[str, Any]) -> str:
    """Return a short hash of an identity's fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `field: old -> new` for each field that differs."""
    if old == new:
        return []
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
