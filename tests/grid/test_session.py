"""Where cells run: addresses that cannot work are told in a line, and a worker waits no longer than it is asked to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import ray
import torch

from bwlm.config import ResourceSettings
from bwlm.errors import RunError, UserError
from bwlm.grid import cluster, worker
from bwlm.grid.cluster import _connect, cpus_of_cell
from bwlm.grid.launch import _check_tracking
from bwlm.grid.worker import train_worker
from bwlm.record.lineage import ExperimentFolder, Status
from bwlm.train import base
from tests.runs import NewRun


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS: 127.0.0.1:\d+ does not answer .*unset RAY_ADDRESS"):
        _connect(f"127.0.0.1:{closed_port()}")


def test_a_machine_too_busy_for_ray_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise Exception(told)

    monkeypatch.setattr(cluster.ray, "init", init)
    told = "The current node timed out during startup. This could happen because some of the raylet failed to startup"
    with pytest.raises(UserError, match=r"Ray did not start within 30 s.*run the same command"):
        cluster._start(2)
    told = "something else"
    with pytest.raises(Exception, match="something else"):
        cluster._start(2)


def test_the_address_for_jobs_is_not_the_cluster() -> None:
    with pytest.raises(UserError, match="takes jobs only: use `ray job submit`"):
        _connect("http://127.0.0.1:8265")


def test_a_tracking_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"tracking: 127.0.0.1:\d+ does not answer .*unset MLFLOW_TRACKING_URI"):
        _check_tracking(f"http://user:secret@127.0.0.1:{closed_port()}")
    _check_tracking("sqlite:////tmp/x.db")


def test_what_a_cell_holds() -> None:
    assert cpus_of_cell(ResourceSettings(workers=1, cpus_per_worker=2)) == 2
    assert cpus_of_cell(ResourceSettings(workers=3, cpus_per_worker=2)) == pytest.approx(6.1)


def test_a_worker_that_waits_for_its_run_leaves_when_it_is_asked_to_end(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run()
    monkeypatch.setattr(worker.RaySession, "stopping", lambda self: True)
    with folder.lease():
        train_worker({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})
    assert folder.status().state == "waiting"


def test_a_worker_uses_what_its_launch_reserved(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch may have written other resources into the run's folder meanwhile."""
    folder, seen = new_run(resources={"workers": 3, "cpus_per_worker": 5, "gpus_per_worker": 1}), list[Any]()

    def run_base(folder: ExperimentFolder, session: Any, stream: Any) -> Status:
        seen.append((session.world, session.device.type, torch.get_num_threads()))
        return Status("stopped")

    before = torch.get_num_threads()
    monkeypatch.setattr(base, "run_base", run_base)
    config = {"storage": str(folder.path.parent), "cell": folder.id, "resources": {"cpus_per_worker": 2}}
    try:
        train_worker(config)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, "cpu", 2)]


def test_an_end_that_cannot_be_noted_is_raised_for_tune_to_count(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the cell would be taken for one that was asked to end, and begin again for ever."""
    folder = new_run()
    monkeypatch.setattr(base, "run_base", lambda *_: Status("failed", "disk full", 3))
    with pytest.raises(RunError, match="disk full; this end cannot be noted in "):
        train_worker({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})


def test_a_stopped_cell_has_time_to_write_its_records() -> None:
    """In a worker, whose environment a cluster sets, not the launch: past 2 s Tune would drop the next cell."""
    code = "import os, bwlm.grid.worker; print(os.environ['TUNE_FUNCTION_THREAD_TIMEOUT_S'])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TUNE_")}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(shown.stdout) >= 600


def test_a_launch_waits_for_room_beside_other_work_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells of 2 CPUs, and one that is spared for rows."""
    free = iter([{}, {"CPU": 2.9}, {"CPU": 7.5}, {"CPU": 7.5}, {"CPU": 7.5, "GPU": 2.0}])
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: next(free))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    assert cluster._room_now(2.0, 0) == 3
    assert caplog.messages == ["waiting for 3 CPUs and 0 GPUs of the cluster that no other work holds"]
    assert cluster._room_now(2.0, 1) == 2


def test_a_real_clusters_workers_keep_their_watch_for_nodes_that_go() -> None:
    """They import this package too; only a cluster that is this machine needs no watch."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    code = f"import os, bwlm.grid.cluster; print({name!r} in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key != name}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_a_worker_keeps_no_memory_for_each_thread_that_trained_in_it(ray_cluster: str) -> None:
    """Tune runs each cell in a new thread of a process that stays."""
    assert ray_cluster
    before, after = ray.get(ray.remote(_memory_after_threads).options(num_cpus=1).remote())
    assert after - before < _TOUCHED, "each thread's heap was kept"


_TOUCHED = 64 * 2**20


def _memory_after_threads() -> tuple[int, int]:
    """Resident bytes after the first and after the last of five threads that touched memory, freed it and live on."""
    import threading

    import psutil
    import torch

    over = threading.Event()

    def train(freed: threading.Event) -> None:
        kept = [torch.ones(2**18) for _ in range(_TOUCHED // 2**20)]
        del kept
        freed.set()
        over.wait()

    resident = []
    for _ in range(5):
        freed = threading.Event()
        threading.Thread(target=train, args=(freed,), daemon=True).start()
        freed.wait()
        resident.append(psutil.Process().memory_info().rss)
    over.set()
    return resident[0], resident[-1]
