"""A worker is frozen for real until another launch has taken its cell: nothing is lost, trained twice or counted."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from bwlm.grid.launch import LaunchResult, run_plan
from bwlm.plan.load import load_grid
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from tests.grids import BWLM, GridFile, holder, once_at_step, private_environment

STEPS = 300
CELL = "g_forward_d1_lr1_s0"


@pytest.mark.slow
def test_another_launch_takes_the_cell_of_a_frozen_worker(
    grid_file: GridFile, tmp_path: Path, ray_cluster: str
) -> None:
    path = grid_file(
        axes={"direction": ["forward"], "depth": [1]},
        budget={"steps": STEPS, "batch_tokens": 512},
        evaluation={"every": 0, "tokens": 1024},
        checkpoint={"every": 20},
        launch={"retries": 0},
    )
    calm, storage = tmp_path / "calm", tmp_path / "storage"
    run_plan(load_grid(path, []), calm, lambda _: None)

    folder, frozen, results = ExperimentFolder(storage, CELL), list[int](), list[LaunchResult]()

    def freeze(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        frozen.append(pid)

    first = threading.Thread(target=lambda: results.append(run_plan(load_grid(path, []), storage, lambda _: None)))
    with once_at_step(storage, CELL, 50, freeze):
        first.start()
        while not frozen:
            assert first.is_alive(), "it ended before it could be frozen"
            time.sleep(0.05)
    environment = private_environment(storage) | {"RAY_ADDRESS": ray_cluster}
    with (tmp_path / "second.log").open("ab") as log:
        second = subprocess.Popen([BWLM, "grid", "run", path], env=environment, stdout=log, stderr=log)
    while holder(folder) in (None, *frozen) and second.poll() is None:
        time.sleep(0.05)
    os.kill(frozen[0], signal.SIGCONT)
    assert second.wait(timeout=300) == 0
    first.join()

    told = (tmp_path / "second.log").read_text()
    assert f"warning: {CELL}: " in told
    assert f":{frozen[0]} showed no sign of life for 60 seconds: " in told
    assert [cell.state for cell in results[0].cells] == ["finished"]
    journals = [list(read_journal(where / CELL)) for where in (storage, calm)]
    assert [entry.step for entry in journals[0]] == list(range(1, STEPS + 1))
    one, other = ([entry.metrics["train_loss"] for entry in journal] for journal in journals)
    assert one == other
