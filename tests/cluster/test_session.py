"""Ray's place: addresses that cannot work are told in a line, and a launch takes no more room than there is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from bwlm.cluster import autoscaling, capacity, serving
from bwlm.cluster import session as cluster
from bwlm.cluster.autoscaling import NodeType
from bwlm.cluster.capacity import cpus_of_cell
from bwlm.cluster.serving import Replicas
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


HEAD = {"Alive": True, "NodeID": "h", "Resources": {"node:__internal_head__": 1.0}}
WORKER = {"Alive": True, "NodeID": "w", "Resources": {"CPU": 4.0}}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """View of a cluster: its nodes, the config of the autoscaler's process on the head, and Ray's state."""
    shown: dict[str, Any] = {"nodes": [HEAD, WORKER], "config": "", "reply": GetClusterStatusReply()}
    context = SimpleNamespace(gcs_address="gcs", get_node_id=lambda: "h")
    monkeypatch.setattr(autoscaling.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(autoscaling.ray, "nodes", lambda: shown["nodes"])
    monkeypatch.setattr(autoscaling, "_config_of_monitor", lambda gcs: shown["config"])
    monkeypatch.setattr(autoscaling, "_status", lambda gcs: shown["reply"])
    autoscaling._find_autoscaler.cache_clear()
    return shown


CONFIG = """
max_workers: 3
available_node_types:
  head: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  cpu: {resources: {CPU: 4}, node_config: {}, max_workers: 2}
  gpu: {resources: {CPU: 8, GPU: 2}, node_config: {}}
"""


def test_a_cluster_without_an_autoscaler_stays_as_it_is(found: dict[str, Any]) -> None:
    assert autoscaling.find_autoscaler() is None
    assert capacity.most_at_once({ResourceSettings()}, None, 9) == 3, "four CPUs, and one of them is spared"


def test_a_cluster_is_asked_for_what_it_can_become(found: dict[str, Any]) -> None:
    """At its largest 2 x 4 and 3 x 8 CPUs; those that there are now are of these types."""
    found["config"] = CONFIG
    kinds = autoscaling.Autoscaler((NodeType("cpu", {"CPU": 4}, 2), NodeType("gpu", {"CPU": 8, "GPU": 2}, 3)))
    assert autoscaling.find_autoscaler() == kinds
    assert capacity.most_at_once({ResourceSettings()}, None, 100) == 31
    assert capacity.most_at_once({ResourceSettings(gpus_per_worker=1)}, None, 100) == 6
    assert capacity.most_at_once({ResourceSettings(gpus_per_worker=1)}, 4, 100) == 4
    assert capacity.most_at_once({ResourceSettings(workers=6, gpus_per_worker=1)}, None, 2) == 1
    with pytest.raises(UserError, match=r"launch.concurrency: 7 cells at once, but the cluster, at its largest 2"):
        capacity.most_at_once({ResourceSettings(gpus_per_worker=1)}, 7, 100)
    with pytest.raises(UserError, match=r"needs 9 CPUs, but .* 2 nodes of cpu \(4 CPUs\) and 3 nodes of gpu \(8 CPUs"):
        capacity.most_at_once({ResourceSettings(cpus_per_worker=9)}, None, 1)


def test_under_kuberay_node_types_are_not_known_and_nothing_is_refused(found: dict[str, Any]) -> None:
    found["config"] = None  # its autoscaler is no process of the head's container
    assert autoscaling.find_autoscaler() is None
    autoscaling._find_autoscaler.cache_clear()
    found["reply"].autoscaling_state.autoscaler_state_version = 3
    assert autoscaling.find_autoscaler() == autoscaling.Autoscaler(())
    assert capacity.most_at_once({ResourceSettings(cpus_per_worker=64)}, None, 5) == 5
    assert serving._check_room(Replicas(least=9, most=9, threads=64, slots=1, places=1, grace=1)) == 0


def test_replicas_may_need_nodes_that_the_autoscaler_would_start(found: dict[str, Any]) -> None:
    two = Replicas(least=2, most=2, threads=2, slots=1, places=1, grace=1)
    found["config"] = CONFIG
    assert serving._check_room(two) == 0, "the four CPUs that are there"
    found["nodes"] = [HEAD]
    assert serving._check_room(two) == 1, "nodes with GPUs may come"
    with pytest.raises(UserError, match=r"--replicas 7: each needs 2 CPUs and 1 GPUs, and the cluster has room for 6"):
        serving._check_room(replace(two, least=7))
    autoscaling._find_autoscaler.cache_clear()
    found["config"] = ""
    with pytest.raises(UserError, match=r"--replicas 2: each needs 2 CPUs and 0 GPUs, and the cluster has room for 0"):
        serving._check_room(two)


def test_the_autoscalers_answer_counts_once_it_has_seen_the_request(
    found: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reply = found["reply"]
    reply.cluster_resource_state.cluster_resource_state_version = 7
    growth = autoscaling.Growth()
    state = reply.autoscaling_state
    state.last_seen_cluster_resource_state_version = 7
    state.infeasible_gang_resource_requests.add(details="aa:PACK|PENDING")
    assert growth.may_place({"aa"}), "an answer to what was asked before"
    state.last_seen_cluster_resource_state_version = 8
    assert not growth.may_place({"aa"})
    assert growth.may_place({"aa", "bb"})
    state.failed_instance_requests.add(ray_node_type_name="gpu", reason="quota of G instances")
    growth.may_place({"aa"})
    growth.may_place({"aa"})
    assert caplog.messages == ["the autoscaler could not start gpu: quota of G instances"]


def test_a_real_clusters_workers_keep_their_watch_for_nodes_that_go() -> None:
    """They import this package too; only a cluster that is this machine needs no watch."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    code = f"import os, bwlm.cluster.session; print({name!r} in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key != name}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
