"""Tiny runs that any test may train, in this process or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.record.checkpoint import load_newest
from bwlm.record.fingerprint import identity
from bwlm.record.journal import read_journal
from bwlm.record.lineage import ExperimentFolder, RunConfig
from bwlm.text.batches import Batch, DirectedPlan
from bwlm.text.prepare import Prepared

STEPS = 12
NewRun = Callable[..., ExperimentFolder]


def in_process(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
    return plan.batches(first, last)


def compute_of(experiment: Experiment) -> Compute:
    asked = experiment.compute
    return Compute(
        "float32" if asked.precision == "auto" else asked.precision,
        "sdpa" if asked.attention == "auto" else asked.attention,
        0 if asked.fused_loss is False else 64,
        bool(asked.compile),
        asked.device_batch_size or 8,
        1,
    )


def make_run(prepared: Prepared, storage: Path, name: str, **settings: Any) -> ExperimentFolder:
    """Makes `storage/name`, waiting, with settings over a tiny default; `section__field` sets one of a section."""
    content: dict[str, Any] = {
        "direction": "forward",
        "depth": 1,
        "lr": 1.0,
        "seed": 0,
        "tokenizer": {"vocab_size": prepared.tokenizer.vocab_size},
        "model": {"sequence_length": prepared.manifest.sequence_length, "head_dim": 32},
        "budget": {"steps": STEPS, "batch_tokens": 512},
        "evaluation": {"every": 5, "tokens": 1024},
        "checkpoint": {"every": 4, "keep": 3},
        "research_log": {},
    }
    for field, value in settings.items():
        section, _, inner = field.partition("__")
        content[section] = content[section] | {inner: value} if inner else value
    experiment = Experiment.model_validate(content)
    steps = experiment.budget.steps
    assert steps is not None
    compute = compute_of(experiment)
    digests = {"data": prepared.manifest.digest, "tokenizer": prepared.tokenizer.digest}
    folder = ExperimentFolder(storage, name)
    folder.create(
        RunConfig(
            id=name,
            experiment=experiment,
            identity=identity(experiment, **digests, precision=compute.precision, steps=steps),
            steps=steps,
            compute=compute,
            corpus=str(prepared.folder),
            tokenizer=str(prepared.tokenizer_folder),
        )
    )
    return folder


@pytest.fixture
def new_run(prepared: Prepared, tmp_path: Path) -> NewRun:
    """(name, **settings) -> a run that waits, in this test's own storage."""

    def make(name: str = "run", **settings: Any) -> ExperimentFolder:
        return make_run(prepared, tmp_path, name, **settings)

    return make


def losses(folder: ExperimentFolder) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(folder.path)]


def weights_digest(folder: ExperimentFolder) -> str:
    checkpoint = load_newest(folder.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    digest = hashlib.sha256()
    for tensors in (checkpoint.model, checkpoint.optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
