"""Hand-made experiments: what a grid leaves behind, without training it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.health import DIGEST, RECORDS, sealed
from bwlm.record.journal import Journal
from bwlm.record.lineage import ParentLink
from bwlm.record.run_config import RunConfig

COMPUTE = Compute("float32", "sdpa", 0, False, 8, 1)

STEPS = 20
WEIGHTS = "0" * 64
"""The SHA-256 of weights that no file holds."""


def without_hash_of_log(run: Path) -> None:
    """Make a run look like one of an earlier version, which noted no hash of its research log."""
    path = run / "status.json"
    content = {name: value for name, value in read_json(path).items() if name != DIGEST}
    for name, record in content[RECORDS].items():
        if name.endswith(".h5"):
            record.pop("sha256", None)
    write_json(path, sealed(content))


def make_cell(
    storage: Path,
    direction: str,
    seed: int = 0,
    lr: float = 1.0,
    depth: int = 1,
    source: str = "somewhere",
    phase: str = "base",
    parent: str = "p",
    **identity: Any,
) -> ExperimentFolder:
    """A cell that waits."""
    identity |= {"data": source.translate({58: "-", 47: "-"})} if source != "somewhere" else {}
    extra = "".join(f"_{name}{value}" for name, value in identity.items()) + ("" if phase == "base" else f"-{phase}")
    name = f"g_{direction}_d{depth}_lr{lr:g}_s{seed}{extra}"
    fields = {
        "phase": phase,
        "direction": direction,
        "depth": depth,
        "lr": lr,
        "seed": seed,
        "steps": STEPS * depth,
        **identity,
    }
    content = {"phase": phase, "direction": direction, "depth": depth, "lr": lr, "seed": seed}
    content["data"] = {"source": source} if phase == "base" else {"mixture": {"builtin:arithmetic": 1.0}}
    if phase != "base":
        content["parent"], fields["parent"] = parent, WEIGHTS
    experiment = Experiment.model_validate(content | {"tokenizer": {"vocab_size": 264}})
    folder = ExperimentFolder(storage, name)
    link = None if phase == "base" else ParentLink(parent, "base", "step_000020", 20, WEIGHTS, [parent])
    folder.create(RunConfig(name, experiment, fields, fields["steps"], COMPUTE, "/corpus", "/tokenizer", "g"), link)
    return folder


def write_losses(folder: ExperimentFolder, reading: str, nll: Sequence[float]) -> None:
    """One document of 10 tokens and 40 bytes in each window."""
    count = len(nll)
    columns: Mapping[str, Any] = {
        "window": np.arange(count),
        "segment": np.arange(count) * 100,
        "document": np.arange(count) // 2,  # a document's first window tunes, its second tests
        "tokens": np.full(count, 10),
        "bytes": np.full(count, 40),
        "nll": np.asarray(nll, dtype=np.float64),
        "end_nll": np.where(np.arange(count) % 2, 1.0, np.nan),
    }
    path = folder.evaluation(folder.config().experiment.phase, reading)
    path.mkdir(parents=True)
    pq.write_table(pa.table(dict(columns)), path / "validation.parquet")


def finish(folder: ExperimentFolder, losses: Mapping[str, Sequence[float]]) -> ExperimentFolder:
    """Losses by reading, a journal with two validations, and the end."""
    journal = Journal(folder.path)
    steps = folder.config().steps
    for step in range(1, steps + 1):
        smooth = 3.0 + 2.0 / step + 0.05 * folder.config().experiment.seed
        metrics = {"train_loss": smooth, "train_loss_smooth": smooth, "tokens": step * 1000.0}
        metrics |= {"flops": step * 1e9, "step_seconds": 0.5}
        journal.append(step, metrics | ({"val_loss": smooth + 0.1} if step % (steps // 2) == 0 else {}))
    journal.close()
    for reading, nll in losses.items():
        write_losses(folder, reading, nll)
    metrics = {"val_loss": 3.0, "val_bpb": 1.1, "val_bpb_forward": 1.0, "val_bpb_backward": 1.2}
    folder.write_status(Status("finished", "", steps, metrics | {"tokens_per_second": 1234.5}))
    return folder
