"""Ray heads of their own for tests: ports, processes and the commands that docs/ names."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.grids import reap

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


_ports = iter(range(21000 + os.getpid() % 5000, 32000))
"""Ports outside 10002-19999, where Ray's workers listen; each is given out once, since its listener may start later."""


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port := next(_ports))) != 0:
                found.append(port)
    return found


def answers(dashboard: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError:  # it is there, and asks for the token
        return True
    except OSError:
        return False


def documented(*beginnings: str, page: str = "cluster.md") -> list[str]:
    """The first command of a page of docs/ that begins so, for each."""
    return [documented_lines(beginning, page)[0] for beginning in beginnings]


def documented_lines(beginning: str, page: str = "cluster.md") -> list[str]:
    """All commands of a page of docs/ that begin so."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith(beginning)]


@contextlib.contextmanager
def node_of(
    command: list[str], environment: dict[str, str], log: Path, is_up: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """A node's process with those below it, from when it is up until the end of the block."""
    with log.open("wb") as file:
        node = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    processes: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 180
        while not is_up():
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            assert node.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        yield node
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have failed by itself
            processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ends as its parent does
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        reap(alive)
        node.wait()


class Head(NamedTuple):
    environment: dict[str, str]
    """The environment of a client that follows docs/cluster.md."""
    gcs: str
    dashboard: str
    port: int
    """Port that is kept for a server."""


@contextlib.contextmanager
def started_head(cpus: int, **besides: str) -> Iterator[Head]:
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
        **besides,
    }
    exported, make_token, start = documented("export RAY_AUTH_MODE=token", "ray get-auth-token", "ray start --head")
    assert exported == "export RAY_AUTH_MODE=token"
    subprocess.run(shlex.split(make_token), env=environment, check=True, capture_output=True)
    options = {
        "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": folder, "--num-cpus": cpus,
    }  # fmt: skip
    command = [*shlex.split(start), "--block", "--disable-usage-stats", *(f"{k}={v}" for k, v in options.items())]
    try:
        with node_of(command, environment, Path(folder) / "head.log", lambda: answers(dashboard)):
            address = f"http://127.0.0.1:{dashboard}"
            yield Head(environment | {"RAY_API_SERVER_ADDRESS": address}, f"127.0.0.1:{gcs}", address, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    head: Head, storage: Path, *arguments: str, options: tuple[str, ...] = (), script: str = "jobs/run_grid.py"
) -> subprocess.CompletedProcess[str]:
    """The submit of docs/cluster.md with other arguments and storage, from the checkout."""
    [line] = {line for line in documented_lines("ray job submit --working-dir") if f" {script} " in line}
    words = shlex.split(line)
    end = words.index(script) + 1
    return ray_job(head, "submit", *options, *words[3:end], *arguments, "--storage", str(storage))


def ray_job(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "ray", "job", *arguments], cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=400
    )


@contextlib.contextmanager
def second_node(
    head: Head, log: Path, options: tuple[str, ...] = ("--num-cpus=1",), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A node that has joined, with another environment."""
    start = shlex.split(documented("ray start --address")[0].replace("HEAD:6379", head.gcs))
    [metrics] = free_ports(1)
    command = [*start, "--block", "--disable-usage-stats", *options, f"--metrics-export-port={metrics}"]
    patient = {"RAY_raylet_start_wait_time_s": "150"}  # the default is short on a busy machine
    environment = head.environment | patient | environment
    with node_of(command, environment, log, lambda: "Ray runtime started" in log.read_text()) as node:
        yield node
