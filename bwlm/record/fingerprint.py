"""Identity: what changes a run's result, and nothing else.

Two runs with equal fingerprints are the same run. Workers, storage, concurrency and checkpoint intervals say where and
how fast, so they are not in it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bwlm.config import Experiment

TRAINING_ROOMS = ("model", "text", "train", "evaluate")
_NOT_IDENTITY: Any = {
    "data": True,
    "budget": True,
    "checkpoint": True,
    "compute": True,
    "resources": True,
    "tokenizer": {"path"},
}


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Over the source that training imports, and torch's version."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(version("torch").split("+")[0].encode())
    for room in TRAINING_ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def identity(experiment: Experiment, *, data: str, tokenizer: str, precision: str, steps: int) -> dict[str, Any]:
    """Flat fields that decide a run's result. `data` and `tokenizer` are digests of content, not paths."""
    settings = experiment.model_dump(exclude=_NOT_IDENTITY)
    fields = {
        "code": code_digest(),
        "data": data,
        "tokenizer": tokenizer,
        "precision": precision,
        "steps": steps,
        "batch_tokens": experiment.budget.batch_tokens,
    }
    for name, value in settings.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            fields[name] = value
    return fields


def fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old -> new` for each field that differs."""
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
