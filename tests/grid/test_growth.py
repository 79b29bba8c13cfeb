"""A launch on a busy cluster starts further cells as soon as other work ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.journal import last_entry
from tests.cluster.test_placement import holder as other_work
from tests.grid.test_stop import CELLS, SETTINGS, started, wait_for_step
from tests.grids import GridFile, private_environment

pytestmark = pytest.mark.faults

ENDLESS = {"steps": 1_000_000, "batch_tokens": 512}


def test_a_second_cell_begins_once_there_is_room(grid_file: GridFile, tmp_path: Path, ray_cluster: str) -> None:
    """Other work holds 2.5 of six CPUs: a cell of two and a spare CPU have room, and the second cell has none."""
    import ray

    path = grid_file(**SETTINGS | {"budget": ENDLESS, "resources": {"cpus_per_worker": 2}})
    storage, log = tmp_path / "storage", tmp_path / "launch.log"
    other = other_work(2.5)
    launch = started(storage, private_environment(storage) | {"RAY_ADDRESS": ray_cluster}, path, "--json")
    try:
        wait_for_step(launch, storage, 50, CELLS[:1])
        assert not (storage / CELLS[1]).exists() or last_entry(storage / CELLS[1]) is None
        assert "2 cells at once now" not in log.read_text()
        ray.kill(other)
        wait_for_step(launch, storage, 5)
        assert "2 cells at once now: the cluster has room" in log.read_text().splitlines()
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(timeout=120) == 143
    finally:
        launch.kill()
        launch.wait()
    assert all(checkpoint_steps(storage / cell / "checkpoints") for cell in CELLS), log.read_text()[-3000:]
