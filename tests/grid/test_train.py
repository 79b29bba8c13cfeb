"""`bwlm train`: one experiment with real Ray, Tune and MLflow, the same numbers as a grid's cell, and it goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from bwlm.cli import main
from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.record.checkpoint import checkpoint_steps, step_folder
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import last_entry, read_journal
from tests.conftest import english
from tests.grids import BWLM, GridFile, holder, private_environment, reap, runs

# of the grid that `grid_file` writes
SETTINGS = {
    "tokenizer.vocab_size": 400, "model.sequence_length": 64, "model.head_dim": 32, "budget.steps": 12,
    "budget.batch_tokens": 512, "evaluation.every": 6, "evaluation.tokens": 2048, "checkpoint.every": 4,
}  # fmt: skip

Train = Callable[..., tuple[int, str, str]]


def arguments(corpus: Path, storage: Path, run: str, **settings: Any) -> list[str]:
    given = SETTINGS | {"data.source": corpus} | {name.replace("__", "."): value for name, value in settings.items()}
    flags = ["--direction", "backward", "--depth", "1", "--id", run, "--storage", str(storage)]
    return ["train", "--phase", "base", *flags, *(word for k, v in given.items() for word in ("--set", f"{k}={v}"))]


@pytest.fixture
def train(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """The command in this process, with the settings of `grid_file`; gives its exit code, stdout and stderr."""

    def run(name: str, *more: str, **settings: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bwlm", *arguments(corpus, tmp_path / "storage", name, **settings), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def losses(folder: Path) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(folder)]


@pytest.mark.usefixtures("ray_cluster")
def test_an_experiment_is_a_cell_without_a_grid(
    train: Train, grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"
    code, out, err = train("x")
    assert code == 0
    # what is chosen is told before training, how far it is at each validation, and the figures at the end
    told = [line.strip() for line in err.splitlines()]
    begin = next(index for index, line in enumerate(told) if line.startswith("x: backward, depth 1, "))
    first = next(index for index, line in enumerate(told) if line.startswith("step 6/12, loss "))
    assert re.fullmatch(r"\w+, \w+ attention, (not )?compiled, \d+ threads? a worker", told[begin + 1])
    assert first > begin + 1
    assert told.count(f"new storage: storage in {tmp_path}") == 1
    assert ", val_bpb " in told[first]
    assert " tokens/s" in told[first]
    assert "finished" in out
    assert f"report  {storage / 'x' / 'RESEARCH_REPORT.md'}" in out
    assert f"sqlite:///{storage / 'mlflow.db'}" in out
    assert (storage / "x" / "RESEARCH_REPORT.md").read_text().startswith("# x\n")
    assert not (storage / "grids").exists()

    # the same numbers as a grid's cell
    path = grid_file(axes={"direction": ["backward"], "depth": [1], "lr": [1.0], "seed": [0]})
    [cell] = run_plan(load_grid(path, []), tmp_path / "grid", lambda _: None).cells
    assert losses(storage / "x") == losses(tmp_path / "grid" / cell.id)
    [listed] = runs(storage)
    assert {**listed, "id": cell.id} == {**cell.to_json(), "metrics": listed["metrics"]}
    assert listed["metrics"]["val_bpb"] == cell.metrics["val_bpb"]

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("bwlm").experiment_id])
    assert (run.info.run_name, run.info.status) == ("x", "FINISHED")
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.params["direction"] == "backward"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 12

    # again: nothing is trained, the figures are shown; with other settings it is refused
    before = (storage / "x" / "metrics.jsonl").stat().st_mtime_ns
    with monkeypatch.context() as without_ray:
        without_ray.setattr("bwlm.cluster.session.open_cluster", None)
        code, out, err = train("x", "--json")
    assert code == 0
    assert json.loads(out) == listed
    assert "x: already finished. To train it anew, take another --id, or first: bwlm runs delete x\n" in err
    code, out, err = train("x", budget__steps=13)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("bwlm: x: exists with other settings (steps: 12 -> 13): take another --id, or delete it: ")
    assert (storage / "x" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_text_files_is_trained_on_and_a_copy_of_it_is_the_same_run(train: Train, tmp_path: Path) -> None:
    rng = random.Random(0)
    for index in range(60):
        path = tmp_path / "notes" / f"{index % 3}" / f"note-{index}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(english(rng, 200))
    short = {"budget__steps": "4.0", "budget__batch_tokens": "'5_12'", "evaluation__every": 4}
    code, _, err = train("x", "--seed", "1e0", data__source=f"{tmp_path}/notes/**/*.md", **short)
    assert code == 0, err
    assert "(about 1 document in 20, chosen by content)" in err
    assert len(losses(tmp_path / "storage" / "x")) == 4
    shutil.copytree(tmp_path / "notes", tmp_path / "copied", copy_function=shutil.copyfile)
    code, out, err = train("x", "--seed", "1", "--json", data__source=f"{tmp_path}/copied/**/*.md", **short)
    assert (code, json.loads(out)["state"]) == (0, "finished"), err


def refusal(pid: int) -> str:
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+ seconds ago\)"
    mend = "wait for it, or end that process first; another experiment needs another --id"
    return rf"bwlm: x: {re.escape(socket.gethostname())}:{pid} trains it {since}: {mend}\n"


def test_an_experiment_that_is_trained_already_is_refused_before_ray_starts(train: Train, tmp_path: Path) -> None:
    """By the lease of a worker, as where a grid trains it or its launch is gone; nothing is made."""
    folder = ExperimentFolder(tmp_path / "storage", "x")
    folder.path.mkdir(parents=True)
    with folder.lease():
        before = sorted((tmp_path / "storage").rglob("*"))
        code, out, err = train("x")
        assert (code, out) == (2, "")
        assert re.fullmatch(refusal(os.getpid()), err)
        assert sorted((tmp_path / "storage").rglob("*")) == before


def test_a_second_launch_of_an_experiment_is_refused_from_the_beginning_of_the_first(
    train: Train, corpus: Path, tmp_path: Path, ray_cluster: str
) -> None:
    storage, folder = tmp_path / "storage", ExperimentFolder(tmp_path / "storage", "x")
    settings = {"budget__steps": 4000, "evaluation__every": 0}
    command = [BWLM, *arguments(corpus, storage, "x", **settings)]
    environment = private_environment(storage) | {"RAY_ADDRESS": ray_cluster}
    with (tmp_path / "driver.log").open("ab") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def until(true: Callable[[], Any]) -> None:
        while not true():
            assert first.poll() is None, (tmp_path / "driver.log").read_text()[-2000:]
            time.sleep(0.05)

    for begun in (
        lambda: (folder.path / "launch.json").exists(),  # its text is still to be prepared
        lambda: last_entry(folder.path),
    ):
        until(begun)
        code, out, err = train("x", **settings)
        assert (code, out) == (2, "")
        assert re.fullmatch(refusal(first.pid), err)
    assert holder(folder) not in (None, first.pid)

    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=300) == 143
    assert not (folder.path / "launch.json").exists()
    assert folder.status().state == "stopped"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_asked_to_end_it_goes_on_with_the_same_command(train: Train, corpus: Path, tmp_path: Path) -> None:
    """First with a Ray of its own, as on a laptop."""
    storage = tmp_path / "storage"
    settings = {"budget__steps": 300, "evaluation__every": 0, "checkpoint__every": 0}
    command = [BWLM, *arguments(corpus, storage, "x", **settings)]
    with (tmp_path / "driver.log").open("ab") as log:
        driver = subprocess.Popen(command, env=private_environment(storage), stdout=log, stderr=log)
    while (entry := last_entry(storage / "x")) is None or entry.step < 20:
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-2000:]
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=300) == 143
    reap(below)
    folder = ExperimentFolder(storage, "x")
    assert checkpoint_steps(folder.checkpoints) == [folder.status().step]
    assert [run["state"] for run in runs(storage)] == ["stopped"]
    assert "bwlm: stopped by SIGTERM; run the same command to resume\n" in (tmp_path / "driver.log").read_text()

    assert train("x", **settings)[0] == train("calm", **settings)[0] == 0
    assert losses(storage / "x") == losses(storage / "calm")
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    for run in client.search_runs([client.get_experiment_by_name("bwlm").experiment_id]):
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 300


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_with_other_workers_and_tells_of_a_damaged_checkpoint(train: Train, tmp_path: Path) -> None:
    storage, folder = tmp_path / "storage", ExperimentFolder(tmp_path / "storage", "x")
    assert train("x", checkpoint__keep=9)[0] == train("calm")[0] == 0
    newest = step_folder(folder.checkpoints, 12) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    folder.write_status(Status())  # as if it had been cut off after its last checkpoint
    code, _, err = train("x", checkpoint__keep=9, checkpoint__every=2, resources__workers=2)
    assert code == 0
    assert ", resumes from step 12\n" in err
    assert f"warning: x: {newest}: damaged (its SHA-256 is not the one in meta.json)" in err
    assert folder.config().experiment.resources.workers == 2
    assert checkpoint_steps(folder.checkpoints) == [4, 8, 10, 12]
    assert losses(storage / "x") == pytest.approx(losses(storage / "calm"), rel=1e-2)
    assert losses(storage / "x")[:8] == losses(storage / "calm")[:8]
