"""A grid on a cluster of two nodes that share nothing but the bucket: a head without CPUs, and a node that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bwlm.record.experiment import ExperimentFolder
from bwlm.storage.folder import bucket_at
from bwlm.storage.opened import open_storage
from tests.cluster.heads import answers, free_ports, node_of
from tests.grids import BWLM, GridFile
from tests.mlflow_server import free_port, server
from tests.s3_server import BUCKET, CREDENTIALS

pytestmark = pytest.mark.faults
RAY = str(Path(sys.executable).parent / "ray")
ADDRESS = f"s3://{BUCKET}/two-nodes"


@pytest.fixture
def head(s3: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a driver on the head."""
    with tempfile.TemporaryDirectory(prefix="bwn-", dir="/tmp", ignore_cleanup_errors=True) as home:
        gcs, dashboard, agent, client, metrics = free_ports(5)
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE")}
        environment |= CREDENTIALS | {
            "AWS_ENDPOINT_URL": s3, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "HOME": home,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        options = {
            "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
            "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": home, "--num-cpus": 0,
        }  # fmt: skip
        start = [RAY, "start", "--block", "--disable-usage-stats"]
        first = [*start, "--head", *(f"{name}={value}" for name, value in options.items())]
        second = [*start, f"--address=127.0.0.1:{gcs}", "--num-cpus=3"]
        here, there = (environment | {"BWLM_SCRATCH": str(tmp_path / name)} for name in ("head", "node"))
        joined = tmp_path / "node.log"
        with (
            node_of(first, here, tmp_path / "head.log", lambda: answers(dashboard)),
            node_of(second, there, joined, lambda: "Ray runtime started" in joined.read_text()),
        ):
            yield here | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}


def test_nodes_share_the_bucket_alone(
    head: dict[str, str], grid_file: GridFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(tmp_path, free_port()) as tracking:
        done = subprocess.run(
            [BWLM, "grid", "run", grid_file(), "--storage", ADDRESS], env=head | {"MLFLOW_TRACKING_URI": tracking},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(
        [BWLM, "doctor", "--cluster", "--storage", ADDRESS, "--json"], env=head, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(checked.stdout)["checks"]}
    assert checks["nodes"]["found"].startswith("2 nodes")
    assert checks["storage"] == {
        "name": "storage", "is_ok": True, "found": f"{ADDRESS} is read and written by every node", "fix": "",
    }  # fmt: skip
    weights = {place: len(list((tmp_path / place).rglob("model.safetensors"))) for place in ("head", "node")}
    assert weights == {"head": 0, "node": 4}  # it trained there: two checkpoints of each cell stay
    for place in ("head", "node"):  # packed by the head, streamed by the node
        assert list((tmp_path / place).rglob("cache/packed/*/train/*.arrow"))
    for name, value in head.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / "reader"))
    bucket_at.cache_clear()
    storage = open_storage(ADDRESS)
    for direction in ("forward", "backward"):
        folder = ExperimentFolder(storage, f"g_{direction}_d1_lr1_s0")
        assert folder.status().state == "finished"
        assert not folder.damage()
