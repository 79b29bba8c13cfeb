"""A grid in a bucket, launched on one machine: seen and stopped from a second, resumed there, deleted from a third."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from bwlm.remote import working_folder
from bwlm.storage.folder import bucket_at
from bwlm.storage.head import read_head
from bwlm.storage.objects import Bucket
from tests.grids import BWLM, GridFile, private_environment
from tests.mlflow_server import free_port, server
from tests.s3_server import BUCKET, CREDENTIALS

pytestmark = pytest.mark.faults
ADDRESS = f"s3://{BUCKET}/stopped"
CELLS = ["g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"]
STEPS = 800
SETTINGS: dict[str, Any] = {
    "budget": {"steps": STEPS, "batch_tokens": 512},
    "evaluation": {"every": 0, "tokens": 1024},
    "checkpoint": {"every": 0},  # what is there before the last step was saved because the launch stopped
    "launch": {"price": {"cpu_hour": 1000.0}, "grace_seconds": 120.0},  # a busy machine saves and pushes slowly
}


def bwlm(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BWLM, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)


def status(environment: dict[str, str]) -> Any:
    done = bwlm(environment, "grid", "status", "g", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until_both_train(process: subprocess.Popen[str], log: Path) -> None:
    """Until the bucket has an attempt of each cell, and what the launch has used."""
    bucket = Bucket(ADDRESS)
    while process.poll() is None:
        attempts = [read_head(bucket, cell)[0].attempt for cell in CELLS]
        used = [path for path in read_head(bucket, "grids/g")[0].files if path.startswith("launches/")]
        if all(attempts) and used:
            return
        time.sleep(0.2)
    pytest.fail(f"the grid ended before it could be stopped: {log.read_text()[-2000:]}")


def test_a_grid_is_stopped_from_another_machine_and_goes_on_there(
    s3: str, grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": s3}).items():
        monkeypatch.setenv(name, value)
    bucket_at.cache_clear()
    with server(tmp_path, free_port()) as tracking:
        calm = private_environment(tmp_path) | {"BWLM_STORAGE": ADDRESS, "MLFLOW_TRACKING_URI": tracking}
        one, two, three = (calm | {"BWLM_SCRATCH": str(tmp_path / name)} for name in ("one", "two", "three"))
        path, log = grid_file(**SETTINGS), tmp_path / "launch.log"
        with log.open("w") as file:
            launch = subprocess.Popen([BWLM, "grid", "run", path], env=one, stdout=file, stderr=file, text=True)
        wait_until_both_train(launch, log)
        running = status(two)
        assert [entry["pid"] for entry in running["summary"]["launches"]] == [launch.pid]
        assert [cell["holder"] is not None for cell in running["cells"]] == [True] * 2
        assert running["summary"]["money"] > 0

        stop = bwlm(two, "grid", "stop", "g")
        assert stop.returncode == 0, stop.stderr
        assert f":{launch.pid} is asked to stop; it runs since " in stop.stdout
        assert "to resume: bwlm grid run g\n" in stop.stdout
        assert launch.wait(timeout=60) == 75, log.read_text()[-2000:]
        stopped = status(two)
        assert stopped["summary"]["counts"] == {"stopped": 2}
        assert stopped["summary"]["money"] >= running["summary"]["money"]
        assert [(cell["action"], cell["from_step"]) for cell in stopped["cells"]] == [
            ("resume", cell["step"]) for cell in stopped["cells"]
        ]

        done = bwlm(two, "grid", "run", "g")
        assert done.returncode == 0, done.stderr[-3000:]
        finished = status(three)
        assert finished["summary"]["counts"] == {"finished": 2}
        assert finished["summary"]["money"] > stopped["summary"]["money"]
        monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / "three"))
        for cell in CELLS:
            steps = [entry.step for entry in read_journal(ExperimentFolder(working_folder(ADDRESS), cell).path)]
            assert steps == list(range(1, STEPS + 1))

        would = bwlm(three, "grid", "delete", "g", "--dry-run")
        assert would.stdout.startswith("would delete g (2 runs and its reports, ")
        assert bwlm(three, "grid", "delete", "g", "--yes").returncode == 0
        left = [
            one.key for one in Bucket(ADDRESS).list("") if not one.key.startswith((".heads/", ".leases/", "cache/"))
        ]
        assert not left
        assert "no grid of this name" in bwlm(one, "grid", "status", "g").stderr
