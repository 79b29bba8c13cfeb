"""The experiment folder: what a run says of itself, and who may write to it, also after kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bwlm.config import Experiment
from bwlm.errors import Interrupted, UserError
from bwlm.model.compute import Compute
from bwlm.paths import Check, read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status, list_experiments, open_experiment
from bwlm.record.fingerprint import fingerprint
from bwlm.record.health import sealed
from bwlm.record.journal import Journal
from bwlm.record.lease import LeaseLost
from bwlm.record.run_config import RunConfig
from tests.families import rewrite_config


def config_of(name: str) -> RunConfig:
    return RunConfig(
        id=name,
        experiment=Experiment(direction="backward", depth=2, lr=0.5, seed=3),
        identity={"direction": "backward", "lr": 0.5, "kv_heads": None, "masked": False},
        steps=10,
        compute=Compute("float32", "sdpa", 0, False, 8, 1, {"compile": "off, as set"}),
        corpus="/corpus",
        tokenizer="/tokenizer",
        grid="g",
    )


def make(storage: Path, name: str = "run") -> ExperimentFolder:
    folder = ExperimentFolder(storage, name)
    folder.create(config_of(name))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> ExperimentFolder:
    return make(tmp_path)


def log_step(folder: ExperimentFolder, step: int) -> None:
    journal = Journal(folder.path, step - 1)
    journal.append(step, {"loss": 2.0 / step})
    journal.close()


# ---- what it says of itself ----


def test_what_is_written_is_read_back(folder: ExperimentFolder) -> None:
    assert folder.exists()
    assert folder.config() == config_of("run")
    assert folder.parent() is None
    content = read_json(folder.path / "config.json")
    assert content["fingerprint"] == fingerprint(config_of("run").identity) == folder.config().fingerprint
    assert {"bwlm", "torch", "ray", "python"} <= content["versions"].keys()
    assert read_json(folder.path / "parent_link.json") == {
        "parent": None,
        "checkpoint": None,
        "phase": None,
        "step": None,
        "sha256": None,
        "chain": [],
        "best": False,
    }


def test_paths_below_the_storage_are_told_from_it_and_follow_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    folder = ExperimentFolder(old, "run")
    folder.create(
        replace(config_of("run"), corpus=str(old / "cache/packed/c"), tokenizer=str(old / "cache/tokenizers/t"))
    )
    content = read_json(folder.path / "config.json")
    assert (content["corpus"], content["tokenizer"]) == ("cache/packed/c", "cache/tokenizers/t")
    old.rename(new)
    moved = ExperimentFolder(new, "run").config()
    assert (moved.corpus, moved.tokenizer) == (str(new / "cache/packed/c"), str(new / "cache/tokenizers/t"))


def test_an_absolute_path_of_an_earlier_version_is_looked_for_in_the_storage_first(tmp_path: Path) -> None:
    """A copy of a storage must not read the other's files; what lies elsewhere stays where it is."""
    folder = make(tmp_path / "new")
    (tmp_path / "new/cache/packed/c").mkdir(parents=True)
    told = {"corpus": str(tmp_path / "old/cache/packed/c"), "tokenizer": str(tmp_path / "old/cache/tokenizers/t")}
    rewrite_config(folder, **told)
    assert folder.config().corpus == str(tmp_path / "new/cache/packed/c")
    assert folder.config().tokenizer == told["tokenizer"], "none of this storage has its name"


def test_a_run_keeps_its_tokenizer_and_reads_its_own(tmp_path: Path) -> None:
    given, folder = tmp_path / "given", ExperimentFolder(tmp_path / "runs", "run")
    given.mkdir()
    (given / "tokenizer.json").write_text("one")
    own = folder.path / "tokenizer"
    own.mkdir(parents=True)
    (own / "tokenizer.json").write_text("of a launch that was cut off")
    folder.keep_tokenizer(given)
    folder.create(replace(config_of("run"), tokenizer=str(given)))
    assert read_json(folder.path / "config.json")["tokenizer"] == "run/tokenizer"
    assert folder.config().tokenizer == str(own)
    assert (own / "tokenizer.json").read_text() == "one"
    (given / "tokenizer.json").write_text("another")
    folder.keep_tokenizer(given)
    assert (own / "tokenizer.json").read_text() == "one"
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []


def test_an_experiment_exists_from_its_last_file_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bwlm.record.config_file
    import bwlm.record.experiment
    import bwlm.record.lineage

    written: list[str] = []

    def note(path: Path, content: dict[str, object], *check: Check) -> None:
        written.append(path.name)
        write_json(path, content, *check)

    for module in (bwlm.record.lineage, bwlm.record.experiment, bwlm.record.config_file):
        monkeypatch.setattr(module, "write_json", note)
    make(tmp_path)
    assert written[-1] == "config.json"
    assert set(written) == {"parent_link.json", "status.json", "config.json"}


@pytest.mark.parametrize("content", ['{"stat": "finished"}', "[]"])
def test_a_foreign_status_is_told_and_can_be_mended(content: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder.path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status.json: .*(not the status of a run: write \{\} into it|object)"):
        folder.status()
    (folder.path / "status.json").write_text("{}")
    assert folder.status().state == "waiting"


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", "cache", "a" * 129])
def test_an_unsafe_id_never_becomes_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="experiment id"):
        ExperimentFolder(tmp_path, name)
    with pytest.raises(UserError, match="experiment id"):
        open_experiment(tmp_path, name)


def test_listing_and_opening(tmp_path: Path) -> None:
    assert list_experiments(tmp_path / "absent") == []
    for name in ("b", "a_forward", "c"):
        make(tmp_path, name)
    assert [folder.id for folder in list_experiments(tmp_path)] == ["a_forward", "b", "c"]
    assert open_experiment(tmp_path, "b").config().id == "b"
    with pytest.raises(UserError, match=r"a_forwrd: no such experiment in .* \(did you mean 'a_forward'\?\)"):
        open_experiment(tmp_path, "a_forwrd")


def test_folders_of_others_do_not_disturb_a_listing(tmp_path: Path) -> None:
    """A model exported for transformers has a config.json too."""
    make(tmp_path, "mine")
    for name in ("exported", "my model (copy)", ".hidden", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "nanochat"}')
    shutil.copytree(tmp_path / "mine", tmp_path / "mine (copy)")
    assert [folder.id for folder in list_experiments(tmp_path)] == ["mine"]


@pytest.mark.parametrize("content", ['{"id": "run"}', "[]", '{"id": '])
def test_a_config_that_is_none_is_told_with_its_file(content: str, folder: ExperimentFolder) -> None:
    (folder.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"run/config\.json: not") as caught:
        folder.config()
    assert "\n" not in str(caught.value)


def test_a_config_of_another_version_is_told_with_its_field(folder: ExperimentFolder) -> None:
    content = read_json(folder.path / "config.json")
    content["experiment"]["model"]["gone"] = 1
    write_json(folder.path / "config.json", sealed(content))
    with pytest.raises(UserError, match=r"config\.json: experiment: not a setting .*\(model\.gone\): use the version"):
        folder.config()


def test_a_run_of_before_documents_were_shuffled_keeps_their_order(folder: ExperimentFolder) -> None:
    assert folder.config().experiment.data.shuffle
    content = read_json(folder.path / "config.json")["experiment"]
    del content["data"]["shuffle"]
    rewrite_config(folder, experiment=content)
    assert not folder.config().experiment.data.shuffle


def test_a_run_of_before_conversations_could_be_left_out_has_them_all(folder: ExperimentFolder) -> None:
    content = read_json(folder.path / "config.json")["experiment"]
    del content["data"]["skip_invalid"]
    rewrite_config(folder, experiment=content)
    assert folder.config().experiment.data.skip_invalid is False


# ---- states ----


def test_states_follow_what_happened(folder: ExperimentFolder) -> None:
    assert folder.status() == Status("waiting")
    with folder.lease():
        assert folder.status() == Status("running")
        log_step(folder, 1)
        assert folder.status() == Status("running", "", 1, {"loss": 2.0})
        log_step(folder, 2)
        assert folder.status().step == 2
    assert folder.status() == Status("stopped", "", 2, {"loss": 1.0})  # cut off: it will be taken up
    with folder.lease():
        assert folder.status().state == "running"
        folder.write_status(Status("finished", "", 10, {"val_bpb": 1.5}))
    assert folder.status() == Status("finished", "", 10, {"val_bpb": 1.5})


@pytest.mark.parametrize("ended", [Status("failed", "loss nan at step 3", 2), Status("stopped", "by the scheduler", 4)])
def test_an_end_with_a_reason_stays(ended: Status, folder: ExperimentFolder) -> None:
    log_step(folder, 5)
    folder.write_status(ended)
    assert folder.status() == ended


def test_a_run_that_is_tried_again_is_running(folder: ExperimentFolder) -> None:
    """A script that waits for `running` must see a failed cell that a relaunch trains."""
    log_step(folder, 5)
    folder.write_status(Status("failed", "out of memory", 5))
    with folder.lease():
        assert folder.status() == Status("running", "", 5, {"loss": 0.4})
    assert folder.status() == Status("stopped", "", 5, {"loss": 0.4})


def test_a_run_that_the_scheduler_ended_is_ended_before_its_process_is(folder: ExperimentFolder) -> None:
    ended = Status("stopped", "by the scheduler at step 4", 4)
    with folder.lease():
        folder.write_status(ended)
        assert folder.status() == ended


def test_a_finished_run_is_finished_whoever_looks_at_it(folder: ExperimentFolder) -> None:
    folder.write_status(Status("finished", "", 10, {}))
    with folder.lease():
        assert folder.status().state == "finished"


# ---- the lease ----

_HOLDER = """
import sys, time
from pathlib import Path
from bwlm.record.experiment import ExperimentFolder
folder = ExperimentFolder(Path(sys.argv[1]), "run")
with folder.lease(wait=0.02):
    print("held", time.time_ns(), flush=True)
    time.sleep(float(sys.argv[2]))
    print("leaving", time.time_ns(), flush=True)
"""


@contextmanager
def holder(folder: ExperimentFolder, seconds: float = 60) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lease, killed at the end of the block."""
    command = [sys.executable, "-c", _HOLDER, str(folder.path.parent), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def read_mark(process: subprocess.Popen[bytes], word: str) -> int:
    assert process.stdout is not None
    found, stamp = process.stdout.readline().decode().split()
    assert found == word
    return int(stamp)


def test_nobody_holds_a_lease_at_first(folder: ExperimentFolder) -> None:
    assert folder.lease_holder() is None
    with folder.lease():
        assert folder.lease_holder() == f"{socket.gethostname()}:{os.getpid()}"
    assert folder.lease_holder() is None


def test_a_lease_is_exclusive_between_processes_and_goes_to_a_waiter(folder: ExperimentFolder) -> None:
    with holder(folder, seconds=0.5) as first, holder(folder, seconds=0.1) as second:
        holds = {}
        for process in (first, second):
            holds[process] = (read_mark(process, "held"), read_mark(process, "leaving"))
        (_, early_end), (late_start, _) = sorted(holds.values())
        assert early_end <= late_start


def test_kill_9_frees_the_lease_for_a_waiter(folder: ExperimentFolder) -> None:
    got = threading.Event()

    def wait() -> None:
        with folder.lease(wait=0.02):
            got.set()

    for _ in range(3):
        got.clear()
        with holder(folder) as process:
            read_mark(process, "held")
            assert folder.lease_holder() == f"{socket.gethostname()}:{process.pid}"
            assert folder.status().state == "running"
            waiter = threading.Thread(target=wait, daemon=True)
            waiter.start()
            assert not got.wait(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert got.wait(5)
            waiter.join()
        assert folder.lease_holder() is None


def test_a_holder_that_failed_gives_the_lease_back(folder: ExperimentFolder) -> None:
    with pytest.raises(RuntimeError), folder.lease():
        raise RuntimeError
    assert folder.lease_holder() is None


def test_asking_for_the_holder_does_not_take_the_lease_from_a_waiter(folder: ExperimentFolder) -> None:
    """`runs list` asks all the time; the lease must still be had."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            folder.lease_holder()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    for _ in range(20):
        looks = iter(range(100))  # it gives up, with an error, when it has looked so often and found it held
        with folder.lease(wait=0.01, give_up=lambda looks=looks: next(looks, None) is None):  # type: ignore[misc]
            pass
    stop.set()
    asking.join()


def test_who_lost_the_lease_writes_no_status_any_more(folder: ExperimentFolder) -> None:
    own, nobody = Status("failed", "its own", 3), ExperimentFolder(folder.path.parent, folder.id)
    with folder.lease():
        folder.write_status(own)
        assert not folder.lost_lease
        (folder.path / "lease.json").write_text('{"host": "elsewhere", "pid": 7, "since": 1.7e9}')
        with pytest.raises(LeaseLost, match=r"^run: elsewhere:7 writes to it since "):
            folder.write_status(Status())
        assert folder.lost_lease
        assert nobody.status() == own
    nobody.write_status(Status())  # who never held it has nothing to lose


def test_who_takes_the_lease_deletes_what_the_holder_before_left_half_written(folder: ExperimentFolder) -> None:
    mine = [".status.json.0123abcd.tmp", ".base.h5.0123abcd.tmp", "evaluations/base/forward/.x.json.0123abcd.tmp"]
    others = [".RESEARCH_REPORT.md.0123abcd.tmp", ".mlflow.json.0123abcd.tmp"]  # of launches, which hold no lease
    for name in (*mine, *others, "checkpoints/.step_000004.0123abcd.tmp/meta.json"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).touch()
    with folder.lease():
        assert sorted(path.name for path in folder.path.rglob("*.tmp")) == others


def test_a_lease_says_since_when(folder: ExperimentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bwlm.record.lease.time.time", lambda: 1_700_000_000.0)
    with folder.lease():
        content = json.loads((folder.path / "lease.json").read_text())
    assert content["pid"] == os.getpid()
    assert content["since"] == 1_700_000_000.0


def test_who_waits_for_a_lease_may_give_up(folder: ExperimentFolder) -> None:
    with holder(folder) as process:
        read_mark(process, "held")
        folder.wait_until_free(give_up=lambda: True)
        with pytest.raises(Interrupted, match=f"while .*:{process.pid} trained"), folder.lease(give_up=lambda: True):
            pytest.fail("two hold it")
