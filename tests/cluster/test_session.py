"""Ray's place: addresses that cannot work are told in a line, and a launch takes no more room than there is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.cluster import capacity
from bwlm.cluster import session as cluster
from bwlm.cluster.capacity import cpus_of_cell
from bwlm.cluster.session import _connect
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.grid.launch import _check_tracking


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS: 127.0.0.1:\d+ does not answer .*unset RAY_ADDRESS"):
        _connect(f"127.0.0.1:{closed_port()}", "g")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors of the attempts to start Ray, in order; the attempt after the last one succeeds."""
    errors: list[str] = []

    def init(**options: object) -> str:
        if errors:
            raise Exception(errors.pop(0))
        return "started"

    monkeypatch.setattr(cluster.ray, "init", init)
    return errors


def test_a_launch_has_its_name_in_rays_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **options: given.append(options))
    cluster._start(2, 60, "my-grid")
    [config] = [options["job_config"] for options in given]
    assert config.metadata == {"job_name": "my-grid"}  # type: ignore[attr-defined]


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def test_a_machine_too_busy_for_ray_tries_again_and_then_tells(starts: list[str]) -> None:
    starts += [TIMED_OUT] * 2
    assert cluster._start(2, 60, "g") == "started"
    starts += [TIMED_OUT]
    with pytest.raises(UserError, match=r"Ray did not start within 0 s.*launch\.ray_start_seconds.*the same command"):
        cluster._start(2, 0, "g")


def test_anything_else_that_keeps_ray_from_starting_is_told_in_a_line(starts: list[str]) -> None:
    starts += ["\n  /dev/shm is full.\nTraceback"]
    with pytest.raises(UserError, match=r"^Ray does not start on this machine: /dev/shm is full: .*RAY_.*$"):
        cluster._start(2, 60, "g")


def test_a_temporary_folder_that_ray_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"^TMPDIR: .*gone is not a folder: make it, or set RAY_TMPDIR=/tmp"):
        cluster._start(2, 60, "g")
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match=r"^RAY_TMPDIR: .* is too long for Ray's sockets"):
        cluster._start(2, 60, "g")


def test_settings_with_which_ray_cannot_be_imported_are_named(tmp_path: Path) -> None:
    """A stand-in for Ray ends the process as Ray does where it cannot read a setting."""
    (tmp_path / "ray.py").write_text("import os\n\nos.kill(os.getpid(), 11)\n")
    command = [Path(sys.executable).with_name("bwlm"), "runs", "list", "--storage", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "RAY_object_setting": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("bwlm: RAY_object_setting: Ray cannot be imported with these settings")
    assert done.stderr.count("\n") == 1

    (tmp_path / "ray.py").write_text("")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "RAY_" not in done.stderr


def test_the_address_for_jobs_is_not_the_cluster() -> None:
    with pytest.raises(UserError, match="takes jobs only: use `ray job submit`"):
        _connect("http://127.0.0.1:8265", "g")


def test_a_tracking_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking: 127.0.0.1:\d+ does not answer .*unset MLFLOW_TRACKING_URI"):
        _check_tracking(f"http://user:secret@127.0.0.1:{closed_port()}", tmp_path)
    _check_tracking("sqlite:////tmp/x.db", tmp_path)


def test_what_a_cell_holds() -> None:
    assert cpus_of_cell(ResourceSettings(workers=1, cpus_per_worker=2)) == 2
    assert cpus_of_cell(ResourceSettings(workers=3, cpus_per_worker=2)) == pytest.approx(6.1)


@pytest.mark.parametrize(
    ("gpus", "each", "workers", "cells"), [(1, 1, 1, 1), (1, 0.25, 1, 4), (2, 0.4, 1, 4), (3, 0.1, 1, 30), (5, 1, 2, 2)]
)
def test_cells_share_a_gpu_and_none_lies_on_two(gpus: int, each: float, workers: int, cells: int) -> None:
    needs = ResourceSettings(gpus_per_worker=each, workers=workers)
    assert capacity._fitting(needs, cpus=64, gpus=gpus, where="the cluster") == cells
    assert capacity._places({"CPU": 64, "GPU": gpus}, needs) == cells * workers + gpus % workers


def test_a_launch_waits_for_room_beside_other_work_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells of 2 CPUs, and one that is spared for rows."""
    free = iter(
        [
            {},
            {"CPU": 2.9},
            {"CPU": 7.5},
            {"CPU": 7.5},
            {"CPU": 7.5, "GPU": 2.0},
            {"CPU": 7.5, "GPU": 0.5},
            {"CPU": 23.0, "GPU": 1.0},
        ]
    )
    monkeypatch.setattr(capacity.ray, "available_resources", lambda: next(free))
    monkeypatch.setattr(capacity.time, "sleep", lambda seconds: None)
    assert capacity._free_now(2.0, 0) == 3
    assert caplog.messages == ["waiting until 3 CPUs and 0 GPUs of the cluster are free"]
    assert capacity._free_now(2.0, 1) == 2
    assert capacity._free_now(2.0, 0.25) == 2, "half of a GPU is free, another cell has the rest"
    assert capacity._free_now(2.0, 0.1) == 10, "not nine, as 1.0 // 0.1 is"


def test_a_real_clusters_workers_keep_their_watch_for_nodes_that_go() -> None:
    """They import this package too; only a cluster that is this machine needs no watch."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    code = f"import os, bwlm.cluster.session; print({name!r} in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key != name}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
