"""MLflow: nested runs, made once, and every metric delivered exactly once, on SQLite and on a real server."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source
from mlflow.exceptions import MlflowException

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.grid.launch import _check_tracking
from bwlm.model.compute import Compute
from bwlm.paths import read_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import Journal
from bwlm.record.run_config import RunConfig
from bwlm.record.tracking import EXPERIMENT, Tracking, tracking_uri, ui_command
from tests.mlflow_server import free_port, server

COMPUTE = Compute("float32", "sdpa", 0, False, 8, 1)

DATASET = {"name": "corpus", "digest": "0123456789abcdef" * 4, "source": "/data/corpus/shard_00000.parquet"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In a folder whose name needs quoting in a URI. Made once, because that takes a second."""
    root = tmp_path_factory.mktemp("a store, 100% #1")
    return Tracking(tracking_uri(root, None), root).uri


@pytest.fixture
def store(database: str, tmp_path: Path) -> Tracking:
    return Tracking(database, tmp_path)


@pytest.fixture
def client(store: Tracking) -> MlflowClient:
    return MlflowClient(store.uri)


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


def enlist(tracking: Tracking, folder: ExperimentFolder) -> tuple[str, str]:
    parent = tracking.parent_run(grid_folder(folder.path.parent), "g", "name: g\n")
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


# ---- runs ----


def test_a_cell_is_a_run_below_its_grids(store: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path)
    parent, child = enlist(store, folder)
    run = client.get_run(child)
    assert run.info.run_name == folder.id
    assert {
        "mlflow.parentRunId": parent,
        "bwlm.experiment_id": folder.id,
        "bwlm.parent_experiment": "",
        "bwlm.fingerprint": folder.config().fingerprint,
        "bwlm.grid": "g",
    }.items() <= run.data.tags.items()
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
    store.close_parent(first[0], [folder.path / "config.json"], complete=False)
    again = Tracking(store.uri, tmp_path)
    assert enlist(again, folder) == first
    assert client.get_run(first[0]).info.status == "RUNNING"
    [experiment] = [e for e in client.search_experiments() if e.name == EXPERIMENT]
    found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{first[0]}'")
    assert [run.info.run_id for run in found] == [first[1]]


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
        assert store.close_parent(parent, [report, tmp_path / "earlier"], complete=True)
    run = client.get_run(child)
    assert run.info.status == "FINISHED"
    assert run.data.tags["bwlm.state"] == "finished"
    assert delivered(client, child) == expected(4)
    assert delivered(client, child, "final_val_bpb") == [(4, 1.5)]
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
    """As Ctrl-C, or the end of the machine."""


# calls of a first launch, and the how manieth; the grid's run is made before the cell's
ENLISTING = [
    ("create_run", 0), ("log_text", 0), ("create_run", 1),
    ("update_run", 0), ("log_batch", 0), ("log_inputs", 0), ("log_artifact", 0),
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
        lambda: store.parent_run(grid_folder(tmp_path), "g", "name: g\n"),
        lambda: store.child_run(folder, parent, DATASET),
    ):
        with pytest.raises(UserError) as caught:
            action()
        assert str(caught.value).startswith(expected)


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
    assert found.data.metrics == {"loss": 1 / 3, "tokens": 400}
    assert delivered(client, child) == expected(3)
    Journal(folder.path, 3).close()  # it is tried again at a lower rate of another version, and goes well
    log_steps(folder, 4, 6, resume=3)
    store.deliver(folder)
    assert "bwlm.diverged" not in client.get_run(child).data.tags
    assert store.close_child(folder, Status("finished", "", 6, {"loss": 1 / 6}), [])
    assert client.get_run(child).data.metrics["final_loss"] == 1 / 6
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
    assert delivered(client, child, "tokens")[-1] == (5, 500)


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


Break = Callable[[Callable[..., None]], Callable[..., None]]


def lost_on_the_way_in(log_batch: Callable[..., None]) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("connection reset")

    return fail


def lost_on_the_way_back(log_batch: Callable[..., None]) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        log_batch(*args, **kwargs)
        raise OSError("connection reset")

    return fail


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
    parent, child = enlist(store, folder)
    log_steps(folder, 1, 2)
    monkeypatch.setattr(store, "_client", lost_client())
    status = Status("finished", "", 2, {"val_bpb": 1.5})
    assert not store.close_child(folder, status, [])
    assert not store.close_parent(parent, [folder.path / "config.json"], complete=True)
    assert Tracking(store.uri, tmp_path).close_child(folder, status, [])
    assert delivered(client, child) == expected(2)
    assert client.get_run(child).info.status == "FINISHED"


def test_an_end_is_tried_once_while_the_server_is_away(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt waits for seconds; a hundred cells would wait for minutes, and fill the screen."""
    folders = [make(tmp_path, f"cell_{number}") for number in range(3)]
    parent, _ = [enlist(store, folder) for folder in folders][-1]
    client, calls = lost_client(), []
    monkeypatch.setattr(store, "_client", client)
    monkeypatch.setattr(store, "deliver", lambda folder: calls.append(folder) or client.log_batch())
    for folder in folders:
        assert not store.close_child(folder, Status("finished", "", 2), [])
    assert not store.close_parent(parent, [], complete=True)
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


def lost_client() -> Any:
    class Lost:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lost_on_the_way_in(lambda: None)

    return Lost()


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
        store.parent_run(grid_folder(tmp_path), "g", "name: g\n")
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
