"""A storage in a bucket looked after from any machine: requests to stop, costs, space, cleaning, deletion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from bwlm.errors import UserError
from bwlm.grid import scheduling
from bwlm.grid.continued import reopen
from bwlm.grid.scheduling import CellStates
from bwlm.grid.summary import summarize
from bwlm.grid.watch import watched
from bwlm.plan.load import load_grid
from bwlm.record import cleaning
from bwlm.record.bucket import push_text
from bwlm.record.checkpoint import KeepPolicy, checkpoint_steps, write_checkpoint
from bwlm.record.cleaning import find_unneeded, remove_all
from bwlm.record.disk import StoredFiles
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.launches import STOP, ask_to_stop, launches_of, living_launches, recorded_launch
from bwlm.storage.claim import Claim, take_at_once
from bwlm.storage.folder import SharedFolder, is_trained
from bwlm.storage.objects import Bucket, BucketAway
from bwlm.storage.opened import board_of, open_storage, push, refresh
from bwlm.text.prepare import Prepared
from bwlm.train.termination import Termination
from tests.families import rewrite_config, untrained_child
from tests.faults.checkpoints import snapshot
from tests.grids import GridFile
from tests.runs import STEPS, make_run
from tests.s3_server import CUT, DENY, PASS, REFUSE, FaultyProxy
from tests.shell import Shell
from tests.storage.conftest import Machine
from tests.storage.launcher import CPU_SECONDS
from tests.storage.pusher import write

pytestmark = pytest.mark.faults
OldEnough = Callable[[], None]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def run(prepared: Prepared, machine: Machine) -> ExperimentFolder:
    """A run that finished on machine one, with checkpoints at steps 4, 8 and 12 and a log; this machine is two then."""
    folder = make_run(prepared, machine("one"), "run")
    for step in (4, 8, STEPS):
        write_checkpoint(folder.checkpoints, snapshot(step), KeepPolicy(3))
    (folder.path / "base.h5").write_bytes(b"a log")
    folder.finish(Status("finished", "", STEPS, {"val_bpb": 2.0}))
    push(folder.path, trained=True)
    return ExperimentFolder(machine("two"), "run")


def keys(address: str) -> list[str]:
    return [one.key for one in Bucket(address).list("")]


# ---- launches ----


def test_a_launch_on_another_machine_is_seen_stopped_and_paid_for(
    address: str, machine: Machine, tmp_path: Path, grid_file: GridFile
) -> None:
    command = [sys.executable, "-m", "tests.storage.launcher", address]
    environment = os.environ | {"BWLM_SCRATCH": str(tmp_path / "one")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    machine("two")
    home = open_storage(address) / "grids" / "g"
    [seen] = living_launches(home)
    assert seen.holder is not None
    assert (seen.name, seen.holder.pid, seen.usage.cpu_seconds) == (name, process.pid, CPU_SECONDS)
    assert [entry.name for entry in ask_to_stop(home, "two:1")] == [name]
    assert process.wait(timeout=60) == 0
    until(lambda: not living_launches(home))
    [ended] = launches_of(open_storage(address) / "grids" / "g")
    assert ended.usage.end == "stopped: two:1"

    plan = load_grid(grid_file(launch={"price": {"cpu_hour": 2.0}, "limit": {"money": 4.0}}), [])
    assert summarize(plan, home.parents[1]).money == 4.0
    with (
        watched(plan, machine("three"), False, lambda _: None) as watch,
        pytest.raises(UserError, match=r"launch\.limit\.money: 4\.00 of 4 are spent by earlier launches"),
        watch.pausing(),
    ):
        pytest.fail("it must not begin")
    machine("two")
    with recorded_launch(home) as later:  # the request is used up
        later.exchange()
        assert later.asked_to_stop() is None
        assert STOP not in SharedFolder(home.parents[1], "grids/g").head().files


def test_a_cell_is_reopened_for_all_machines(run: ExperimentFolder, address: str, machine: Machine) -> None:
    storage = open_storage(address)
    folder = ExperimentFolder(storage, "run")
    folder.write_status(Status("stopped", "by the scheduler at step 12", STEPS))
    push(folder.path, trained=True)
    reopen(folder)
    machine("three")
    there = ExperimentFolder(open_storage(address), "run")
    assert (there.path / "continued.json").exists()
    assert not there.status().ended


def test_the_end_of_a_cell_is_learnt_once_the_bucket_answers(
    prepared: Prepared, address: str, machine: Machine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on another node has finished the cell and ends, while the bucket is away for the launch."""
    monkeypatch.setattr(scheduling, "_LOOK_SECONDS", 0.1)
    folder = make_run(prepared, machine("head"), "run")
    push(folder.path, trained=True)
    there = ExperimentFolder(machine("node"), "run")
    open_storage(address)
    shared_there = SharedFolder(there.path.parent, "run")
    shared_there.begin(1)
    machine("head")
    refresh(folder.path.parent)  # the launch knows of the attempt
    machine("node")
    there.finish(Status("finished", "", STEPS, {"val_bpb": 2.0}))
    shared_there.push(is_trained, 1)
    machine("head")
    heard = cast(Any, Mock())
    states = CellStates(folder.path.parent, heard, Termination(), heard)
    proxy.rule = lambda request: REFUSE
    states.on_trial_complete(1, [], SimpleNamespace(config={"cell": "run"}))
    states.on_step_end(1, [])
    heard.ended.assert_not_called()
    proxy.rule = lambda request: PASS
    states.on_experiment_end([])
    assert [call.args for call in heard.ended.call_args_list] == [("run", there.status())] * 2
    machine("reader")
    assert ExperimentFolder(open_storage(address), "run").status().state == "finished"


def test_a_worker_that_is_killed_for_good_on_another_node_has_failed(
    prepared: Prepared, address: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "_LOOK_SECONDS", 0.1)
    folder = make_run(prepared, machine("head"), "run")
    push(folder.path, trained=True)
    holder = {"host": "node", "pid": 7, "place": "node:x", "seconds": 3.0}
    claim = take_at_once(Bucket(address), "run", "lease", holder)
    assert isinstance(claim, Claim)
    claim._over.set()  # killed: no sign of life follows, and it is never released
    (tmp_path / "error").write_text("killed for memory")
    heard = cast(Any, Mock())
    states = CellStates(folder.path.parent, heard, Termination(), heard)
    states.on_trial_error(1, [], SimpleNamespace(config={"cell": "run"}, error_file=str(tmp_path / "error")))
    states.on_step_end(1, [])
    assert folder.status().state == "running"
    heard.ended.assert_not_called()
    states.on_experiment_end([])
    assert heard.ended.call_args.args == ("run", folder.status())
    machine("reader")
    assert ExperimentFolder(open_storage(address), "run").status().reason == "crashed, see error.txt: killed for memory"


# ---- space ----


def test_usage_counts_the_objects_of_the_bucket(run: ExperimentFolder, address: str, shell: Shell) -> None:
    used = shell.json("storage", "usage", "--storage", address)
    assert used["storage"] == address
    assert used["bytes"] == sum(one.size for one in Bucket(address).list(""))
    assert used["kinds"]["research logs"] == len(b"a log")
    assert used["kinds"]["heads and leases"] > 0
    assert used["grids"] == [{"grid": "", "runs": 1, "bytes": used["bytes"] - used["kinds"]["heads and leases"]}]
    assert not (run.checkpoints / f"step_{STEPS:06d}" / "model.safetensors").exists(), "nothing large is brought for it"


def test_what_is_cleaned_goes_from_the_bucket_and_from_all_machines(
    run: ExperimentFolder, address: str, shell: Shell, machine: Machine
) -> None:
    storage = open_storage(address)
    push(untrained_child(run, "child", "mid", step=8).path, trained=True)
    there = ["--storage", address, "--older", "0h"]
    before = {
        item["path"]: item["bytes"] for item in shell.json("storage", "clean", *there, "--logs", "--dry-run")["items"]
    }
    gone = [f"{address}/run/checkpoints/step_000004", f"{address}/run/checkpoints/step_000008/optimizer.safetensors"]
    assert list(before) == [*gone, f"{address}/run/base.h5"]
    assert all(before.values())
    bytes_before = shell.json("storage", "usage", "--storage", address)["bytes"]
    assert shell("storage", "clean", *there, "--logs", "--yes").out.splitlines()[-1].startswith("removed 3 items, ")
    assert not [key for key in keys(address) if "step_000004" in key or "step_000008/opt" in key]
    assert not [key for key in keys(address) if key.endswith("base.h5")]
    assert shell.json("storage", "usage", "--storage", address)["bytes"] < bytes_before
    assert shell.json("storage", "clean", *there, "--logs", "--dry-run")["items"] == []
    for root in (storage, machine("one"), machine("three")):
        machine(root.parent.name)
        open_storage(address)
        folder = ExperimentFolder(root, "run")
        assert checkpoint_steps(folder.checkpoints) == [8, STEPS]
        assert folder.damage() == []
        assert not (folder.path / "base.h5").exists()


def test_what_another_machine_holds_or_begins_from_is_not_touched(
    run: ExperimentFolder, address: str, machine: Machine
) -> None:
    storage = open_storage(address)
    items = find_unneeded(StoredFiles(storage), 0, logs=False).items
    assert len(items) == 2
    machine("one")
    holder = ExperimentFolder(open_storage(address), "run")
    with holder.lease(trains=False):
        machine("two")
        board_of.cache_clear()  # a command there has seen no leases yet
        found = find_unneeded(StoredFiles(storage), 0, logs=False)
        assert found.items == []
        assert f"run: {run.lease_holder()} trains it" in found.passed_over
        assert [fault for _, fault in remove_all(items)] == [f"{run.lease_holder()} trains run now"] * 2
        machine("one")
    push(untrained_child(holder, "child", "mid", step=4).path, trained=True)
    machine("two")  # which has not heard of the child
    assert [fault for _, fault in remove_all(items)] == ["a run begins from it now", ""]
    assert checkpoint_steps(run.checkpoints) == [4, STEPS]


def test_the_rows_of_a_mixture_stay_while_a_run_was_trained_on_it(
    run: ExperimentFolder, address: str, machine: Machine, mixture_for: Callable[[str], Prepared]
) -> None:
    """Also on a machine to which nothing of the text was brought."""
    name, one = mixture_for("sft").folder.name, machine("one")
    shutil.copytree(mixture_for("sft").folder.parent, one / "cache" / "packed")
    push_text(one / "cache" / "packed" / name)

    def packed(corpus: str) -> set[str]:
        machine("one")
        push(rewrite_config(ExperimentFolder(one, "run"), corpus=corpus).path)
        machine("two")
        items = find_unneeded(StoredFiles(open_storage(address)), 0, logs=False).items
        return {item.path.name for item in items if item.kind == "packed text"}

    assert len(packed("/elsewhere")) == 3
    assert packed(f"cache/packed/{name}") == set()


def test_objects_that_no_head_names_go_once_no_push_can_want_them(
    run: ExperimentFolder, address: str, shell: Shell, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left by a push that was cut off before its head. Objects of other programs and storages stay."""
    storage = open_storage(address)
    write(SharedFolder(storage, "run"), "RESEARCH_REPORT.md", b"#" * 5000)
    proxy.rule = lambda request: CUT if request.method == "PUT" and "/.heads/" in request.path else PASS
    with pytest.raises(BucketAway):
        push(run.path)
    proxy.rule = lambda request: PASS
    (run.path / "RESEARCH_REPORT.md").unlink()
    Bucket(address).write("notes.txt", b"mine")
    below = open_storage(f"{address}/grids")
    write(SharedFolder(below, "other"), "config.json", "{}")
    SharedFolder(below, "other").push()
    (waste,) = [key for key in keys(address) if key.endswith("RESEARCH_REPORT.md")]
    assert shell.json("storage", "usage", "--storage", address)["kinds"]["leftovers"] == 5000
    clean = ["storage", "clean", "--storage", address, "--older", "0h", "--yes"]
    assert [item["kind"] for item in shell.json(*clean)["items"]] == ["checkpoint"] * 2
    assert waste in keys(address), "a push may be about to name it"
    monkeypatch.setattr(cleaning, "_LEAST_PUSH_AGE", 0.0)
    deadline = time.monotonic() + 30  # the server's clock, and so an object's age, is known to a second
    while not (items := shell.json(*clean)["items"]):
        assert time.monotonic() < deadline
    (item,) = items
    assert (item["reason"], item["bytes"], item["run"]) == ("of a push that was cut off", 5000, "run")
    assert waste not in keys(address)
    assert "notes.txt" in keys(address)
    assert [key for key in keys(f"{address}/grids") if key.endswith("config.json")]


# ---- deletion ----


def test_a_deletion_that_is_killed_anywhere_is_finished_by_the_next(address: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.storage.deleter", str(tmp_path), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 8


# ---- checks ----


def test_doctor_checks_the_bucket(
    address: str, shell: Shell, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwlm.plan.doctor.why_not_compile", lambda device: "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = shell("doctor", "--storage", address).out.splitlines()
    (line,) = [line for line in lines if " storage: " in line]
    assert line.startswith(f"ok      storage: {address}: objects are created once, read, replaced only if unchanged, ")
    (line,) = [line for line in lines if " MLflow: " in line]
    assert line.startswith(f"failed  MLflow: tracking: {address} cannot hold MLflow's database")
    proxy.rule = lambda request: DENY if request.method == "POST" else PASS
    answer = shell("doctor", "--storage", address)
    assert answer.code == 1
    assert "failed  storage: " in answer.out
    assert "refused was: to delete objects (s3:DeleteObject)" in answer.out
