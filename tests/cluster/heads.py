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


_ports = iter(range(21000 + os.getpid() * 211 % 10000, 32000))  # far from those of tests that run beside
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


class Node:
    """The processes of a node."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, is_up: Callable[[], bool]) -> None:
        """Start it, and wait until it is up; again if Ray gives up, as it does on a busy machine."""
        deadline = time.monotonic() + 300
        self._start(command, environment, log)
        try:
            while not is_up():
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                if self._node.poll() is not None:
                    assert "timed out during startup" in log.read_text(), log.read_text()[-2000:]
                    self._start(command, environment, log)
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    def _start(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as file:
            self._node = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    @property
    def pid(self) -> int:
        return self._node.pid

    def terminate(self) -> None:
        """SIGTERM to `ray start`, as a machine that is preempted sends it."""
        self._node.terminate()

    def processes(self) -> list[psutil.Process]:
        """All of them; none if the node has failed by itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [psutil.Process(self._node.pid), *psutil.Process(self._node.pid).children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL to each of them, as if the machine had lost its power."""
        reap(self.processes())
        self._node.wait()

    def stop(self) -> None:
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ends as its parent does
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        reap(alive)
        self._node.wait()


@contextlib.contextmanager
def node_of(command: list[str], environment: dict[str, str], log: Path, is_up: Callable[[], bool]) -> Iterator[Node]:
    """A node's processes, from when it is up until the end of the block."""
    node = Node(command, environment, log, is_up)
    try:
        yield node
    finally:
        node.stop()


class Head(NamedTuple):
    environment: dict[str, str]
    """The environment of a client that follows docs/cluster.md."""
    gcs: str
    dashboard: str
    port: int
    """Port that is kept for a server."""


def new_head(folder: Path, **besides: str) -> Head:
    """A head that is not started yet, on a machine that has no token yet; with ports and folders of its own.

    `besides` are further environment variables of it and its clients.
    """
    gcs, dashboard, port = free_ports(3)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE")}
    environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        **besides,
    }
    exported, make_token = documented("export RAY_AUTH_MODE=token", "ray get-auth-token")
    assert exported == "export RAY_AUTH_MODE=token"
    subprocess.run(shlex.split(make_token), env=environment, check=True, capture_output=True)
    return Head(environment, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", port)


def start_head(head: Head, cpus: int) -> Node:
    """Start it as docs/cluster.md does."""
    [start] = documented("ray start --head")
    gcs, dashboard = (int(address.rpartition(":")[2]) for address in (head.gcs, head.dashboard))
    agent, client, metrics = free_ports(3)
    folder = Path(head.environment["HOME"])
    options = {
        "--port": gcs, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client, "--metrics-export-port": metrics, "--temp-dir": folder, "--num-cpus": cpus,
    }  # fmt: skip
    command = [*shlex.split(start), "--block", "--disable-usage-stats", *(f"{k}={v}" for k, v in options.items())]
    environment = {k: v for k, v in head.environment.items() if k != "RAY_API_SERVER_ADDRESS"}
    return Node(command, environment, folder / "head.log", lambda: answers(dashboard))


@contextlib.contextmanager
def started_head(cpus: int, **besides: str) -> Iterator[Head]:
    """A head that runs until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="bwj-", dir="/tmp"))
    try:
        head = new_head(folder, **besides)
        node = start_head(head, cpus)
        try:
            yield head
        finally:
            node.stop()
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


def join_node(head: Head, log: Path, options: tuple[str, ...] = ("--num-cpus=1",), **environment: str) -> Node:
    """A node that has joined, with another environment."""
    start = shlex.split(documented("ray start --address")[0].replace("HEAD:6379", head.gcs))
    [metrics] = free_ports(1)
    command = [*start, "--block", "--disable-usage-stats", *options, f"--metrics-export-port={metrics}"]
    environment = {"RAY_raylet_start_wait_time_s": "150"} | environment  # the default is short on a busy machine
    return Node(command, head.environment | environment, log, lambda: "Ray runtime started" in log.read_text())


@contextlib.contextmanager
def second_node(
    head: Head, log: Path, options: tuple[str, ...] = ("--num-cpus=1",), **environment: str
) -> Iterator[Node]:
    """A node that has joined, until the end of the block."""
    node = join_node(head, log, options, **environment)
    try:
        yield node
    finally:
        node.stop()
