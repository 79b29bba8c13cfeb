"""Names, times, tags and the verdict of a grid, as a person sees them in MLflow."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import Entry
from bwlm.record.metrics import METRICS, final_for_mlflow, for_mlflow
from bwlm.record.mlflow_note import noted_run
from bwlm.record.mlflow_view import LONGEST_TAG, GridSettings, run_name, shortened
from bwlm.record.provenance import provenance
from bwlm.record.tracking import Tracking
from tests.record.metric_table import MARK, PAGE, table
from tests.record.mlflow_runs import (
    DATASET,
    RESULT,
    delivered,
    enlist,
    expected,
    grid_folder,
    log_steps,
    make,
    open_grid,
)

FINISHED = Status("finished", "", 4, {"val_bpb": 1.5})


def write_entries(folder: ExperimentFolder, *entries: Entry) -> None:
    (folder.path / "metrics.jsonl").write_bytes(b"".join(entry.line() for entry in entries))


# ---- names ----


def test_the_page_on_mlflow_holds_the_table_of_metrics() -> None:
    assert PAGE.read_text().partition(MARK)[2] == table(), "run python -m tests.record.metric_table"


def test_metrics_stand_in_groups_with_losses_first() -> None:
    names = [metric.mlflow for metric in METRICS.values()]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(name.partition("/")[0] for name in names)) == ["train", "val", "worker"]
    step = {"mfu": 0.5, "grad_norm": 1.0, "val_bpb": 2.0, "my_own": 3.0, "train_loss": 4.0}
    assert list(for_mlflow(step).items()) == [
        ("train/loss", 4.0), ("val/bpb", 2.0), ("train/optim/grad_norm", 1.0), ("worker/mfu", 0.5), ("my_own", 3.0)
    ]  # fmt: skip
    end = {"train_loss_smooth": 1.0, "val_bpb_forward": 2.0, "val_bpb": 3.0}
    assert final_for_mlflow(end | {"my_own": 4.0}) == {
        "train/final/loss_smooth": 1.0, "val/final/bpb": 3.0, "val/final/bpb_forward": 2.0, "final/my_own": 4.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("run", "direction", "phase", "name"),
    [
        ("g_forward_d12_lr0.5_s0", "forward", "base", "d12_lr0.5_s0_forward"),
        ("g_bidirectional_d12_lr1e-05_s10", "bidirectional", "base", "d12_lr1e-05_s10_bidirectional"),
        ("g_backward_d1_lr1_s0_matrix_lr0.02", "backward", "base", "d1_lr1_s0_backward_matrix_lr0.02"),
        ("g_backward_d1_lr1_s0-base", "backward", "base", "d1_lr1_s0-base_backward"),
        ("g_backward_d1_lr1_s0-sft_lr2", "backward", "sft", "d1_lr1_s0-sft_backward_lr2"),
        ("mine", "forward", "base", "mine"),
    ],
)
def test_names_of_cells_differ_where_lists_cut_them(
    run: str, direction: str, phase: str, name: str, tmp_path: Path
) -> None:
    config = make(tmp_path).config()
    experiment = config.experiment.model_copy(update={"direction": direction, "phase": phase})
    assert run_name(replace(config, id=run, experiment=experiment)) == name


def test_a_run_with_metrics_of_old_names_gets_all_of_them_under_the_new(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 4)
    assert store.close_child(folder, FINISHED, [])
    noted = read_json(folder.path / "mlflow.json")
    write_json(folder.path / "mlflow.json", {name: value for name, value in noted.items() if name != "names"})
    write_entries(folder, *(Entry(step, step, {"train_loss": 1 / step}) for step in range(1, 5)))
    for _ in range(2):
        again = Tracking(store.uri, tmp_path)
        assert enlist(again, folder)[1] == child
        assert again.close_child(folder, FINISHED, [])
        assert delivered(client, child, "train/loss") == expected(4)
    assert delivered(client, child, "loss") == expected(4)


# ---- times ----


def test_a_run_lasts_as_long_as_its_training(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    store.expect(folder, open_grid(store, tmp_path), DATASET)
    assert not store.deliver(folder)
    assert store.run_of(make(tmp_path, "other")) is None
    assert not (folder.path / "mlflow.json").exists()
    write_entries(folder, Entry(1, 10_000, {"loss": 1.0, "step_seconds": 1.5}), Entry(2, 12_000, {"loss": 0.5}))
    assert store.deliver(folder) == 3
    assert store.close_child(folder, FINISHED, [])
    info = client.get_run(store.run_of(folder) or "").info
    assert (info.start_time, info.end_time) == (8_500, 12_000)


def test_a_cell_that_fails_before_its_first_step_has_a_run(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    store.expect(folder, open_grid(store, tmp_path), DATASET)
    assert store.close_child(folder, Status("failed", "no memory"), [])
    assert client.get_run(store.run_of(folder) or "").info.status == "FAILED"


def test_an_expected_run_is_made_once_when_its_making_is_cut_off(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, parent = make(tmp_path), open_grid(store, tmp_path)
    store.expect(folder, parent, DATASET)
    log_steps(folder, 1, 2)

    def lost(*_: object, **__: object) -> None:
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(store._client, "log_inputs", lost)
        assert not store.try_deliver(folder)
    assert store.try_deliver(folder)
    child = noted_run(folder.path) or ""
    assert client.get_run(child).inputs.dataset_inputs
    assert delivered(client, child) == expected(2)
    [found] = client.search_runs([store._experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert found.info.run_id == child


def test_a_resumed_run_says_so(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder, parent = make(tmp_path), open_grid(store, tmp_path)
    log_steps(folder, 1, 4)
    for step in (2, 4):
        store.resumed(folder, step)
        store.expect(folder, parent, DATASET)
        store.deliver(folder)
    assert client.get_run(store.run_of(folder) or "").data.tags["bwlm.resumed"] == "from step 2, 4"


# ---- tags ----


def test_a_run_is_found_by_what_it_trains_and_tells_where_its_checkpoint_lies(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    for name in ("step_999999", "step_1000000"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "meta.json").touch()
    (folder.checkpoints / "step_2000000").mkdir()  # not committed
    assert store.close_child(folder, FINISHED, [])
    wanted = {"phase": "base", "direction": "backward", "depth": "2", "lr": "0.5", "seed": "3"}
    tags = client.get_run(child).data.tags
    assert {f"bwlm.{name}": value for name, value in wanted.items()}.items() <= tags.items()
    assert tags["bwlm.checkpoint"] == str(folder.checkpoints / "step_1000000")
    assert tags["bwlm.folder"] == str(folder.path)
    assert f"`bwlm runs show {folder.id}`" in tags["mlflow.note.content"]


def test_a_launch_tells_its_user_and_the_commit_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setattr("sys.argv", ["/venv/bin/bwlm", "grid", "run", "a b.yaml"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not [name for name in provenance() if ".git." in name]
    mine = tmp_path / "mine"
    subprocess.run(["git", "init", "-q", str(mine)], check=True)
    monkeypatch.chdir(mine)
    assert not [name for name in provenance() if ".git." in name], "no commit yet"
    (mine / "grid.yaml").write_text("name: g\n")
    author = ["-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", *author, "commit", "-qm", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (mine / "notes.txt").touch()  # no file of the repository
    tags = provenance()
    assert (tags["mlflow.source.git.commit"], tags["mlflow.source.git.dirty"]) == (head, "false")
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == ("ada", "bwlm")
    assert tags["bwlm.command"] == "bwlm grid run 'a b.yaml'"
    (mine / "grid.yaml").write_text("name: h\n")
    assert provenance()["mlflow.source.git.dirty"] == "true"


# ---- a grid's run ----


def test_a_grids_run_shows_settings_verdict_and_gaps(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    parent = open_grid(store, tmp_path)
    assert store.close_parent(grid_folder(tmp_path), [], True, RESULT)
    data = client.get_run(parent).data
    assert data.params == {"lr": "0.5"}
    assert {
        "bwlm.axis.direction": "forward, backward",
        "bwlm.cells": "1",
        "bwlm.verdict": RESULT.verdict,
        "mlflow.note.content": RESULT.text,
    }.items() <= data.tags.items()
    assert data.metrics == RESULT.metrics


def test_a_grid_that_grew_shows_its_new_values(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    """MLflow refuses another value of a parameter, so the first stays."""
    parent, home = open_grid(store, tmp_path), grid_folder(tmp_path)
    for _ in range(2):
        assert store.close_parent(home, [], True, RESULT)
    grown = GridSettings(2, {"data": "d", "lr": "1.0"}, {"lr": "0.5, 1.0", "direction": "forward, backward"})
    assert store.parent_run(home, "g", "name: g\n", grown) == parent
    better = replace(RESULT, text="other", metrics={"gap/d2_forward-backward": -0.5})
    assert store.close_parent(home, [], True, better)
    data = client.get_run(parent).data
    assert data.params == {"lr": "0.5", "data": "d"}
    assert (data.tags["bwlm.axis.lr"], data.tags["bwlm.cells"]) == ("0.5, 1.0", "2")
    assert data.tags["mlflow.note.content"] == "other"
    assert delivered(client, parent, "gap/d2_forward-backward") == [(0, 0.25), (0, -0.5)]
    assert data.metrics["gap/d2_forward-backward"] == -0.5


def test_a_description_that_a_person_wrote_stays(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    parent = open_grid(store, tmp_path)
    store.close_parent(grid_folder(tmp_path), [], True, RESULT)
    client.set_tag(parent, "mlflow.note.content", "mine")
    store.close_parent(grid_folder(tmp_path), [], True, replace(RESULT, text="other"))
    assert client.get_run(parent).data.tags["mlflow.note.content"] == "mine"


def test_a_long_text_is_cut_at_a_line() -> None:
    assert shortened("short") == "short"
    text = shortened("\n".join(["| a line |"] * 1000))
    assert len(text) <= LONGEST_TAG
    *lines, _, last = text.splitlines()
    assert set(lines) == {"| a line |"}
    assert last == "The rest is in RESEARCH_REPORT.md, among the artifacts."


# ---- experiments ----


def test_runs_lie_in_the_experiment_that_was_asked_for(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    first = Tracking(store.uri, tmp_path)
    parent = open_grid(first, tmp_path)
    chosen = Tracking(store.uri, tmp_path, "chosen")
    _, child = enlist(chosen, make(tmp_path))
    alone = chosen.child_run(make(tmp_path, "alone"), None, DATASET)
    names = {client.get_experiment(client.get_run(run).info.experiment_id).name for run in (parent, child)}
    assert names == {"theirs"}, "a cell lies beside its grid, or MLflow would not show it below"
    assert client.get_experiment(client.get_run(alone).info.experiment_id).name == "chosen"
