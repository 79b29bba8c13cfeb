"""Scores on tasks in MLflow: named for people, sent once, whatever breaks off."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bwlm.config import Experiment
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.metrics import TASK_METRICS, task_metric
from bwlm.record.mlflow_note import is_closed
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.run_config import RunConfig
from bwlm.record.score_delivery import deliver_scores
from bwlm.record.task_metrics import score_points
from bwlm.record.task_results import TaskResult, write_result
from bwlm.record.tracking import Tracking
from tests.record.mlflow_runs import (
    COMPUTE,
    delivered,
    enlist,
    expected,
    log_steps,
    lost_client,
    lost_on_the_way_back,
    lost_on_the_way_in,
    make,
)

NATIVE = "tasks/arc_easy/native"


def write(
    folder: ExperimentFolder,
    reading: str,
    accuracies: Mapping[str, float | None],
    name: str = "arc_easy",
    step: int = 10,
    form: str = "cloze",
    items: int = 8,
) -> None:
    """Write the result of a task with an accuracy by each rule; None where it has no meaning."""
    scores: list[dict[str, Any]] = [
        {"step": step, "form": form, "control": None, "direction": reading, "rule": rule, "accuracy": value, "n": items}
        for rule, value in accuracies.items()
    ]
    controls = [one | {"control": "shuffled", "accuracy": 0.25} for one in scores]
    result = TaskResult({"weights": f"{step}{dict(accuracies)}"}, [*scores, *controls], {})
    write_result(folder.evaluation("base", reading), name, result, {"item": []})


def run_of(direction: str, storage: Path) -> ExperimentFolder:
    folder = ExperimentFolder(storage, direction)
    experiment = Experiment.model_validate({"direction": direction, "depth": 2, "lr": 0.5, "seed": 3})
    folder.create(RunConfig(direction, experiment, {"direction": direction}, 10, COMPUTE, "/corpus", "/tokenizer"))
    return folder


def scores_of(client: MlflowClient, run: str) -> dict[str, list[tuple[int, float]]]:
    names = [name for name in client.get_run(run).data.metrics if name.startswith("tasks/")]
    return {name: delivered(client, run, name) for name in names}


# ---- what a result says ----


@pytest.mark.parametrize(
    ("direction", "figures"),
    [
        ("forward", {"native": 0.75, "crossed": 0.25, "direction_gap": 0.5}),
        ("backward", {"native": 0.25, "crossed": 0.75, "direction_gap": -0.5}),
        ("bidirectional", {"native": 0.5, "bidirectional_balance": 0.5}),
        ("permuted", {}),
    ],
)
def test_the_four_figures_of_a_direction_by_hand(direction: str, figures: dict[str, float], tmp_path: Path) -> None:
    folder = run_of(direction, tmp_path)
    write(folder, "forward", {"conditional": 0.75, "joint": 0.625})
    write(folder, "backward", {"conditional": 0.25})
    rules = {"conditional_forward": 0.75, "joint_forward": 0.625, "conditional_backward": 0.25}
    assert score_points(folder) == {f"tasks/arc_easy/{name}@10": value for name, value in (rules | figures).items()}


def test_a_figure_is_left_out_where_readings_have_other_items_or_none(tmp_path: Path) -> None:
    folder = run_of("bidirectional", tmp_path)
    write(folder, "forward", {"pass@1": 0.5}, "gsm8k")
    write(folder, "backward", {"pass@1": None}, "gsm8k")
    write(folder, "forward", {"conditional": 0.5})
    write(folder, "backward", {"conditional": 0.25}, items=7)
    (folder.evaluation("base", "forward") / "mmlu.json").write_text("{")  # damaged
    write_json(folder.evaluation("base", "forward") / "validation.json", {"loss": 1.0})
    assert score_points(folder) == {
        "tasks/gsm8k/native@10": 0.5,
        "tasks/gsm8k/pass_at_1_forward@10": 0.5,
        "tasks/arc_easy/native@10": 0.375,
        "tasks/arc_easy/conditional_forward@10": 0.5,
        "tasks/arc_easy/conditional_backward@10": 0.25,
    }


def test_a_mean_over_readings_waits_until_all_of_them_are_scored(tmp_path: Path) -> None:
    """Else a delivery between the two results would send one reading's accuracy as the mean, and the mean after it."""
    folder = run_of("bidirectional", tmp_path)
    write(folder, "forward", {"conditional": 0.75}, "arc_easy@5", 5)
    assert score_points(folder) == {"tasks/arc_easy/conditional_forward@5": 0.75}
    write(folder, "backward", {"conditional": 0.25}, "arc_easy@5", 5)
    assert score_points(folder)[f"{NATIVE}@5"] == 0.5
    crossed = run_of("backward", tmp_path)
    write(crossed, "forward", {"conditional": 0.75})
    assert score_points(crossed)["tasks/arc_easy/crossed@10"] == 0.75


def test_settings_steps_and_forms_have_points_of_their_own(tmp_path: Path) -> None:
    folder = run_of("forward", tmp_path)
    write(folder, "forward", {"conditional": 0.5}, "mmlu-law@4.n8", 4)
    write(folder, "forward", {"conditional": 0.25}, "mmlu-law.n8", form="lettered")
    assert score_points(folder) == {
        "tasks/mmlu-law.n8/native@4": 0.5,
        "tasks/mmlu-law.n8/conditional_forward@4": 0.5,
        "tasks/mmlu-law.n8/lettered/conditional_forward@10": 0.25,
    }


@pytest.mark.parametrize("task", ["core-big bench (cs)", "mmlu:law", "a@b", "日本", "x#y?z%"])
def test_any_task_has_a_name_that_mlflow_takes(task: str, client: MlflowClient, store: Tracking) -> None:
    """And the table of docs/mlflow.md has its form."""
    folder = run_of("forward", Path(store._storage))
    run = store.child_run(folder, None, {"name": "c", "digest": "0" * 8, "source": "s"})
    name = task_metric(task, "pass@1_forward")
    client.log_metric(run, name, 0.5)
    patterns = [re.sub("[A-Z]+", "[^/]+", metric.mlflow) for metric in TASK_METRICS.values()]
    assert any(re.fullmatch(pattern, name) for pattern in patterns)


# ---- delivery ----


def test_scores_arrive_once_by_step_of_the_checkpoint(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    write(folder, "backward", {"conditional": 0.5}, "arc_easy@4", 4)
    assert store.deliver(folder) == 6 + 2
    assert store.deliver(folder) == 0
    write(folder, "backward", {"conditional": 0.75})
    write(folder, "backward", {"conditional": 0.5}, "arc_easy@4", 4)  # evaluated again, with the same scores
    assert deliver_scores(tmp_path, [folder]) == []
    assert deliver_scores(tmp_path, [folder]) == []
    assert Tracking(store.uri, tmp_path).deliver(folder) == 0
    expected_points = [(4, 0.5), (10, 0.75)]
    assert scores_of(client, child) == {NATIVE: expected_points, "tasks/arc_easy/conditional_backward": expected_points}
    assert delivered(client, child) == expected(3)


@pytest.mark.parametrize("broken", [lost_on_the_way_in, lost_on_the_way_back])
def test_scores_whose_answer_was_lost_arrive_once(
    broken: Any, store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    write(folder, "backward", {"conditional": 0.5})
    monkeypatch.setattr(store._client, "log_batch", broken(store._client.log_batch))
    assert not store.try_deliver(folder)
    monkeypatch.undo()
    time.sleep(0.002)  # so that a second time stamp would be another
    assert store.try_deliver(folder)
    assert delivered(client, child, NATIVE) == [(10, 0.5)]


def test_more_scores_than_one_call_takes(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    write(folder, "backward", {f"rule{n}": n / 1100 for n in range(1100)})
    assert deliver_scores(tmp_path, [folder]) == []
    assert len(scores_of(client, child)) == 1100


def test_a_server_that_is_away_keeps_the_scores_waiting(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    write(folder, "backward", {"conditional": 0.5})
    with monkeypatch.context() as away:
        away.setattr("bwlm.record.score_delivery.open_client", lambda uri: lost_client())
        [said] = deliver_scores(tmp_path, [folder])
    assert said == (
        f"tracking: {store.uri} does not answer (connection reset); "
        "the scores of 1 run wait in the storage, and the same command delivers them"
    )
    assert deliver_scores(tmp_path, [folder]) == []
    assert delivered(client, child, NATIVE) == [(10, 0.5)]


def test_runs_without_an_mlflow_run_are_said_once(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    """Never tracked, deleted in MLflow, or of a store that is gone; no store is made for them."""
    never, deleted, gone = (run_of(name, tmp_path) for name in ("forward", "backward", "bidirectional"))
    client.delete_run(store.child_run(deleted, None, {"name": "c", "digest": "0" * 8, "source": "s"}))
    write_json(gone.path / "mlflow.json", {"run_id": "0" * 32})
    for folder in (never, deleted, gone):
        write(folder, "forward", {"conditional": 0.5})
    [said] = deliver_scores(tmp_path, [never, deleted, gone])
    assert said == "tracking: forward and 2 more have no MLflow run: the scores are in the run's folder only"
    assert not (tmp_path / "mlflow.db").exists()
    assert deliver_scores(tmp_path, [run_of("permuted", tmp_path)]) == []


def test_a_new_run_in_the_place_of_a_deleted_one_gets_all_scores(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    write(folder, "backward", {"conditional": 0.5})
    store.deliver(folder)
    client.delete_run(child)
    _, new = enlist(store, folder)
    store.deliver(folder)
    assert delivered(client, new, NATIVE) == [(10, 0.5)]


def test_a_store_that_was_set_back_gets_the_scores_again(tmp_path: Path) -> None:
    """And the journal too, although scores of the last step are there."""
    storage = tmp_path / "runs"
    store = Tracking(tracking_uri(storage, None), storage)
    folder, database = make(storage), storage / "mlflow.db"
    _, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    store.deliver(folder)
    backup = database.read_bytes()
    log_steps(folder, 4, 10)
    write(folder, "backward", {"conditional": 0.5})
    status = Status("finished", "", 10, {})
    assert store.close_child(folder, status, [])
    store._client._tracking_client.store.engine.dispose()
    database.write_bytes(backup)
    write(folder, "backward", {"conditional": 0.25}, "mmlu")
    assert deliver_scores(storage, [folder]) == []  # before the next launch finds that the store was set back
    again = Tracking(store.uri, storage)
    enlist(again, folder)
    assert again.close_child(folder, status, [])
    client = MlflowClient(store.uri)
    assert delivered(client, child) == expected(10)
    assert delivered(client, child, NATIVE) == [(10, 0.5)]
    assert delivered(client, child, "tasks/mmlu/native") == [(10, 0.25)]


def test_a_run_that_is_scored_after_its_end_is_closed_anew(store: Tracking, tmp_path: Path) -> None:
    """So the next launch writes its report again, with the scores, and attaches it."""
    folder, status = make(tmp_path), Status("finished", "", 3, {})
    enlist(store, folder)
    log_steps(folder, 1, 3)
    assert store.close_child(folder, status, [])
    assert is_closed(folder, status)
    write(folder, "backward", {"conditional": 0.5})
    assert not is_closed(folder, status)
    assert store.close_child(folder, status, [])
    assert is_closed(folder, status)


def test_the_store_that_a_run_was_given_is_found_without_the_launchs_settings(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    assert read_json(folder.path / "mlflow.json")["store"] == store.uri
    moved = tmp_path / "moved"
    shutil.copytree(folder.path, moved / folder.id)
    there = ExperimentFolder(moved, folder.id)
    write(there, "backward", {"conditional": 0.5})
    assert deliver_scores(moved, [there]) == []
    assert delivered(client, child, NATIVE) == [(10, 0.5)]
