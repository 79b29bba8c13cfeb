"""MLflow stores: where they lie, odd states, a real server that goes away and comes back."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bwlm.errors import UserError
from bwlm.grid.launch import _check_tracking
from bwlm.paths import read_json
from bwlm.record.experiment import Status
from bwlm.record.mlflow_store import tracking_uri, ui_command
from bwlm.record.tracking import EXPERIMENT, Tracking
from tests.mlflow_server import free_port, server
from tests.record.mlflow_runs import (
    DATASET,
    delivered,
    enlist,
    expected,
    log_steps,
    make,
    open_grid,
)

# ---- odd states ----


def test_a_deleted_run_is_told_with_the_command_that_restores_it(
    store: Tracking, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path)
    _, child = enlist(store, folder)
    client.delete_run(child)
    enlist(store, folder)
    [told] = caplog.messages
    assert told.startswith(f"tracking: the run of {folder.path} is deleted: a new one takes its place; the old one: ")
    restore = shlex.split(told.partition("the old one: ")[2])
    assert restore == [f"MLFLOW_TRACKING_URI={store.uri}", "mlflow", "runs", "restore", "--run-id", child]


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(tmp_path: Path) -> None:
    uri = Tracking(tracking_uri(tmp_path, None), tmp_path).uri
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError) as caught:
        Tracking(uri, tmp_path)
    said, _, command = str(caught.value).partition("is deleted: run: ")
    assert said == f"tracking: the experiment bwlm of {uri} "
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, env=environment, check=True, capture_output=True)
    assert Tracking(uri, tmp_path)._experiment == experiment.experiment_id


def test_a_store_that_was_set_back_gets_the_rest_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sets the store back, as a restored backup does."""
    storage = tmp_path / "runs"
    store = Tracking(tracking_uri(storage, None), storage)
    folder, database = make(storage), storage / "mlflow.db"
    parent, child = enlist(store, folder)
    log_steps(folder, 1, 3)
    store.deliver(folder)
    backup = database.read_bytes()
    log_steps(folder, 4, 7)
    status = Status("finished", "", 7, {"val_bpb": 1.5})
    assert store.close_child(folder, status, [])
    store._client._tracking_client.store.engine.dispose()
    database.write_bytes(backup)
    again = Tracking(store.uri, storage)
    assert enlist(again, folder) == (parent, child)
    assert f"was set back to step 3 of {folder.path}: the rest is delivered again" in caplog.text
    assert again.close_child(folder, status, [])
    client = MlflowClient(store.uri)
    assert delivered(client, child) == expected(7)
    assert client.get_run(child).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (401, "wants a user and a password (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "forbids this (403): ask for the right to write, or set MLFLOW_TRACKING_USERNAME to a user that has it"),
    ],
)
def test_a_server_that_refuses_is_told_with_its_mend(code: int, mend: str, tmp_path: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{web.server_port}"
        with pytest.raises(UserError) as caught:
            Tracking(uri, tmp_path)
        assert str(caught.value) == f"tracking: {uri} {mend}"
        web.shutdown()


@pytest.mark.faults
def test_a_server_that_refuses_the_host_name_is_told_with_the_option_that_allows_it(tmp_path: Path) -> None:
    """MLflow's own answer to a name that is not among `--allowed-hosts`; its /health says that all is well."""
    port = free_port()
    with server(tmp_path, port, "--allowed-hosts", "tracking.example") as uri:
        with urllib.request.urlopen(f"{uri}/health", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(UserError) as caught:
            Tracking(uri, tmp_path)
        with pytest.raises(UserError):
            _check_tracking(uri, tmp_path)
    mend = f"start it with: mlflow server --allowed-hosts 127.0.0.1:{port}"
    assert str(caught.value) == f"tracking: {uri} refuses this host name (403): {mend}"
    with server(tmp_path, port, "--allowed-hosts", f"127.0.0.1:{port}") as uri:
        Tracking(uri, tmp_path)


# ---- where ----


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(Path("/runs"), None) == "sqlite:////runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking_uri(Path("/runs"), None) == "http://there"
    assert tracking_uri(Path("/runs"), "http://chosen") == "http://chosen"


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a b", "a#b", "é"])
def test_a_database_lies_in_its_storage_whatever_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / name
    folder = make(storage)
    store = Tracking(tracking_uri(storage, None), storage)
    _, child = enlist(store, folder)
    assert (storage / "mlflow.db").is_file()
    assert (storage / "mlartifacts" / child / "artifacts" / "config.json").is_file()


def test_the_command_that_shows_the_runs_can_be_pasted() -> None:
    assert ui_command("http://there:5000", Path("/venv/bin")) == "http://there:5000"
    assert ui_command("sqlite:////runs/mlflow.db", Path("/venv/bin")) == (
        "/venv/bin/mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"
    )
    assert "'sqlite:////my runs/mlflow.db'" in ui_command("sqlite:////my runs/mlflow.db", Path("/venv/bin"))


def test_artifacts_of_a_database_lie_beside_it(store: Tracking, tmp_path: Path) -> None:
    enlist(store, make(tmp_path))
    root = Path(store.uri.removeprefix("sqlite:///")).parent
    assert {path.name for path in root.iterdir()} == {"mlflow.db", ".mlflow.db.lock", "mlartifacts"}


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/absent/mlflow.db", "nonsense://x", "postgresql://me:secret@127.0.0.1:1/db", "some/folder"]
)
def test_a_store_that_cannot_be_reached_is_told_in_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking: .* does not answer \(.{,120}\): \w+") as caught:
        Tracking(uri, tmp_path)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told_in_a_clause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(UserError) as caught:
        Tracking("http://me:secret@127.0.0.1:1", tmp_path)
    assert str(caught.value) == (
        "tracking: http://me:***@127.0.0.1:1 does not answer (Connection refused): "
        "start it, or unset MLFLOW_TRACKING_URI"
    )
    assert not caplog.records


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "API request to http://me:secret@there failed with exception HTTPConnectionPool(host='there', port=80): "
            "Max retries exceeded with url: /api (Caused by ConnectTimeoutError(<HTTPConnection(host='there')>, "
            "'Connection to there timed out. (connect timeout=10)'))",
            "timed out",
        ),
        (
            "HTTPConnectionPool(host='there', port=80): Max retries exceeded with url: /api "
            "(Caused by ResponseError('too many 503 error responses'))",
            "too many 503 error responses",
        ),
        ("HTTPConnectionPool(host='there', port=80): Max retries exceeded with url: /api", "no connection"),
        ("API request to http://me:secret@there failed. Sorry", "API request to http://me:***@there failed"),
    ],
)
def test_the_reason_is_a_clause(
    said: str, reason: str, store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MlflowException(said)

    monkeypatch.setattr(store._client, "create_run", fail)
    with pytest.raises(UserError) as caught:
        open_grid(store, tmp_path)
    assert f"does not answer ({reason})" in str(caught.value)


# ---- a real server ----


def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    port, folder = free_port(), make(tmp_path / "runs")
    with server(tmp_path, port) as uri:
        tracking = Tracking(uri, tmp_path / "runs")
        parent, child = enlist(tracking, folder)
        log_steps(folder, 1, 3)
        assert tracking.deliver(folder) == 6
    log_steps(folder, 4, 6)
    assert not tracking.try_deliver(folder)
    with pytest.raises(UserError, match="does not answer") as caught:
        Tracking(uri, tmp_path / "runs")
    assert "\n" not in str(caught.value)
    log_steps(folder, 5, 7, resume=4)  # and the run itself was killed and taken up meanwhile
    with server(tmp_path, port) as uri:
        assert tracking.try_deliver(folder)
        assert tracking.deliver(folder) == 0
        client = MlflowClient(uri)
        assert delivered(client, child) == expected(7)
        again = Tracking(uri, tmp_path / "runs")
        assert enlist(again, folder) == (parent, child)
        assert again.close_child(folder, Status("finished", "", 7, {"val_bpb": 1.5}), [folder.path / "config.json"])
        run = client.get_run(child)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.params["lr"] == "0.5"
        assert run.inputs.dataset_inputs[0].dataset.digest == DATASET["digest"][:36]
        assert [item.path for item in client.list_artifacts(child)] == ["config.json"]
        everything = client.search_runs([run.info.experiment_id])
        assert sorted(r.info.run_id for r in everything) == sorted((parent, child))
    assert read_json(folder.path / "mlflow.json")["delivered_step"] == 7


# ---- a storage that is moved ----


def test_artifacts_of_a_moved_storage_are_found_and_new_ones_lie_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy leaves those of its original alone."""
    caplog.set_level("INFO", logger="bwlm.record.mlflow_store")
    old, new = tmp_path / "old, 100% #1", tmp_path / "new"
    before = Tracking(tracking_uri(old, None), old)
    parent, child = enlist(before, make(old))
    shutil.copytree(old, new)
    shutil.rmtree(old / "mlartifacts")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())
    store = Tracking(tracking_uri(new, None), new)
    assert "the storage was moved" in caplog.text
    client = MlflowClient(store.uri)
    assert [file.path for file in client.list_artifacts(parent)] == ["grid.yaml"]
    assert [file.path for file in client.list_artifacts(child)] == ["config.json"]
    folder = make(new, "g_forward_d2_lr0.5_s3")
    assert (new / "mlartifacts" / store.child_run(folder, parent, DATASET) / "artifacts" / "config.json").exists()
    assert not (old / "mlartifacts").exists()
    caplog.clear()
    Tracking(tracking_uri(new, None), new)
    assert caplog.text == ""
    Tracking(tracking_uri(old, None), new)  # another storage's database, that was chosen
    assert MlflowClient(tracking_uri(old, None)).get_run(parent).info.artifact_uri.startswith(old.as_uri())
