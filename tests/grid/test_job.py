"""`ray job submit` against a real head node: logs a person can read, an exit status a script can trust."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.journal import last_entry
from bwlm.record.lineage import ExperimentFolder
from tests.grid.conftest import reap

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Free ports outside 10002-19999, where Ray's workers listen."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head node with ports and a temporary folder of its own; gives the environment of a client."""
    folder = tempfile.mkdtemp(prefix="bwj-", dir="/tmp")
    gcs, dashboard, agent, client, metrics = free_ports(5)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE")}
    environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": folder,
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": folder, "--num-cpus": 4,
    }  # fmt: skip
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *(f"{k}={v}" for k, v in options.items()),
    ]
    with (Path(folder) / "head.log").open("wb") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{dashboard}/api/version"):
            assert time.monotonic() < deadline, (Path(folder) / "head.log").read_text()[-2000:]
            time.sleep(0.2)
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ends as its parent does
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        reap(alive)
        node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    environment: dict[str, str], storage: Path, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """From a copy of the checkout without caches, as a user's clone is."""
    job = ["python", "jobs/run_grid.py", *arguments, "--storage", str(storage)]
    return ray_job(environment, "submit", *options, "--working-dir", ".", "--", *job)


def ray_job(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "ray", "job", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def test_a_submitted_grid_runs_and_reports(head: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    source = f"data.source={corpus}"
    small = ["--set", source, "--set", "tokenizer.vocab_size=400", "--set", "axes.direction=[forward, backward]"]
    done = submit(head, tmp_path / "storage", "grids/tiny.yaml", *small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"storage: {tmp_path / 'storage'}" in done.stdout
    assert "2/2 tiny_" in done.stdout
    assert "too few seeds to tell" in done.stdout
    assert "Traceback" not in done.stdout
    assert (tmp_path / "storage" / "grids" / "tiny" / "RESEARCH_REPORT.md").exists()

    wrong = submit(head, tmp_path / "storage", "grids/tiny.yaml", "--set", "model.sequence_lenght=3")
    assert wrong.returncode != 0
    assert "did you mean 'sequence_length'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout


@pytest.mark.slow
def test_a_stopped_job_saves_its_cells(head: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    settings = [f"data.source={corpus}", "tokenizer.vocab_size=400", "axes.direction=[forward]", "budget.steps=100000"]
    patient = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'
    options = ("--no-wait", "--submission-id", "stopped", "--runtime-env-json", patient)
    arguments = [word for setting in [*settings, "checkpoint.every=0"] for word in ("--set", setting)]
    submitted = submit(head, tmp_path / "storage", "grids/tiny.yaml", *arguments, options=options)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    folder = ExperimentFolder(tmp_path / "storage", "tiny_forward_d1_lr1_s0")
    deadline = time.monotonic() + 400
    while (entry := last_entry(folder.path)) is None or entry.step < 5:
        assert time.monotonic() < deadline, ray_job(head, "logs", "stopped").stdout[-3000:]
        time.sleep(0.1)
    ray_job(head, "stop", "stopped")
    assert "bwlm: asked to end; the same command goes on" in ray_job(head, "logs", "stopped").stdout
    status = folder.status()
    assert (status.state, status.reason) == ("stopped", "")
    assert checkpoint_steps(folder.checkpoints) == [status.step]
