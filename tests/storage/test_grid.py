"""A grid on a bucket, launched on two machines at once, and everything that reads it from a third."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from mlflow import MlflowClient

from bwlm.chat.loading import load_served
from bwlm.record.experiment import ExperimentFolder
from bwlm.storage.folder import bucket_at
from bwlm.storage.head import read_head
from bwlm.storage.objects import Bucket
from bwlm.storage.opened import board_of, open_storage
from tests.grids import BWLM, private_environment
from tests.mlflow_server import free_port, server
from tests.runs import losses
from tests.s3_server import BUCKET, CREDENTIALS
from tests.shell import Shell, check_mistake

pytestmark = pytest.mark.faults
ADDRESS = f"s3://{BUCKET}/grids/of/a/team"
CELLS = [f"g_{direction}_d1_lr1_s{seed}" for direction in ("forward", "backward") for seed in (0, 1)]


class Launched(NamedTuple):
    """A grid that two launches have trained to a bucket, and one to a folder."""

    local: Path
    tracking: str
    said: list[str]
    """What the two launches printed on stdout."""
    variables: dict[str, str]


def launch(grid: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [str(BWLM), "grid", "run", str(grid), "--json", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def launched(s3: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("team")
    grid = folder / "g.yaml"
    content: dict[str, Any] = {
        "name": "g",
        "data": {"source": str(corpus)},
        "tokenizer": {"vocab_size": 400},
        "axes": {"direction": ["forward", "backward"], "depth": [1], "lr": [1.0], "seed": [0, 1]},
        "model": {"sequence_length": 64, "head_dim": 32},
        "budget": {"steps": 12, "batch_tokens": 512},
        "evaluation": {"every": 6, "tokens": 2048},
        "checkpoint": {"every": 4},
        "launch": {"storage": ADDRESS, "concurrency": 1},
    }
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    with server(folder, free_port()) as tracking:
        variables = CREDENTIALS | {"AWS_ENDPOINT_URL": s3, "MLFLOW_TRACKING_URI": tracking}
        machines = [
            private_environment(folder) | variables | {"BWLM_SCRATCH": str(folder / name)} for name in ("one", "two")
        ]
        for environment in machines:
            del environment["BWLM_STORAGE"]
        launches = [launch(grid, environment) for environment in machines]
        said = [process.communicate(timeout=400) for process in launches]
        assert [process.returncode for process in launches] == [0, 0], said
        alone = launch(grid, machines[0] | {"MLFLOW_TRACKING_URI": ""}, "--storage", str(folder / "runs"))
        _, err = alone.communicate(timeout=400)
        assert alone.returncode == 0, err
        yield Launched(folder / "runs", tracking, [one[0] for one in said], variables)


@pytest.fixture
def reader(launched: Launched, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    """A command line on a machine that has not seen the storage before."""
    for name, value in launched.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / "reader"))
    monkeypatch.setenv("BWLM_STORAGE", ADDRESS)
    bucket_at.cache_clear()
    board_of.cache_clear()
    return shell


def without_speed(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of runs without what depends on the moment."""
    kept = [{**cell, "metrics": {k: v for k, v in cell["metrics"].items() if "second" not in k}} for cell in cells]
    return [{k: v for k, v in cell.items() if k != "log_bytes"} for cell in kept]


def test_each_cell_is_trained_once(launched: Launched, reader: Shell) -> None:
    storage = open_storage(ADDRESS)
    for name in CELLS:
        head, _ = read_head(Bucket(ADDRESS), name)
        saved = {stored.attempt for path, stored in head.files.items() if path.startswith("checkpoints/")}
        assert len(saved) == 1, f"{name}: {saved}"
        assert losses(ExperimentFolder(storage, name)) == losses(ExperimentFolder(launched.local, name))
    one, two = (json.loads(said) for said in launched.said)
    assert one["cells"] == two["cells"]  # pace and cost are those of each machine's launch
    assert {cell["state"] for cell in one["cells"]} == {"finished"}


def test_mlflow_has_each_run_and_each_step_once(launched: Launched) -> None:
    client = MlflowClient(launched.tracking)
    home = client.get_experiment_by_name("bwlm")
    assert home is not None
    runs = client.search_runs([home.experiment_id])
    named = [run.data.tags.get("bwlm.experiment_id") for run in runs]
    assert sorted(filter(None, named)) == sorted(CELLS)
    assert len(runs) == len(CELLS) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if "bwlm.experiment_id" in run.data.tags:
            points = client.get_metric_history(run.info.run_id, "train/loss")
            assert sorted(point.step for point in points) == list(range(1, 13))


def test_lists_and_analyses_are_those_of_a_folder(launched: Launched, reader: Shell) -> None:
    there = ["--storage", str(launched.local)]
    assert without_speed(reader.json("runs", "list")) == without_speed(reader.json("runs", "list", *there))
    assert reader.json("analyze", "gap", "g") == reader.json("analyze", "gap", "g", *there)
    assert reader.json("analyze", "positions", "g") == reader.json("analyze", "positions", "g", *there)
    assert reader.json("eval", CELLS[0]) == reader.json("eval", CELLS[0], *there)
    kept = [reader.json("runs", "show", CELLS[0], *where) for where in ([], there)]
    sizes = [[saved["bytes"] for saved in one["checkpoints"]] for one in kept]
    assert sizes[0] == pytest.approx(sizes[1], abs=100)  # metadata hold figures of speed
    assert kept[0]["files"].keys() >= {"base.h5", "config.json", "metrics.jsonl"}
    assert not kept[0]["damage"]
    assert reader("runs", "list").out.strip().endswith(f"4 experiments in {ADDRESS}")


def test_a_model_is_loaded_and_talked_to(reader: Shell) -> None:
    answer = reader("sample", CELLS[0], "--prompt", "the river", "--max-tokens", "4")
    assert answer.code == 0, answer.err
    assert reader("chat", CELLS[0], "--prompt", "the river").code == 0
    assert reader("export", CELLS[0], "exported").code == 0
    assert (reader.folder / "exported" / "model.safetensors").exists()
    (served,) = load_served(ADDRESS, [CELLS[1]], 1, 1, 1, "auto")
    assert served.name == CELLS[1]


def test_scores_that_one_machine_made_are_another_ones(
    reader: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = ["eval", CELLS[0], "--tasks", "builtin:spelling", "--max-examples", "2"]
    scores = reader.json(*asked)
    monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / "other"))
    monkeypatch.setattr("bwlm.evaluate.tasks.stored.evaluate_reading", lambda *_: pytest.fail("scored again"))
    assert reader.json(*asked) == scores


def test_a_child_begins_from_a_run_of_another_machine(launched: Launched, reader: Shell, tmp_path: Path) -> None:
    environment = private_environment(tmp_path) | launched.variables | {"BWLM_SCRATCH": str(tmp_path / "third")}
    settings = ["budget.steps=2", "budget.batch_tokens=512", "evaluation.tokens=1024"]
    command = [str(BWLM), "train", "--phase", "sft", "--parent", CELLS[0], "--id", "child", "--storage", ADDRESS]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "finished"
    head, _ = read_head(Bucket(ADDRESS), "child")
    assert "RESEARCH_REPORT.md" in head.files
    assert "checkpoints/step_000002/meta.json" in head.files


def test_what_is_read_again_comes_from_this_machine(reader: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run does not change: the second reading asks only which heads there are."""
    reader.json("eval", CELLS[0])
    asked: list[str] = []
    monkeypatch.setattr(Bucket, "download", lambda self, key, target: asked.append(key))
    reader.json("runs", "list")
    reader.json("analyze", "gap", "g")
    assert reader("sample", CELLS[0], "--prompt", "the river", "--max-tokens", "1").code == 0
    assert not asked


def test_a_storage_is_copied_out_whole(launched: Launched, reader: Shell) -> None:
    assert reader("storage", "pull", "copy").code == 0
    there = ["--storage", "copy"]
    assert without_speed(reader.json("runs", "list", *there)) == without_speed(reader.json("runs", "list"))
    assert reader("sample", CELLS[0], "--prompt", "the river", "--max-tokens", "1", *there).code == 0
    assert reader("analyze", "report", "g", *there).code == 0
    check_mistake(reader("storage", "pull", "copy"), "copy: not empty: name a new folder")
    check_mistake(reader("storage", "pull", "other", *there), "is a folder already: name s3://bucket/prefix")


def test_a_run_that_is_deleted_is_gone_on_all_machines(
    reader: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert reader("runs", "list").code == 0
    assert reader("runs", "delete", CELLS[-1], "--yes").code == 0
    assert CELLS[-1] not in [run["id"] for run in reader.json("runs", "list")]
    monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / "other"))
    assert CELLS[-1] not in [run["id"] for run in reader.json("runs", "list")]
    assert not [one.key for one in Bucket(ADDRESS).list(f"{CELLS[-1]}/")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MLFLOW_TRACKING_URI": ""}, f"tracking: {ADDRESS} cannot hold MLflow's database: start `mlflow server`"),
        ({"BWLM_STORAGE": "s3://no-such-bucket/runs"}, "storage: s3://no-such-bucket/runs: there is no such bucket"),
        ({"BWLM_STORAGE": "s3://key:secret@bucket/runs"}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"BWLM_STORAGE": "ftp://host/runs"}, "is neither a folder nor a bucket: give a path, or s3://bucket/prefix"),
        ({"BWLM_STORAGE": "s3://bucket/../runs"}, "an empty part, . or .. in it"),
    ],
)
def test_mistakes_are_told_in_a_line(
    changed: dict[str, str], message: str, reader: Shell, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    settings = [f"data.source={corpus}", "budget.steps=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    check_mistake(reader("train", "--direction", "forward", "--depth", "1", *options), message)


def test_a_bucket_that_does_not_answer_is_told_in_a_line(reader: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    bucket_at.cache_clear()
    answer = reader("runs", "list")
    assert (answer.code, answer.out) == (1, "")
    assert re.fullmatch(rf"bwlm: storage: {ADDRESS} does not answer \(error sending request\)\n", answer.err)
