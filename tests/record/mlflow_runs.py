"""Runs with journals, and what MLflow has of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import Journal
from bwlm.record.mlflow_view import GridResult, GridSettings
from bwlm.record.run_config import RunConfig
from bwlm.record.tracking import Tracking

COMPUTE = Compute("float32", "sdpa", 0, False, 8, 1)

DATASET = {"name": "corpus", "digest": "0123456789abcdef" * 4, "source": "/data/corpus/shard_00000.parquet"}

SETTINGS = GridSettings(1, {"lr": "0.5"}, {"direction": "forward, backward"})
RESULT = GridResult("- d2: **different**", "d2 forward → backward: different", {"gap/d2_forward-backward": 0.25})


def make(storage: Path, name: str = "g_backward_d2_lr0.5_s3") -> ExperimentFolder:
    folder = ExperimentFolder(storage, name)
    experiment = Experiment(direction="backward", depth=2, lr=0.5, seed=3)
    identity = {"direction": "backward", "lr": 0.5, "model.kv_heads": None, "data": "d" * 64}
    folder.create(RunConfig(name, experiment, identity, 10, COMPUTE, "/corpus", "/tokenizer", "g"))
    return folder


def grid_folder(storage: Path) -> Path:
    folder = storage / "grids" / "g"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_grid(tracking: Tracking, storage: Path) -> str:
    return tracking.parent_run(grid_folder(storage), "g", "name: g\n", SETTINGS)


def enlist(tracking: Tracking, folder: ExperimentFolder) -> tuple[str, str]:
    parent = open_grid(tracking, folder.path.parent)
    return parent, tracking.child_run(folder, parent, DATASET)


def log_steps(folder: ExperimentFolder, first: int, last: int, resume: int | None = None) -> None:
    journal = Journal(folder.path, first - 1 if resume is None else resume)
    for step in range(first, last + 1):
        journal.append(step, {"loss": 1 / step, "tokens": step * 100})
    journal.close()


def delivered(client: MlflowClient, run: str, metric: str = "loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run, metric)]


def expected(last: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, last + 1)]


def lost_on_the_way_in(log_batch: Callable[..., None]) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("connection reset")

    return fail


def lost_on_the_way_back(log_batch: Callable[..., None]) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        log_batch(*args, **kwargs)
        raise OSError("connection reset")

    return fail


def lost_client() -> Any:
    class Lost:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lost_on_the_way_in(lambda: None)

    return Lost()
