"""One head for all tests of jobs: as docs/cluster.md starts it, with ports and folders of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import BIN, Head, answers, documented, free_ports, node_of


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    """A head as docs/cluster.md starts one, on a machine that has no token yet; with ports and folders of its own."""
    folder = tempfile.mkdtemp(prefix="bwj-", dir="/tmp")
    gcs, dashboard, agent, client, metrics, port = free_ports(6)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE")}
    environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": folder,
        "OMP_NUM_THREADS": "1",
    }
    exported, make_token, start = documented("export RAY_AUTH_MODE=token", "ray get-auth-token", "ray start --head")
    assert exported == "export RAY_AUTH_MODE=token"
    subprocess.run(shlex.split(make_token), env=environment, check=True, capture_output=True)
    options = {
        "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": folder, "--num-cpus": 4,
    }  # fmt: skip
    command = [*shlex.split(start), "--block", "--disable-usage-stats", *(f"{k}={v}" for k, v in options.items())]
    try:
        with node_of(command, environment, Path(folder) / "head.log", lambda: answers(dashboard)):
            address = f"http://127.0.0.1:{dashboard}"
            yield Head(environment | {"RAY_API_SERVER_ADDRESS": address}, f"127.0.0.1:{gcs}", address, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
