"""Grids on a real Ray cluster, with real Train, Tune, Data and MLflow."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bwlm.cli import main
from bwlm.errors import UserError
from bwlm.grid import hardware
from bwlm.grid.cells import find_cells, run_config
from bwlm.grid.launch import LaunchResult, run_plan
from bwlm.model.optim import build_optimizer
from bwlm.paths import read_json
from bwlm.plan.load import load_grid
from bwlm.record.catalog.rows import load_cells
from bwlm.record.checkpoint import KeepPolicy, Snapshot, copy_to_host, write_checkpoint
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from bwlm.text.prepare import Prepared
from bwlm.train.meter import TrainingProgress
from bwlm.train.packed_phase import build_model
from tests.grids import once_at_step
from tests.mlflow_server import free_port, server

GridFile = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(path: Path, storage: Path, *settings: str) -> LaunchResult:
    return run_plan(load_grid(path, list(settings)), storage, lambda _: None)


def losses(storage: Path, cell: str) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(storage / cell)]


def mlflow_children(storage: Path) -> dict[str, list[str]]:
    """Parent run -> its children's states."""
    query = (
        "select t.value, r.status from tags t join runs r on r.run_uuid = t.run_uuid where t.key = 'mlflow.parentRunId'"
    )
    with sqlite3.connect(storage / "mlflow.db") as store:
        rows = store.execute(query).fetchall()
    return {parent: [state for other, state in rows if other == parent] for parent, _ in rows}


def files(storage: Path) -> dict[Path, int]:
    kept = (path for path in storage.rglob("*") if path.is_file() and "mlflow" not in path.name)
    return {path: path.stat().st_mtime_ns for path in kept if path.suffix in (".jsonl", ".safetensors", ".arrow")}


def test_a_grid_trains_compares_reports_and_runs_once(
    grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = grid_file(
        axes={"direction": ["forward", "backward", "bidirectional"], "depth": [1], "lr": [1.0], "seed": [0, 1, 2]}
    )
    storage = tmp_path / "storage"
    result = run(path, storage)
    assert result.complete
    assert [cell.state for cell in result.cells] == ["finished"] * 9
    assert all(cell.step == 12 and cell.metrics["val_bpb"] > 0 for cell in result.cells)

    report = result.report.read_text()
    assert "no difference seen" in report or "different" in report
    assert "forward → backward" in report
    for chart in ("curves.svg", "curves.html", "gaps.svg", "gaps.html"):
        assert (result.report.parent / chart).stat().st_size > 1000
    for name in ("config.json", "parent_link.json", "status.json", "RESEARCH_REPORT.md", "curves.svg"):
        assert (storage / result.cells[0].id / name).exists()
    assert read_json(storage / result.cells[0].id / "parent_link.json")["parent"] is None

    again = result.report.with_name("grid.yaml")
    assert 'bwlm grid run "$BWLM_STORAGE"/grids/g/grid.yaml' in report
    assert again == storage / "grids/g/grid.yaml"
    assert [cell.id for cell in load_grid(again, []).cells] == [cell.id for cell in result.cells]

    (children,) = mlflow_children(storage).values()
    assert children == ["FINISHED"] * 9

    # all cells share one tokenizer and one packed corpus
    assert len(list((storage / "cache" / "packed").iterdir())) == 1
    assert len(list((storage / "cache" / "tokenizers").iterdir())) == 1

    before = files(storage)
    monkeypatch.setattr(hardware, "_why_not_compile", lambda device: "no g++")
    told: list[str] = []
    with monkeypatch.context() as without_ray:
        without_ray.setattr("bwlm.cluster.session.open_cluster", None)
        plan = load_grid(path, ["compute.compile=true"])  # nothing is left that a compiler is needed for
        again = run_plan(plan, storage, told.append)
        slip = load_grid(path, ["data.source=/nowhere"])  # its packed text is not used instead: it is another's
        with pytest.raises(UserError, match=r"/nowhere does not exist: .*; g_forward_d1_lr1_s0 was trained on /"):
            run_plan(slip, storage, told.append)
    assert (again.cells, again.was_over, result.was_over) == (result.cells, True, False)
    assert len(told) == 1
    assert told[0].startswith("g: already finished, 9 cells. To train all anew, take another name in its file; ")
    assert files(storage) == before
    assert len(next(iter(mlflow_children(storage).values()))) == 9

    edited = find_cells(load_grid(path, ["budget.steps=13"]), storage)
    assert all("steps: 12 -> 13" in cell.changed for cell in edited)
    assert not any(cell.changed for cell in find_cells(load_grid(path, []), storage))
    with pytest.raises(UserError, match=r"steps: 12 -> 13.*another name"):
        run(path, storage, "budget.steps=13")
    assert files(storage) == before


def test_directions_read_the_same_rows_and_differ(grid_file: GridFile, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    run(grid_file(), storage)
    one, other = losses(storage, "g_forward_d1_lr1_s0"), losses(storage, "g_backward_d1_lr1_s0")
    assert one[0] == pytest.approx(other[0], abs=0.05)  # same weights, same text: both begin at chance
    assert one != other


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_train_as_one(grid_file: GridFile, tmp_path: Path, compiled: bool) -> None:
    axes = {"direction": ["forward"], "resources.workers": [1, 2]}
    path = grid_file(axes=axes, depth=1, evaluation={"tokens": 4096}, compute={"compile": compiled})
    storage = tmp_path / "storage"
    result = run(path, storage)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
    assert {ExperimentFolder(storage, cell.id).config().compute.compile for cell in result.cells} == {compiled}
    one, two = (losses(storage, f"g_forward_d1_lr1_s0_workers{n}") for n in (1, 2))
    assert len(two) == 12
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two == pytest.approx(one, rel=2e-3)
    bpb = [cell.metrics["val_bpb"] for cell in result.cells]
    assert bpb[1] == pytest.approx(bpb[0], rel=2e-3)


@pytest.mark.slow  # tests/faults/test_night.py kills a worker too, among other faults
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_taken_up_again_with_the_same_losses(
    grid_file: GridFile, tmp_path: Path, workers: int
) -> None:
    settings: dict[str, Any] = {
        "axes": {"direction": ["forward"], "depth": [1]},
        "budget": {"steps": 300, "batch_tokens": 512},
        "checkpoint": {"every": 10},
        "resources": {"workers": workers},
    }
    cell = "g_forward_d1_lr1_s0"
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    run(grid_file(**settings), calm)
    with once_at_step(storage, cell, 25, kill) as killed:
        result = run(grid_file(**settings), storage)
    assert killed, "the run ended before it could be killed"
    assert [cell.state for cell in result.cells] == ["finished"]
    assert losses(storage, cell) == losses(calm, cell)
    assert result.cells[0].metrics["val_bpb"] == load_cells(calm, [cell])[0].metrics["val_bpb"]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_cell_that_dies_too_often_fails_and_says_why(grid_file: GridFile, tmp_path: Path) -> None:
    path = grid_file(
        axes={"direction": ["forward"], "depth": [1]},
        budget={"steps": 300, "batch_tokens": 512},
        launch={"retries": 0},
    )
    with once_at_step(tmp_path / "storage", "g_forward_d1_lr1_s0", 5, kill) as killed:
        [cell] = run(path, tmp_path / "storage").cells
    assert killed, "the run ended before it could be killed"
    assert cell.state == "failed"
    assert cell.reason.startswith("crashed, see error.txt: ")
    error = (tmp_path / "storage" / cell.id / "error.txt").read_text()
    assert "died" in error
    assert error.strip().endswith(cell.reason.removeprefix("crashed, see error.txt: "))


def test_a_cell_that_diverges_fails_alone(
    grid_file: GridFile,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, storage = grid_file(), tmp_path / "storage"
    plan = load_grid(path, [])
    monkeypatch.setattr("bwlm.grid.texts.prepare", lambda *_: prepared)
    # a checkpoint from before the first step, whose head is not a number any more
    folder = ExperimentFolder(storage, plan.cells[0].id)
    cell = plan.cells[0]
    compute = hardware.plan_compute(cell.experiment, cell.shape, cell.steps)
    config = run_config(plan, cell, prepared, storage, None, compute)
    folder.create(config)
    model = build_model(config, torch.device("cpu"))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    states = copy_to_host(model.state_dict()), copy_to_host(build_optimizer(model).state_tensors())
    meta = config.checkpoint_meta() | {"progress": vars(TrainingProgress(step=0))}
    write_checkpoint(folder.checkpoints, Snapshot(0, *states, {}, meta), KeepPolicy(2))
    result = run_plan(plan, storage, lambda _: None)
    assert not result.complete
    failed, finished = result.cells
    assert (failed.state, finished.state) == ("failed", "finished")
    assert "loss nan" in failed.reason
    assert "step 1, on rows" in failed.reason
    tag = f"tags.`bwlm.experiment_id` = '{failed.id}'"
    client = MlflowClient(result.tracking_uri)
    [shown_run] = client.search_runs([e.experiment_id for e in client.search_experiments()], tag)
    assert shown_run.info.status == "FAILED"
    assert shown_run.data.tags["bwlm.diverged"] == "step 1"
    assert failed.reason in result.report.read_text()

    # the command says so too: the failed cell is tried again, the finished one is not, and the exit code is 1
    before = files(storage / finished.id)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["bwlm", "grid", "run", str(path), "--storage", str(storage), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    shown = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in shown["cells"]] == ["failed", "finished"]
    assert files(storage / finished.id) == before


def test_asha_stops_cells_within_a_direction_only(grid_file: GridFile, tmp_path: Path) -> None:
    path = grid_file(
        axes={"direction": ["forward", "backward"], "depth": [1], "lr": [1.0, 0.001, 0.0005, 0.0001], "seed": [0]},
        budget={"steps": 30, "batch_tokens": 512},
        evaluation={"every": 5, "tokens": 1024},
        scheduler={"kind": "asha", "grace_steps": 5},
        launch={"concurrency": 2},
    )
    storage = tmp_path / "storage"
    result = run(path, storage)
    assert result.complete
    for direction in ("forward", "backward"):
        cells = [cell for cell in result.cells if cell.direction == direction]
        assert {cell.state for cell in cells} == {"finished", "stopped"}
        assert next(cell for cell in cells if cell.lr == 1.0).state == "finished"
        assert all("scheduler" in cell.reason and cell.step < 30 for cell in cells if cell.state == "stopped")
    before = files(storage)
    assert run(path, storage).cells == result.cells
    assert files(storage) == before


@pytest.mark.slow
def test_asha_loses_no_cell_of_several_workers(grid_file: GridFile, tmp_path: Path) -> None:
    """A group of workers does not hear of the stop, so its trial's process cannot be the next one's."""
    path = grid_file(
        axes={"direction": ["forward"], "depth": [1], "lr": [1.0, 0.001, 0.0005, 0.0001], "seed": [0]},
        budget={"steps": 30, "batch_tokens": 512},
        evaluation={"every": 5, "tokens": 1024},
        resources={"workers": 2},
        scheduler={"kind": "asha", "grace_steps": 5},
        launch={"concurrency": 1},
    )
    result = run(path, tmp_path / "storage")
    assert result.complete
    assert {cell.state for cell in result.cells} == {"finished", "stopped"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"resources": {"workers": 16}, "budget": {"steps": 2, "batch_tokens": 1024}},
            r"resources\.workers.*16 workers",
        ),
        ({"resources": {"cpus_per_worker": 64}}, r"resources\.workers.*room for 0"),
        ({"resources": {"gpus_per_worker": 1}}, r"resources\.workers.*1 GPU,"),
        ({"axes": {"resources.gpus_per_worker": [0, 1]}}, r"resources\.workers.*1 GPU,"),
        ({"launch": {"concurrency": 50}}, r"launch\.concurrency: 50.*lower it"),
    ],
)
def test_a_grid_that_can_never_be_placed_is_refused(
    grid_file: GridFile, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    axes = {"direction": ["forward"], "depth": [1], "seed": list(range(100))} | settings.pop("axes", {})
    with pytest.raises(UserError, match=message):
        run(grid_file(axes=axes, **settings), tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def test_two_launches_of_one_grid_share_the_work(grid_file: GridFile, tmp_path: Path) -> None:
    path, storage = grid_file(budget={"steps": 120, "batch_tokens": 512}), tmp_path / "storage"
    results: list[LaunchResult] = []
    other = threading.Thread(target=lambda: results.append(run(path, storage)))
    other.start()
    while other.is_alive() and not list(storage.glob("*/metrics.jsonl")):  # Tune starts one at a time
        time.sleep(0.05)
    results.append(run(path, storage))
    other.join()
    assert results[0].cells == results[1].cells
    for cell in results[0].cells:
        assert [entry.step for entry in read_journal(storage / cell.id)] == list(range(1, 121))
    assert [len(children) for children in mlflow_children(storage).values()] == [2]


def test_a_grid_tracks_to_a_server(grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tmp_path / "storage"
    with server(tmp_path, free_port()) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        result = run(grid_file(), storage)
        assert result.complete
        assert result.tracking_uri == uri
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("bwlm")
        found = client.search_runs([experiment.experiment_id])
        runs = {run.data.tags.get("bwlm.experiment_id", run.info.run_name): run for run in found}
        parent = runs.pop("g")
        assert runs.keys() == {cell.id for cell in result.cells}
        assert "RESEARCH_REPORT.md" in {item.path for item in client.list_artifacts(parent.info.run_id)}
        for cell in result.cells:
            child = runs[cell.id]
            assert child.info.status == "FINISHED"
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert child.data.params["direction"] == cell.direction
            assert child.inputs.dataset_inputs[0].dataset.digest
            logged = client.get_metric_history(child.info.run_id, "train/loss")
            assert [(point.step, point.value) for point in logged] == list(enumerate(losses(storage, cell.id), 1))
    assert not (storage / "mlflow.db").exists()
