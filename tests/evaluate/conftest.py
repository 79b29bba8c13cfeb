"""Really trained runs, one for each direction, that tests load and export. Read only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.record.fingerprint import identity
from bwlm.record.lineage import ExperimentFolder, RunConfig
from bwlm.text.prepare import Prepared
from bwlm.train.base import run_base
from bwlm.train.session import AloneSession

STEPS = 32
MakeRun = Callable[..., ExperimentFolder]


@pytest.fixture(scope="session")
def make_run(prepared: Prepared) -> MakeRun:
    """Makes `storage/name` with settings over a tiny default, trained unless told otherwise."""

    def make(storage: Path, name: str, trained: bool = True, **settings: Any) -> ExperimentFolder:
        shape = {"sequence_length": prepared.manifest.sequence_length, "head_dim": 32}
        content: dict[str, Any] = {
            "direction": "forward",
            "depth": 1,
            "lr": 4.0,
            "tokenizer": {"vocab_size": prepared.tokenizer.vocab_size},
            "model": shape | settings.pop("model", {}),
            "budget": {"steps": STEPS, "batch_tokens": 512},
            "evaluation": {"every": 10, "tokens": 1024},
            "checkpoint": {"every": STEPS // 2, "keep": 2},
        }
        experiment = Experiment.model_validate(content | settings)
        digests = {"data": prepared.manifest.digest, "tokenizer": prepared.tokenizer.digest}
        folder = ExperimentFolder(storage, name)
        folder.create(
            RunConfig(
                id=name,
                experiment=experiment,
                identity=identity(experiment, **digests, precision="float32", steps=STEPS),
                steps=STEPS,
                compute=Compute("float32", "sdpa", 0, False, 8, 1),
                corpus=str(prepared.folder),
                tokenizer=str(prepared.tokenizer_folder),
            )
        )
        if trained:
            status = run_base(folder, AloneSession(), lambda plan, first, last: plan.batches(first, last))
            assert status.state == "finished", status.reason
        return folder

    return make


@pytest.fixture(scope="session")
def storage(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of each direction, named after it; the forward one shares key/value heads (GQA)."""
    root = tmp_path_factory.mktemp("trained")
    make_run(root, "forward", depth=2, model={"kv_heads": 2})
    for direction in ("backward", "bidirectional", "permuted"):
        make_run(root, direction, direction=direction)
    return root
