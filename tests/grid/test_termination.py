"""Workers and drivers are asked to end (SIGTERM) for real: they save where they are, and go on as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from bwlm.cluster import signals
from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry, read_journal
from bwlm.record.starts import starts_of
from tests.grids import BWLM, GridFile, once_at_step, private_environment

STEPS = 300
SETTINGS: dict[str, Any] = {
    "axes": {"direction": ["forward"], "depth": [1]},
    "budget": {"steps": STEPS, "batch_tokens": 512},
    "evaluation": {"every": 0, "tokens": 1024},
    "checkpoint": {"every": 0},  # what is there before the last step was saved because of the signal
    "launch": {"retries": 0},
}
CELL = "g_forward_d1_lr1_s0"


def losses(storage: Path, cell: str) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(storage / cell)]


def ask_rank_0(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def ask_rank_1(pid: int) -> None:
    """The other worker of the cell whose rank 0 is `pid`: of the same title, below the same raylet."""
    rank_0 = psutil.Process(pid)
    raylet = rank_0.parent()
    assert raylet is not None
    others = [p for p in raylet.children() if p.name().startswith("ray::RayTrainWork") and p != rank_0]
    [rank_1] = others
    rank_1.send_signal(signal.SIGTERM)


@pytest.mark.slow  # tests/faults/test_night.py asks a worker too, among other faults
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("workers", "ask"), [(1, ask_rank_0), (2, ask_rank_1), ({"min": 1, "max": 1}, ask_rank_0)])
def test_a_worker_that_is_asked_to_end_saves_and_its_cell_goes_on(
    grid_file: GridFile, tmp_path: Path, workers: int | dict[str, int], ask: Callable[[int], None]
) -> None:
    path = grid_file(**SETTINGS, resources={"workers": workers})
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    run_plan(load_grid(path, []), calm, lambda _: None)
    with once_at_step(storage, CELL, 25, ask) as asked:
        result = run_plan(load_grid(path, []), storage, lambda _: None)
    assert asked, "the run ended before it could be asked"
    assert [(cell.state, cell.reason) for cell in result.cells] == [("finished", "")]
    assert losses(storage, CELL) == losses(calm, CELL)
    # it did not begin anew, but took up what was saved at the signal
    saved, last = checkpoint_steps(ExperimentFolder(storage, CELL).checkpoints)
    assert asked[0] <= saved < last == STEPS
    assert [(start.step, start.lost) for start in starts_of(storage / CELL)] == [(0, 0), (saved, 0)]
    since = 1000 * json.loads((storage / CELL / "lease.json").read_text())["since"]
    times = {entry.step: entry.time for entry in read_journal(storage / CELL)}
    assert times[saved] < since < times[saved + 1]


def started(storage: Path, environment: dict[str, str], *arguments: str | Path) -> subprocess.Popen[bytes]:
    log = (storage.parent / "driver.log").open("ab")
    return subprocess.Popen([BWLM, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(process: subprocess.Popen[bytes], storage: Path, cells: list[str], step: int) -> None:
    while process.poll() is None:
        entries = [last_entry(storage / cell) for cell in cells]
        if all(entry is not None and entry.step >= step for entry in entries):
            return
        time.sleep(0.05)
    pytest.fail(f"it ended before it could be asked: {(storage.parent / 'driver.log').read_text()[-2000:]}")


def check_saved(storage: Path, cell: str) -> None:
    """Stopped, with a checkpoint at its last step."""
    status = ExperimentFolder(storage, cell).status()
    assert (status.state, status.reason) == ("stopped", "")
    assert checkpoint_steps(ExperimentFolder(storage, cell).checkpoints) == [status.step]


@pytest.mark.slow
def test_a_grid_whose_driver_is_asked_to_end_saves_every_cell(
    grid_file: GridFile, tmp_path: Path, ray_cluster: str
) -> None:
    axes = {"direction": ["forward", "backward", "bidirectional"], "depth": [1]}
    budget = {"steps": 2 * STEPS, "batch_tokens": 512}
    path = grid_file(**SETTINGS | {"axes": axes, "budget": budget, "launch": {"retries": 0, "concurrency": 2}})
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    expected = run_plan(load_grid(path, []), calm, lambda _: None)
    environment = private_environment(storage) | {"RAY_ADDRESS": ray_cluster}
    driver = started(storage, environment, "grid", "run", path)
    *running, waiting = [cell.id for cell in expected.cells]
    wait_for_step(driver, storage, running, 20)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=300) == 143
    assert (tmp_path / "driver.log").read_text().count("bwlm: stopped by SIGTERM; run the same command to resume") == 1
    assert "Trial train_cell" not in (tmp_path / "driver.log").read_text(), "Tune tells of cells that never ran"
    for cell in running:
        check_saved(storage, cell)
    assert ExperimentFolder(storage, waiting).status().state == "waiting"

    result = run_plan(load_grid(path, []), storage, lambda _: None)
    assert [cell.state for cell in result.cells] == ["finished"] * 3
    for cell, calm_cell in zip(result.cells, expected.cells, strict=True):
        assert losses(storage, cell.id) == losses(calm, cell.id)
        assert cell.metrics["val_bpb"] == calm_cell.metrics["val_bpb"]


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_does_not_wait_for_a_worker_that_hangs(
    grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck: list[int] = []

    def hang(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        stuck.append(pid)
        os.kill(os.getpid(), signal.SIGTERM)

    storage = tmp_path / "storage"
    try:
        with once_at_step(storage, CELL, 5, hang), pytest.raises(SystemExit) as ended:
            run_plan(load_grid(grid_file(**SETTINGS), ["launch.grace_seconds=0.5"]), storage, lambda _: None)
        assert ended.value.code == 143
    finally:
        for pid in stuck:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_of_another_node_is_asked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def pid(self) -> int:
            return os.getpid()

    actor = Worker.remote()
    pid = ray.get(actor.pid.remote())
    host = ray.nodes()[0]["NodeManagerHostname"]
    monkeypatch.setattr(signals.socket, "gethostname", lambda: "elsewhere")
    signals.ask_to_end(f"{host}:{pid}")
    psutil.Process(pid).wait(timeout=120)
    signals.ask_to_end(f"{host}:{pid}")  # nobody is there any more
    signals.ask_to_end("nowhere:1")
    signals.ask_to_end(f"{host}:?")


_OTHER_DRIVER = """
import os, ray, sys

@ray.remote(num_cpus=0)
class Worker:
    def pid(self):
        return os.getpid()

ray.init(logging_level="error", log_to_driver=False)
worker = Worker.remote()
print(ray.get(worker.pid.remote()), flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("ray_cluster")
def test_workers_of_another_driver_are_not_our_own(ray_cluster: str) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def pid(self) -> int:
            return os.getpid()

    actor = Worker.remote()
    own, host = ray.get(actor.pid.remote()), signals.socket.gethostname()
    command, pipes = [sys.executable, "-c", _OTHER_DRIVER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": ray_cluster}, **pipes) as driver:
        assert driver.stdout is not None
        other = int(driver.stdout.readline())
        found = signals.own_workers()
        driver.communicate()
    assert psutil.Process(own).name().startswith("ray::")
    assert f"{host}:{own}" in found
    assert f"{host}:{other}" not in found


def test_no_other_process_is_ended() -> None:
    """A signal comes before a process reads on, so a bystander that still answers got none."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bystander:
        signals.ask_to_end(f"{signals.socket.gethostname()}:{bystander.pid}")
        answer, _ = bystander.communicate(b"still here")
    assert (answer, bystander.returncode) == (b"still here", 0)
