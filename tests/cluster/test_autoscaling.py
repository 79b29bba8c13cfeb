"""A head without CPUs whose autoscaler starts nodes: Ray's fake provider, which starts real nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from bwlm.cluster.autoscaling import NodeType
from tests.cluster.heads import BIN, ROOT, free_ports, node_of

pytestmark = pytest.mark.faults

HEAD = "f" * 51 + "00000"
LIVES = "ray.head.default"
IDLE_SECONDS = 6
LARGEST = "at its largest 2 nodes of cpu (2 CPUs)"


def config(gcs: str) -> dict[str, object]:
    """The content of a cluster.yaml, as `ray up` leaves it on the head."""
    provider = {
        "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD, "launch_multiple": True, "gcs_address": gcs,
    }  # fmt: skip
    types = {
        LIVES: {"resources": {}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    lists = ("head_setup_commands", "worker_setup_commands", "setup_commands", "initialization_commands")
    return {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": IDLE_SECONDS / 60, "provider": provider,
        "auth": {}, "head_node_type": LIVES, "available_node_types": types, "file_mounts": {}, "upscaling_speed": 1.0,
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], **{name: [] for name in lists},
    }  # fmt: skip


class Growing(NamedTuple):
    """A cluster that grows, its clients' environment, and a file to which a watcher writes how many nodes it has."""

    environment: dict[str, str]
    watched: Path

    def nodes(self) -> list[tuple[float, int]]:
        """Changes of the number of nodes besides the head: seconds and number."""
        return [(float(at), int(count)) for at, count in map(str.split, self.watched.read_text().splitlines())]

    def wait_until(self, holds: Callable[[int], bool], seconds: float = 90) -> None:
        """Wait until something holds for the number of nodes."""
        deadline = time.monotonic() + seconds
        while not holds(self.nodes()[-1][1]):
            assert time.monotonic() < deadline, self.nodes()
            time.sleep(0.2)

    @contextmanager
    def launch(self, corpus: Path, storage: Path, *settings: str) -> Iterator[subprocess.Popen[str]]:
        """`bwlm grid run` of two cells of one CPU, which is killed at the end, and after some minutes."""
        sets = [f"data.source={corpus}", "tokenizer.vocab_size=400", "axes.direction=[forward, backward]", *settings]
        words = [BIN / "bwlm", "grid", "run", ROOT / "grids/tiny.yaml", "--storage", storage]
        words += [word for one in sets for word in ("--set", one)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, env=self.environment, text=True, cwd=storage.parent, **pipes) as popen:
            late = threading.Timer(300, popen.kill)
            late.start()
            try:
                yield popen
            finally:
                late.cancel()
                popen.kill()


_WATCH = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
began, last = time.monotonic(), None
with open(sys.argv[2], "w", buffering=1) as watched:
    while True:
        count = sum(node["Alive"] for node in ray.nodes()) - 1
        if count != last:
            print(f"{time.monotonic() - began:.1f} {count}", file=watched)
            last = count
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def growing() -> Iterator[Growing]:
    folder = Path(tempfile.mkdtemp(prefix="bwa-", dir="/tmp"))
    gcs, dashboard, agent, client, metrics = free_ports(5)
    with_token = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE")} | {
        "RAY_AUTH_MODE": "token", "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=with_token, check=True, capture_output=True)
    (folder / "cluster.json").write_text(json.dumps(config(f"127.0.0.1:{gcs}")))
    environment = with_token | {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_NODE_TYPE_NAME": LIVES,
    }  # fmt: skip
    options = {
        "--num-cpus": 0, "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": folder,
        "--autoscaling-config": folder / "cluster.json",
    }  # fmt: skip
    head = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *(f"{k}={v}" for k, v in options.items()),
    ]
    address = f"127.0.0.1:{gcs}"
    watched = folder / "nodes"
    watch = [sys.executable, "-c", _WATCH, address, str(watched)]
    log = folder / "head.log"
    try:
        with (
            node_of(list(map(str, head)), environment, log, lambda: "Ray runtime started" in log.read_text()),
            node_of(watch, with_token, folder / "watch.log", lambda: watched.exists() and bool(watched.read_text())),
        ):
            yield Growing(with_token | {"RAY_ADDRESS": address}, watched)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_an_empty_head_gets_nodes_for_a_grid_and_none_after_it(growing: Growing, corpus: Path, tmp_path: Path) -> None:
    assert growing.nodes()[-1][1] == 0
    with growing.launch(corpus, tmp_path / "runs") as launch:
        out, told = launch.communicate()
    assert launch.returncode == 0, told[-3000:]
    waits = "warning: waiting for room for 2 cells of 1 CPU and a spare CPU: the autoscaler was asked for nodes"
    assert waits in told.splitlines(), told
    assert "2 cells at once" in told
    assert "2/2 tiny_" in told
    assert "too few seeds to tell" in out
    assert max(count for _, count in growing.nodes()) == 2, "two cells and a spare CPU need two nodes of two CPUs"
    growing.wait_until(lambda count: count == 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "resources.cpus_per_worker=3",
            f"a cell needs 3 CPUs, but the cluster, {LARGEST}, has room for 0 of its workers",
        ),
        ("resources.gpus_per_worker=1", f"a cell needs 1 CPU and 1 GPU, but the cluster, {LARGEST}, has room for 0"),
        ("resources.workers=8", f"a cell needs 8 workers of 1 CPU, but the cluster, {LARGEST}, has room for 4"),
        ("launch.concurrency=4", f"launch.concurrency: 4 cells at once, but the cluster, {LARGEST}, has room for 3"),
    ],
)
def test_what_no_node_type_can_hold_is_refused_at_once(
    growing: Growing, corpus: Path, tmp_path: Path, setting: str, message: str
) -> None:
    before = growing.nodes()
    more = ("axes.seed=[0, 1]",) if "concurrency" in setting else ()
    with growing.launch(corpus, tmp_path / "runs", setting, *more) as launch:
        _, told = launch.communicate()
    assert launch.returncode == 2, told
    assert message in told.splitlines()[-1]
    assert growing.nodes() == before, "no node was started for it"


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGTERM))],
)
def test_nodes_that_were_asked_for_go_with_the_launch(
    growing: Growing, corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed while one of its two nodes is there: a request that outlived it would bring the other, and keep both."""
    with growing.launch(corpus, tmp_path / "runs") as launch:
        assert launch.stderr is not None
        assert any("the autoscaler was asked for nodes" in line for line in launch.stderr)
        growing.wait_until(lambda count: count > 0)
        launch.send_signal(number)
        launch.communicate(timeout=60)
    assert launch.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    growing.wait_until(lambda count: count == 0)


def test_a_node_type_in_words() -> None:
    assert NodeType("gpu", {"CPU": 8, "GPU": 1, "memory": 10.0}, 4).words() == "4 nodes of gpu (8 CPUs and 1 GPU)"
    assert NodeType("cpu", {"CPU": 1}, 1).words() == "1 node of cpu (1 CPU)"
