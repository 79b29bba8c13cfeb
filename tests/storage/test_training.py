"""Runs that train to a bucket: bit for bit as on a disk, also after kills, frozen machines and outages."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bwlm.errors import RunError
from bwlm.record.bucket import fetch_log, push_all, push_text
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.health import readable
from bwlm.record.lease import LeaseLost
from bwlm.record.researchlog import open_log
from bwlm.storage import keeper
from bwlm.storage.head import read_head
from bwlm.storage.opened import open_storage, push, shared
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.trained.load import load_model
from tests.runs import STEPS, NewRun, in_process, losses, make_run, weights_digest
from tests.s3_server import PASS, REFUSE, FaultyProxy
from tests.storage.conftest import Machine
from tests.storage.trainer import pushed_steps, train

pytestmark = pytest.mark.faults
RunOn = Callable[..., ExperimentFolder]


@pytest.fixture
def made_on(machine: Machine, prepared: Prepared) -> RunOn:
    """(machine, name, **settings) -> a run that waits, made and pushed as by a launch there, its text too."""

    def make(where: str, name: str = "run", **settings: Any) -> ExperimentFolder:
        root = machine(where)
        text = replace(prepared, folder=root / "cache" / "packed" / "text")
        shutil.copytree(prepared.folder, text.folder, dirs_exist_ok=True)
        push_text(text.folder)
        folder = make_run(text, root, name, **settings)
        push(folder.path, trained=True)
        return folder

    return make


@pytest.fixture
def calm(new_run: NewRun) -> ExperimentFolder:
    """The same run in a storage that is a folder."""
    folder = new_run("calm")
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    return folder


def opened_on(machine: Machine, where: str, address: str, name: str = "run") -> ExperimentFolder:
    machine(where)
    return ExperimentFolder(open_storage(address), name)


def trainer(folder: ExperimentFolder, step: int, end: str, seconds: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.storage.trainer", str(folder.path), str(step), end, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def logged(folder: ExperimentFolder) -> list[int]:
    fetch_log(folder.research_log("base"))
    with open_log(folder.research_log("base")) as file:
        return [int(step) for step in file["train/step"][:]]


def check_as(calm: ExperimentFolder, folder: ExperimentFolder) -> None:
    """The run is whole, and what it learned is that of the calm one, bit for bit."""
    assert folder.status().state == "finished"
    assert losses(folder) == losses(calm)
    assert logged(folder) == list(range(1, STEPS + 1))
    _, reasons = readable([folder])
    assert not reasons
    load_model(folder.path.parent, "run")  # brings the weights
    in_bucket = shared(folder.path)
    assert in_bucket is not None
    in_bucket.fetch("checkpoints/*")
    assert weights_digest(folder) == weights_digest(calm)


def test_a_run_is_that_of_a_disk_bit_for_bit(
    made_on: RunOn, machine: Machine, address: str, calm: ExperimentFolder
) -> None:
    folder = made_on("one")
    assert train(folder.path) == "finished"
    check_as(calm, opened_on(machine, "another", address))


def test_a_killed_run_resumes_on_another_machine(
    made_on: RunOn, machine: Machine, address: str, calm: ExperimentFolder
) -> None:
    folder = made_on("one")
    killed = trainer(folder, 9, "kill", seconds=2.0)
    assert killed.wait() == -signal.SIGKILL
    there = opened_on(machine, "another", address)
    assert there.status().state == "running"  # nobody knows yet
    assert checkpoint_steps(there.checkpoints) == [4, 8]
    assert train(there.path, seconds=2.0) == "finished"
    check_as(calm, there)
    in_bucket = shared(there.path)
    assert in_bucket is not None
    head, _ = read_head(in_bucket.bucket, "run")
    attempts = {path.split("/")[1]: stored.attempt for path, stored in head.files.items() if "meta.json" in path}
    assert attempts == {"step_000004": 1, "step_000008": 1, "step_000012": 2}
    check_as(calm, opened_on(machine, "one", address))  # and what the first had begun is gone there


def test_a_frozen_machine_that_wakes_writes_nothing(
    made_on: RunOn, machine: Machine, address: str, calm: ExperimentFolder
) -> None:
    folder = made_on("one")
    frozen = trainer(folder, 9, "stop", seconds=1.0)
    os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
    there = opened_on(machine, "another", address)
    assert train(there.path, seconds=1.0) == "finished"
    in_bucket = shared(there.path)
    assert in_bucket is not None
    before = read_head(in_bucket.bucket, "run")
    opened_on(machine, "one", address)  # as any command there does, while it is frozen
    frozen.send_signal(signal.SIGCONT)
    said, _ = frozen.communicate(timeout=60)
    assert re.match(r"LeaseLost: run: .* has begun attempt 2|LeaseLost: run: attempt 2 has written to it", said), said
    assert read_head(in_bucket.bucket, "run") == before
    check_as(calm, opened_on(machine, "one", address))


def test_an_outage_does_not_stop_training_and_loses_nothing(
    made_on: RunOn,
    machine: Machine,
    address: str,
    calm: ExperimentFolder,
    proxy: FaultyProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = made_on("one")

    class Away(LocalSession):
        def report(self, step: int, metrics: dict[str, float]) -> None:
            if step == 2:
                proxy.rule = lambda request: REFUSE
            if step == STEPS - 1:
                while "its records wait" not in caplog.text:
                    time.sleep(0.05)
                proxy.rule = lambda request: PASS

    with folder.lease():
        assert run_phase(folder, Away(), in_process).state == "finished"
    assert caplog.text.count("does not answer (503 Service Unavailable); the training goes on") == 1
    check_as(calm, opened_on(machine, "another", address))


def test_what_is_left_behind_is_pushed_by_its_command(
    made_on: RunOn,
    machine: Machine,
    address: str,
    calm: ExperimentFolder,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket stays away until the end: the run fails with the command that pushes the rest."""
    monkeypatch.setattr(keeper, "_PATIENCE_SECONDS", 0.5)
    folder = made_on("one")

    class Away(LocalSession):
        def report(self, step: int, metrics: dict[str, float]) -> None:
            if step == 6:
                proxy.rule = lambda request: REFUSE

    with pytest.raises(RunError, match=f"the rest waits on .* bwlm storage push --storage {address}"), folder.lease():
        assert run_phase(folder, Away(), in_process).state == "finished"
    proxy.rule = lambda request: PASS
    assert opened_on(machine, "another", address).status().state != "finished"
    machine("one")
    assert push_all(folder.path.parent) == (["run"], [])
    assert push_all(folder.path.parent) == ([], [])
    check_as(calm, opened_on(machine, "another", address))


def test_only_one_of_two_machines_trains_a_run(made_on: RunOn, machine: Machine, address: str, tmp_path: Path) -> None:
    """The other waits, and then finds it finished."""
    made_on("one")
    two = opened_on(machine, "two", address)
    one = opened_on(machine, "one", address)
    processes = [trainer(one, 0, "go"), trainer(two, 0, "go")]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["finished", "finished"]
    in_bucket = shared(two.path)
    assert in_bucket is not None
    head, _ = read_head(in_bucket.bucket, "run")
    assert len({stored.attempt for path, stored in head.files.items() if path.startswith("checkpoints/")}) == 1
    assert pushed_steps(in_bucket) == {4, 8, 12}


def hold_until_another_has_begun(folder: ExperimentFolder, proxy: FaultyProxy) -> None:
    with folder.lease(seconds=0.4):
        proxy.rule, before = lambda request: REFUSE, len(proxy.seen)
        deadline = time.monotonic() + 60
        while len([request for request in proxy.seen[before:] if "/.leases/" in request.path]) < 5:
            assert time.monotonic() < deadline, "it shows no signs of life"
            time.sleep(0.05)
        folder.check_lease()
        proxy.rule = lambda request: PASS
        in_bucket = shared(folder.path)
        assert in_bucket is not None
        assert in_bucket.bucket.create(".leases/run/lease/00000002.json", b'{"host": "other", "pid": 7}')
        while time.monotonic() < deadline:
            folder.check_lease()
            time.sleep(0.01)


def test_a_lease_is_lost_by_a_newer_attempt_alone(made_on: RunOn, proxy: FaultyProxy) -> None:
    """A run goes on while the bucket is away, until it hears that another one has begun."""
    folder = made_on("one")
    with pytest.raises(LeaseLost, match="other:7 has begun attempt 2"):
        hold_until_another_has_begun(folder, proxy)
