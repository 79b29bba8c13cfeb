"""MLflow: every metric delivered exactly once, whatever breaks off."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bwlm.paths import read_json, write_json
from bwlm.record import journal
from bwlm.record.experiment import Status
from bwlm.record.tracking import Tracking
from tests.record.mlflow_runs import (
    DATASET,
    RESULT,
    delivered,
    enlist,
    expected,
    grid_folder,
    log_steps,
    lost_client,
    lost_on_the_way_back,
    lost_on_the_way_in,
    make,
    open_grid,
)

# ---- delivery ----


def test_metrics_arrive_once_by_step(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    assert store.deliver(folder) == 0
    log_steps(folder, 1, 3)
    assert store.deliver(folder) == 6
    assert store.deliver(folder) == 0
    log_steps(folder, 4, 5)
    assert Tracking(store.uri, tmp_path).deliver(folder) == 4
    assert delivered(client, child) == expected(5)
    assert delivered(client, child, "train/tokens")[-1] == (5, 500)


def test_a_run_whose_files_stay_is_looked_at_and_not_read_again(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch asks every ten seconds, of a thousand cells of which most have ended."""
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    assert store.deliver(folder) == 6
    read: list[Path] = []
    before = journal.entries_after
    monkeypatch.setattr(
        "bwlm.record.tracking.entries_after", lambda path, step: (read.append(path), before(path, step))[1]
    )
    for _ in range(3):
        assert store.deliver(folder) == 0
    assert read == []
    log_steps(folder, 4, 4)
    assert store.deliver(folder) == 2
    assert len(read) == 1
    (folder.path / "evaluations" / "base" / "forward").mkdir(parents=True)  # a result will lie there
    assert store.deliver(folder) == 0
    assert len(read) == 2
    assert delivered(client, child) == expected(4)


def test_the_store_is_asked_only_where_an_answer_was_lost(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history of a long run is long."""
    folder = make(tmp_path)
    enlist(store, folder)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(store._client, "get_metric_history", refuse)
    for step in (1, 2, 3):
        log_steps(folder, step, step)
        assert store.deliver(folder) == 2


def test_more_than_one_call_takes(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 1203)
    assert store.deliver(folder) == 2406
    assert delivered(client, child) == expected(1203)


def test_steps_that_are_trained_again_are_not_sent_again(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 6)
    store.deliver(folder)
    log_steps(folder, 4, 5, resume=3)  # killed, taken up at 3; 4 and 5 have new time stamps
    assert store.deliver(folder) == 0
    log_steps(folder, 6, 8)
    store.deliver(folder)
    assert delivered(client, child) == expected(8)


@pytest.mark.parametrize("has_run", [True, False])
def test_another_machine_goes_on_where_the_store_is(
    has_run: bool, store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    """The first machine died with its notes: what others have of them is older than what it delivered."""
    folder = make(tmp_path / "one")
    grid = Tracking(store.uri, tmp_path)
    parent = open_grid(grid, tmp_path)
    grid.expect(folder, parent, DATASET)
    log_steps(folder, 1, 3)
    assert grid.deliver(folder)
    notes = read_json(folder.path / "mlflow.json")
    log_steps(folder, 4, 11)
    assert grid.deliver(folder)
    client.log_metric(notes["run_id"], "theirs", 1.0, step=1000)
    there = make(tmp_path / "another")
    write_json(there.path / "mlflow.json", notes if has_run else {"run_id": None, "mark": notes["mark"]})
    log_steps(there, 1, 8)  # the checkpoint from which it resumes
    time.sleep(0.002)
    log_steps(there, 9, 12)
    again = Tracking(store.uri, tmp_path)
    again.expect(there, parent, DATASET)
    assert again.deliver(there) == 2
    assert read_json(there.path / "mlflow.json")["run_id"] == notes["run_id"]
    assert delivered(client, notes["run_id"]) == expected(12)


Break = Callable[[Callable[..., None]], Callable[..., None]]


@pytest.mark.parametrize("broken", [lost_on_the_way_in, lost_on_the_way_back])
@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_call_that_fails_is_made_up_for_once(
    broken: Break,
    calls_before: int,
    store: Tracking,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Even where the run is killed before the next call, and trains the same steps at another time."""
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 600)  # two calls
    log_batch, calls = store._client.log_batch, iter(range(9))

    def flaky(*args: Any, **kwargs: Any) -> None:
        (log_batch if next(calls) < calls_before else broken(log_batch))(*args, **kwargs)

    monkeypatch.setattr(store._client, "log_batch", flaky)
    with caplog.at_level(logging.WARNING):
        assert not store.try_deliver(folder)
    assert "does not answer (connection reset)" in caplog.text
    monkeypatch.undo()
    time.sleep(0.002)
    log_steps(folder, 101, 610, resume=100)
    assert store.try_deliver(folder)
    assert delivered(client, child) == expected(610)


def test_a_launcher_killed_before_it_could_note_the_answer(
    store: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    before = folder.path / "before.json"

    class Killed(BaseException):
        pass

    log_batch = store._client.log_batch

    def answer_and_die(*args: Any, **kwargs: Any) -> None:
        log_batch(*args, **kwargs)
        shutil.copy(folder.path / "mlflow.json", before)
        raise Killed

    store._client.log_batch = answer_and_die
    with pytest.raises(Killed):
        store.deliver(folder)
    store._client.log_batch = log_batch
    log_steps(folder, 2, 5, resume=1)
    store.deliver(folder)
    assert delivered(client, child) == expected(5)


def test_an_end_while_the_server_is_away_is_a_warning(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report must be written all the same; the next launch brings MLflow up to date."""
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 2)
    monkeypatch.setattr(store, "_client", lost_client())
    status = Status("finished", "", 2, {"val_bpb": 1.5})
    assert not store.close_child(folder, status, [])
    assert not store.close_parent(grid_folder(tmp_path), [], True, RESULT)
    assert Tracking(store.uri, tmp_path).close_child(folder, status, [])
    assert delivered(client, child) == expected(2)
    assert client.get_run(child).info.status == "FINISHED"


def test_an_end_is_tried_once_while_the_server_is_away(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt waits for seconds; a hundred cells would wait for minutes, and fill the screen."""
    folders = [make(tmp_path, f"cell_{number}") for number in range(3)]
    for folder in folders:
        enlist(store, folder)
    client, calls = lost_client(), []
    monkeypatch.setattr(store, "_client", client)
    monkeypatch.setattr(store, "deliver", lambda folder: calls.append(folder) or client.log_batch())
    for folder in folders:
        assert not store.close_child(folder, Status("finished", "", 2), [])
    assert not store.close_parent(grid_folder(tmp_path), [], True, RESULT)
    assert calls == folders[:1]
    [record] = caplog.records
    assert "does not answer (connection reset)" in record.message
    assert f"the metrics wait in {tmp_path}, and the same command delivers them" in record.message


def test_an_end_that_was_delivered_is_not_delivered_again(
    store: Tracking, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    log_steps(folder, 1, 2)
    status = Status("stopped", "interrupted", 2, {"val_bpb": 1.5})
    assert store.close_child(folder, status, [])
    again = Tracking(store.uri, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(again, "_client", lost_client())
        assert again.close_child(folder, status, [])
    log_steps(folder, 3, 4)  # taken up
    assert again.deliver(folder) == 4
    assert client.get_run(child).info.status == "RUNNING"
    assert again.close_child(folder, Status("finished", "", 4, {"val_bpb": 1.4}), [])
    assert client.get_run(child).info.status == "FINISHED"
