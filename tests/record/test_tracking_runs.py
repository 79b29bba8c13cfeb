"""MLflow: nested runs, made once, on SQLite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source
from mlflow.exceptions import MlflowException

from bwlm.errors import UserError
from bwlm.record.experiment import Status
from bwlm.record.journal import Journal
from bwlm.record.tracking import EXPERIMENT, Tracking
from tests.record.mlflow_runs import (
    DATASET,
    RESULT,
    delivered,
    enlist,
    expected,
    grid_folder,
    log_steps,
    lost_client,
    make,
    open_grid,
)

# ---- runs ----


def test_a_cell_is_a_run_below_its_grids(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)
    run = client.get_run(child)
    assert run.info.run_name == "d2_lr0.5_s3_backward"
    assert {
        "mlflow.parentRunId": parent,
        "bwlm.experiment_id": folder.id,
        "bwlm.fingerprint": folder.config().fingerprint,
        "bwlm.grid": "g",
    }.items() <= run.data.tags.items()
    assert all(run.data.tags.values()), "a tag without a value says nothing"
    assert run.data.params == {"direction": "backward", "lr": "0.5", "model.kv_heads": "None", "data": "d" * 64}
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("corpus", DATASET["digest"][:36])
    assert get_source(used).uri == DATASET["source"]
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert [item.path for item in client.list_artifacts(child)] == ["config.json"]
    grid = client.get_run(parent)
    assert grid.info.run_name == "g"
    assert [item.path for item in client.list_artifacts(parent)] == ["grid.yaml"]
    assert Path(client.download_artifacts(parent, "grid.yaml", str(tmp_path))).read_text() == "name: g\n"


def test_a_second_launch_finds_the_same_runs(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    first = enlist(store, folder)
    store.close_parent(grid_folder(tmp_path), [folder.path / "config.json"], False, RESULT)
    again = Tracking(store.uri, tmp_path)
    assert enlist(again, folder) == first
    assert client.get_run(first[0]).info.status == "RUNNING"
    [experiment] = [e for e in client.search_experiments() if e.name == EXPERIMENT]
    found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{first[0]}'")
    assert [run.info.run_id for run in found] == [first[1]]


def test_two_launches_that_deliver_a_cell_at_once_make_one_run(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    """Both have seen that the cell has no run yet; the second of them finds the first one's."""
    folder = make(tmp_path)
    parent = open_grid(store, tmp_path)
    launches = [store, Tracking(store.uri, tmp_path)]
    made = {launch._child_run(folder, parent, DATASET, known=None, seen=None) for launch in launches}
    assert len(made) == 1
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [run.info.run_id for run in found] == list(made)


def test_a_run_that_was_deleted_is_made_anew(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)
    log_steps(folder, 1, 2)
    store.deliver(folder)
    client.delete_run(parent)
    new_parent, same = enlist(store, folder)
    assert new_parent != parent
    assert same == child
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == new_parent
    client.delete_run(child)
    _, new_child = enlist(store, folder)
    assert new_child != child
    store.deliver(folder)
    assert delivered(client, new_child) == expected(2)


def test_a_store_that_stumbles_makes_no_second_run(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)

    def stumble(*_: object) -> None:
        raise MlflowException("the database is locked")

    monkeypatch.setattr(store._client, "get_run", stumble)
    with pytest.raises(UserError, match="does not answer"):
        store.child_run(folder, parent, DATASET)
    monkeypatch.undo()
    assert store.child_run(folder, parent, DATASET) == child


def test_the_end_of_a_run(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)
    log_steps(folder, 1, 4)
    report = tmp_path / "RESEARCH_REPORT.md"
    report.write_text("# report")
    (tmp_path / "earlier" / "then").mkdir(parents=True)
    (tmp_path / "earlier" / "then" / report.name).write_text("# another")
    for _ in range(2):  # a relaunch closes finished cells again
        assert store.close_child(folder, Status("finished", "", 4, {"val_bpb": 1.5}), [report])
        assert store.close_parent(grid_folder(tmp_path), [report, tmp_path / "earlier"], True, RESULT)
    run = client.get_run(child)
    assert run.info.status == "FINISHED"
    assert run.data.tags["bwlm.state"] == "finished"
    assert delivered(client, child) == expected(4)
    assert delivered(client, child, "val/final/bpb") == [(4, 1.5)]
    assert {item.path for item in client.list_artifacts(child)} == {"config.json", "RESEARCH_REPORT.md"}
    assert client.get_run(parent).info.status == "FINISHED"
    names = ("RESEARCH_REPORT.md", "earlier/then/RESEARCH_REPORT.md")
    texts = [Path(client.download_artifacts(parent, name)).read_text() for name in names]
    assert texts == ["# report", "# another"]


@pytest.mark.parametrize(("state", "shown"), [("failed", "FAILED"), ("stopped", "KILLED"), ("running", "KILLED")])
def test_other_ends(state: Any, shown: str, store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    store.close_child(folder, Status(state, "loss nan at step 3", 2), [])
    run = client.get_run(child)
    assert run.info.status == shown
    assert run.data.tags["bwlm.state"] == state
    assert run.data.tags["bwlm.reason"] == "loss nan at step 3"


class Cut(BaseException):
    """Stand-in for Ctrl-C, or for the end of the machine."""


# calls of a first launch, and the how manieth; the grid's run is made before the cell's
ENLISTING = [
    ("create_run", 0), ("update_run", 0), ("log_batch", 0), ("log_text", 0), ("create_run", 1),
    ("update_run", 1), ("log_batch", 1), ("log_inputs", 0), ("log_artifact", 0),
]  # fmt: skip


@pytest.mark.parametrize(("call", "at"), ENLISTING)
@pytest.mark.parametrize("arrives", [False, True])
def test_a_launch_cut_off_while_it_enlists_leaves_no_second_run(
    call: str,
    at: int,
    arrives: bool,
    store: Tracking,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make(tmp_path)
    real = getattr(store._client, call)
    made = iter(range(9))

    def cut(*args: Any, **kwargs: Any) -> Any:
        last = next(made) == at
        answer = real(*args, **kwargs) if arrives or not last else None
        if last:
            raise Cut
        return answer

    monkeypatch.setattr(store._client, call, cut)
    with pytest.raises(Cut):
        enlist(store, folder)
    monkeypatch.undo()
    parent, child = enlist(store, folder)
    [experiment] = [e for e in client.search_experiments() if e.name == EXPERIMENT]
    grids = client.search_runs([experiment.experiment_id], f"tags.`bwlm.storage` = '{tmp_path}'")
    cells = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [run.info.run_id for run in grids] == [parent]
    assert [run.info.run_id for run in cells] == [child]
    run = client.get_run(child)
    assert run.info.status == "SCHEDULED"
    assert run.data.params["lr"] == "0.5"
    assert len(run.inputs.dataset_inputs) == 1
    assert [item.path for item in client.list_artifacts(child)] == ["config.json"]
    assert [item.path for item in client.list_artifacts(parent)] == ["grid.yaml"]


def test_a_storage_that_was_emptied_gets_new_runs(store: Tracking, tmp_path: Path) -> None:
    """Its cells may have other parameters, and their metrics begin anew."""
    folder = make(tmp_path)
    first = enlist(store, folder)
    shutil.rmtree(folder.path)
    shutil.rmtree(grid_folder(tmp_path))
    assert not set(enlist(store, make(tmp_path))) & set(first)


def test_a_second_launch_asks_once_for_each_cell(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)
    get_run, calls = store._client.get_run, []

    class Counting:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            calls.append(name)
            return get_run

    monkeypatch.setattr(store, "_client", Counting())
    assert store.child_run(folder, parent, DATASET) == child
    assert calls == ["get_run"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_store_that_is_away_at_the_beginning_is_the_users_to_start(
    begun: bool, store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    parent = enlist(store, folder)[0] if begun else "none"
    monkeypatch.setattr(store, "_client", lost_client())
    monkeypatch.setattr(store, "uri", "http://me:secret@there:5000")
    expected = "tracking: http://me:***@there:5000 does not answer (connection reset): start it, or unset MLFLOW_"
    for action in (
        lambda: open_grid(store, tmp_path),
        lambda: store.child_run(folder, parent, DATASET),
    ):
        with pytest.raises(UserError) as caught:
            action()
        assert str(caught.value).startswith(expected)


# ---- figures that are not finite ----


def test_a_diverged_run_is_found_by_its_tag_and_keeps_its_last_figures(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    with (folder.path / "metrics.jsonl").open("a") as file:  # as no version of ours writes it
        file.write('{"step": 4, "time": 1, "metrics": {"tokens": 400, "loss": NaN, "grad_norm": Infinity}}\n')
    diverged = Status("failed", "loss nan at step 5", 4, {"loss": 1 / 3}, 5)
    assert store.close_child(folder, diverged, [])
    [experiment] = [e for e in client.search_experiments() if e.name == EXPERIMENT]
    [found] = client.search_runs(
        [experiment.experiment_id], f"tags.`bwlm.diverged` = 'step 5' and tags.`bwlm.experiment_id` = '{folder.id}' "
        f"and attributes.run_id = '{child}'"
    )  # fmt: skip
    assert found.data.metrics == {"loss": 1 / 3, "train/tokens": 400}
    assert delivered(client, child) == expected(3)
    Journal(folder.path, 3).close()  # it is tried again at a lower rate of another version, and goes well
    log_steps(folder, 4, 6, resume=3)
    store.deliver(folder)
    assert "bwlm.diverged" not in client.get_run(child).data.tags
    assert store.close_child(folder, Status("finished", "", 6, {"loss": 1 / 6}), [])
    assert client.get_run(child).data.metrics["final/loss"] == 1 / 6
    assert "bwlm.reason" not in client.get_run(child).data.tags, "an earlier end's"
    assert "bwlm.diverged" not in client.get_run(child).data.tags


# ---- interruption ----


def test_a_run_waits_until_its_first_metrics(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    assert store.deliver(folder) == 0
    assert client.get_run(child).info.status == "SCHEDULED"
    log_steps(folder, 1, 1)
    store.deliver(folder)
    assert client.get_run(child).info.status == "RUNNING"


def test_an_interrupted_grid_does_not_look_as_if_it_ran(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    waiting, begun, closed, ended = (make(tmp_path, name) for name in ("waiting", "begun", "closed", "ended"))
    runs = {folder.id: enlist(store, folder)[1] for folder in (waiting, begun, closed, ended)}
    parent, _ = enlist(store, waiting)
    for folder in (begun, closed, ended):
        log_steps(folder, 1, 2)
        store.deliver(folder)
    store.close_child(closed, Status("failed", "loss nan", 2), [])
    ended.write_status(Status("finished", "", 2))  # but the launch was cut off before it closed the run
    store.interrupted([waiting, begun, closed, ended], parent)
    shown = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert shown == {"waiting": "SCHEDULED", "begun": "KILLED", "closed": "FAILED", "ended": "FINISHED"}
    assert client.get_run(parent).info.status == "KILLED"
    log_steps(begun, 3, 3)
    enlist(store, begun)
    store.deliver(begun)
    assert {client.get_run(run).info.status for run in (parent, runs["begun"])} == {"RUNNING"}


def test_an_interruption_never_raises(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path)
    parent, _ = enlist(store, folder)
    (folder.path / "mlflow.json").write_text("{")
    store.interrupted([folder], parent)
    assert "not valid JSON" in caplog.text
    monkeypatch.setattr(store, "_client", lost_client())
    store.interrupted([folder], parent)
    assert "does not answer (connection reset)" in caplog.text
