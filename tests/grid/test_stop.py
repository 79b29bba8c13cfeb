"""A grid is stopped from another process over the shared storage alone, by its limits, or dies: `run` goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bwlm.errors import Paused, UserError
from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry, read_journal
from bwlm.record.launches import Usage, launches_of, living_launches
from tests.grids import BWLM, GridFile, once_at_step, private_environment, reap

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_cluster")]

CELLS = ["g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"]
STEPS = 400
SETTINGS: dict[str, Any] = {
    "budget": {"steps": STEPS, "batch_tokens": 512},
    "evaluation": {"every": 0, "tokens": 1024},
    "checkpoint": {"every": 0},  # what is there before the last step was saved because the launch stopped
}


def started(storage: Path, environment: dict[str, str], *arguments: str | Path) -> subprocess.Popen[str]:
    """`bwlm grid run` in a process of its own, with its output below `storage.parent`."""
    log = (storage.parent / "launch.log").open("a")
    command = [BWLM, "grid", "run", *arguments]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def bwlm(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BWLM, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)


def wait_for_step(process: subprocess.Popen[str], storage: Path, step: int, cells: list[str] = CELLS) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        entries = [last_entry(storage / cell) for cell in cells]
        if all(entry is not None and entry.step >= step for entry in entries):
            return
        time.sleep(0.05)
    pytest.fail(
        f"the grid ended too early, or did not get there: {(storage.parent / 'launch.log').read_text()[-2000:]}"
    )


def losses(storage: Path, cell: str) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(storage / cell)]


def test_a_stopped_grid_goes_on_as_if_nothing_had_been(grid_file: GridFile, tmp_path: Path, ray_cluster: str) -> None:
    """The command that stops has neither Ray nor MLflow: it sees the storage alone."""
    path = grid_file(**SETTINGS)
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    expected = run_plan(load_grid(path, []), calm, lambda _: None)
    apart = private_environment(storage)
    launch = started(storage, apart | {"RAY_ADDRESS": ray_cluster}, path, "--json")
    wait_for_step(launch, storage, 20)

    running = json.loads(bwlm(apart, "grid", "status", "g", "--json").stdout)
    assert [cell["standing"] for cell in running["cells"]] == ["running"] * 2
    assert [entry["pid"] for entry in running["summary"]["launches"]] == [launch.pid]
    for cell in running["cells"]:
        log = Path(cell["log"].partition(":")[2])
        assert f"trains {cell['id']}" in log.read_text()
        assert psutil.Process(cell["holder"]["pid"]).name().startswith("ray::")

    stop = bwlm(apart, "grid", "stop", "g")
    assert stop.returncode == 0, stop.stderr
    assert f":{launch.pid} is asked to stop; it runs since " in stop.stdout
    assert "to resume: bwlm grid run g\n" in stop.stdout
    assert launch.wait(timeout=60) == 75, "stop waits until the launch has ended"
    told = (tmp_path / "launch.log").read_text()
    assert "bwlm: g is stopped: `bwlm grid stop` asked for it (" in told
    assert "; to resume, run the same command, or: bwlm grid run g\n" in told
    saved = {cell: checkpoint_steps(ExperimentFolder(storage, cell).checkpoints) for cell in CELLS}
    for cell, steps in saved.items():
        status = ExperimentFolder(storage, cell).status()
        assert (status.state, status.reason, steps) == ("stopped", "", [status.step])
    status = json.loads(bwlm(apart, "grid", "status", path, "--json").stdout)
    assert [(cell["action"], [cell["from_step"]]) for cell in status["cells"]] == [
        ("resume", saved[cell]) for cell in CELLS
    ]
    assert status["summary"]["counts"] == {"stopped": 2}
    assert status["summary"]["flops"] > 0
    assert status["summary"]["cpu_hours"] > 0

    assert bwlm(apart, "grid", "stop", "g").stdout.startswith("g: no launch runs here\n")
    result = run_plan(load_grid(path, []), storage, lambda _: None)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
    for cell, calm_cell in zip(result.cells, expected.cells, strict=True):
        assert losses(storage, cell.id) == losses(calm, cell.id)
        assert cell.metrics["val_bpb"] == calm_cell.metrics["val_bpb"]
    ends = [entry.usage.end for entry in launches_of(storage / "grids" / "g")]
    assert [end.partition(":")[0] for end in ends] == ["stopped", "complete"]


def test_a_stop_of_a_launch_that_died_does_not_stop_the_next(
    grid_file: GridFile, tmp_path: Path, ray_cluster: str
) -> None:
    path, storage = grid_file(**SETTINGS), tmp_path / "storage"
    apart = private_environment(storage)
    launch = started(storage, apart | {"RAY_ADDRESS": ray_cluster}, path)
    wait_for_step(launch, storage, 5)
    below = psutil.Process(launch.pid).children(recursive=True)
    os.kill(launch.pid, signal.SIGSTOP)
    stop = bwlm(apart, "grid", "stop", "g", "--no-wait")
    assert f":{launch.pid} is asked to stop" in stop.stdout
    os.killpg(launch.pid, signal.SIGKILL)
    launch.wait()
    reap(below)
    assert living_launches(storage / "grids" / "g") == []
    assert (storage / "grids" / "g" / "stop.json").exists()
    result = run_plan(load_grid(path, []), storage, lambda _: None)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
    assert not (storage / "grids" / "g" / "stop.json").exists()


def test_a_limit_stops_with_checkpoints_and_says_what_is_left(
    grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours become dear once a cell has trained for some steps: those of this launch, and of all others together."""
    path = grid_file(**SETTINGS | {"launch": {"limit": {"money": 9.0}, "price": {"cpu_hour": 1e-6}}})
    storage = tmp_path / "storage"
    shown: list[str] = []

    def grow_dear(_: int) -> None:
        monkeypatch.setattr(Usage, "cost", lambda *_: 9.5)

    with once_at_step(storage, CELLS[0], 20, grow_dear) as acted, pytest.raises(Paused) as paused:
        run_plan(load_grid(path, []), storage, shown.append)
    assert acted
    # the costs of other launches, none or 9.5 here, are looked at every ten seconds
    reached = r"launch\.limit\.money=9 is reached, (9\.50|19\.00) are spent: "
    assert any(re.fullmatch(f"the launch stops: {reached}each cell saves a checkpoint", line) for line in shown)
    assert re.match(f"g is stopped: {reached}0 of 2 cells finished, ", str(paused.value))
    assert "FLOPs left, about " in str(paused.value)
    first = ExperimentFolder(storage, CELLS[0])
    assert checkpoint_steps(first.checkpoints) == [first.status().step]
    assert acted[0] <= first.status().step < STEPS
    with pytest.raises(UserError, match=r"launch.limit.money: 19.00 of 9 are spent by earlier launches of g: raise it"):
        run_plan(load_grid(path, []), storage, shown.append)
    result = run_plan(load_grid(path, ["launch.limit.money=20"]), storage, lambda _: None)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
