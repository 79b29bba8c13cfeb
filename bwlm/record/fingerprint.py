"""Identity: what changes a run's result, and nothing else.

Two runs with equal fingerprints are the same run. Workers, storage, concurrency and checkpoint intervals say where and
how fast, so they are not in it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bwlm.config import Experiment

_PACKAGE = Path(__file__).parent.parent
TRAINING_PACKAGES = ("model", "text", "train", "evaluate")
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
}

INHERITED = ("parent", "parent_seed", "parent_recipe")
"""Fields of an identity that say what the run began from."""
OF_ONE_PARENT = INHERITED[:2]
"""Those that are other ones for each direction and seed of what runs began from."""
VARIED = ("direction", "lr", "seed", *OF_ONE_PARENT)
"""In what the runs of a comparison differ: direction, what is tuned for it, seed, and so what they began from."""


@cache
def code_digest(phase: str, package: Path = _PACKAGE) -> str:
    """Over the source that training a phase imports, and torch's version."""
    digest = hashlib.sha256(version("torch").split("+")[0].encode())
    for path in training_sources(phase, package):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package.parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def training_sources(phase: str, package: Path = _PACKAGE) -> list[Path]:
    """The files of the training packages, and of tasks, that a phase or its stream imports, directly or not."""
    found: set[Path] = set()
    pending = [package / "train" / f"{phase}.py", package / "text" / "stream.py"]
    while pending:
        path = pending.pop()
        if path.exists() and path not in found:
            found.add(path)
            if _uses_tasks(path):
                found.update((package.parent / "tasks").glob("*.py"))
            pending += [package / f"{name.replace('.', '/')}.py" for name in _imports(path)]
    return sorted(found)


def _uses_tasks(path: Path) -> bool:
    """Whether a file imports the package of tasks, all of which then counts: they decide what a sample earns."""
    return any(isinstance(node, ast.ImportFrom) and node.module == "tasks" for node in ast.walk(_parsed(path)))


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _imports(path: Path) -> Iterator[str]:
    """Modules of the training packages that a file imports, anywhere in it; `bwlm.` left out."""
    for node in ast.walk(_parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, _, module = name.partition(".")
            if package == "bwlm" and module.split(".")[0] in TRAINING_PACKAGES:
                yield module


def identity(
    experiment: Experiment,
    *,
    data: str,
    tokenizer: str,
    precision: str,
    steps: int,
    parent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Flat fields that decide a run's result. `data` and `tokenizer` are digests of content, not paths.

    `parent` is `inherited` of the run that it begins from.
    """
    settings = experiment.model_dump(exclude=_NOT_IDENTITY | ({} if experiment.phase == "rl" else {"rl": True}))
    fields = {
        "code": code_digest(experiment.phase),
        "data": data,
        "tokenizer": tokenizer,
        "precision": precision,
        "steps": steps,
        "batch_tokens": experiment.budget.batch_tokens,
    }
    if experiment.phase != "base":
        fields |= {"reversal": experiment.data.reversal, **(parent or {})}
    for name, value in settings.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            fields[name] = value
    return fields


def inherited(parent: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """What a child's identity holds of its parent: the weights, and how they were made.

    Runs of two directions begin from other weights; they are a pair where those were made alike, with one seed.
    """
    alike = {name: value for name, value in parent.items() if name not in VARIED}
    return {"parent": weights, "parent_seed": parent["seed"], "parent_recipe": fingerprint(alike)}


def fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old -> new` for each field that differs."""
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
