"""The driver is interrupted for real; the same command goes on, and nothing is trained twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.record.catalog.rows import load_cells
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry, read_journal
from tests.grids import BWLM, holder, private_environment, reap, runs

GridFile = Callable[..., Path]
CELLS = ["g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"]
STEPS = 400


def started(path: Path, storage: Path) -> subprocess.Popen[bytes]:
    """`bwlm grid run` as the leader of a process group of its own, with a Ray of its own."""
    log = (storage.parent / "driver.log").open("ab")
    command = [BWLM, "grid", "run", path]
    return subprocess.Popen(command, env=private_environment(storage), stdout=log, stderr=log, start_new_session=True)


def wait_for_step(process: subprocess.Popen[bytes], storage: Path, step: int) -> None:
    """Until every cell is beyond a step, read as any script would."""
    while process.poll() is None:
        entries = [last_entry(storage / cell) for cell in CELLS]
        if all(entry is not None and entry.step >= step for entry in entries):
            return
        time.sleep(0.05)
    pytest.fail(f"the grid ended before it could be stopped: {(storage.parent / 'driver.log').read_text()[-2000:]}")


def wait_until_free(storage: Path) -> None:
    """Ray's workers notice a little later that their driver is gone."""
    while any(holder(ExperimentFolder(storage, cell)) for cell in CELLS):
        time.sleep(0.2)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_leaves_a_grid_that_goes_on(grid_file: GridFile, tmp_path: Path) -> None:
    settings = {"budget": {"steps": STEPS, "batch_tokens": 512}, "evaluation": {"every": 0, "tokens": 1024}}
    path = grid_file(**settings, checkpoint={"every": 20})
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    run_plan(load_grid(path, []), calm, lambda _: None)

    first = started(path, storage)
    wait_for_step(first, storage, 30)
    below = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(timeout=300) == 130
    told = (tmp_path / "driver.log").read_text()
    assert "Ctrl-C: each cell saves a checkpoint" in told
    assert "bwlm: interrupted; run the same command to resume" in told
    reap(below)
    wait_until_free(storage)
    states = {run["state"] for run in runs(storage)}
    assert "stopped" in states
    assert states <= {"stopped", "finished"}  # on a busy machine one cell may end before the other has begun

    result = run_plan(load_grid(path, []), storage, lambda _: None)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
    for cell, expected in zip(result.cells, load_cells(calm, CELLS), strict=True):
        journal = list(read_journal(storage / cell.id))
        assert [entry.step for entry in journal] == list(range(1, STEPS + 1))
        assert [e.metrics["train_loss"] for e in journal] == [
            e.metrics["train_loss"] for e in read_journal(calm / cell.id)
        ]
        assert cell.metrics["val_bpb"] == expected.metrics["val_bpb"]
    with sqlite3.connect(storage / "mlflow.db") as store:
        assert store.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone() == (2,)
        repeated = "select count(*) from metrics where key = 'train/loss' group by run_uuid, step having count(*) > 1"
        assert store.execute(repeated).fetchall() == []
        assert store.execute("select count(*) from metrics where key = 'train/loss'").fetchone() == (2 * STEPS,)
