"""`bwlm serve --replicas`: the server on Ray Serve, under load, with clients that leave and a replica that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest

from bwlm.record.experiment import ExperimentFolder
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.chat.serving import WAIT
from tests.cluster.heads import free_ports
from tests.grids import reap
from tests.runs import in_process, make_run

BWLM = Path(sys.executable).parent / "bwlm"
TOKEN = "a token"
LONG = {"prompt": "river", "n": 16, "max_tokens": 60, "temperature": 0}
"""Sixteen texts, one after the other in the one slot of a replica, whose places they all take."""
REPLICA = "ray::ServeReplica:bwlm:bwlm"


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> ExperimentFolder:
    """A model of many layers, so that each step takes some time."""
    settings = {"depth": 8, "budget__steps": 1, "direction": "backward"}
    folder = make_run(prepared, tmp_path_factory.mktemp("replicas"), "deep", **settings)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    return folder


class Replicas(NamedTuple):
    popen: subprocess.Popen[str]
    url: str
    model: str

    def client(self) -> openai.OpenAI:
        """The real client, which tries again after 429 and 500 as it does by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, timeout=WAIT)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=WAIT)

    def body(self, **settings: Any) -> dict[str, Any]:
        return {"model": self.model, **LONG, **settings}

    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of each replica that answers one of some requests."""
        with self.http() as http:
            answers = [http.get("/stats") for _ in range(20)]
        return {answer.headers["x-bwlm-replica"]: answer.json()["models"][0] for answer in answers}

    def until(self, holds: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
        """Wait for a condition on the figures of all replicas, and return them."""
        deadline = time.monotonic() + 3 * WAIT
        while not holds(figures := self.figures()):
            assert time.monotonic() < deadline, figures
        return figures

    def pids(self) -> list[int]:
        below = psutil.Process(self.popen.pid).children(recursive=True)
        return [process.pid for process in below if process.name() == REPLICA]


@contextmanager
def serving(storage: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [str(BWLM), "serve", *options, "--storage", str(storage), "--threads", "1", "--token", TOKEN]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield popen
    finally:
        assert popen.stderr is not None
        try:
            below = psutil.Process(popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        popen.kill()
        popen.wait()
        reap(below)
        popen.stderr.close()


@pytest.fixture(scope="module")
def replicas(run: ExperimentFolder) -> Iterator[Replicas]:
    """One replica, pressed until there is a second."""
    [port] = free_ports(1)
    options = ("--replicas", "1:2", "--port", str(port), "--slots", "1", "--waiting", "15", "--grace", str(int(WAIT)))
    with serving(run.path.parent, run.id, *options) as popen:
        assert popen.stderr is not None
        told = next(line for line in popen.stderr if "serving" in line)
        assert f"http://127.0.0.1:{port}" in told
        replicas = Replicas(popen, f"http://127.0.0.1:{port}", run.id)
        assert len(replicas.figures()) == 1
        asyncio.run(press(replicas, 8, lambda: len(replicas.pids()) == 2))
        replicas.until(lambda figures: len(figures) == 2)
        yield replicas


async def press(replicas: Replicas, clients: int, is_over: Callable[[], bool]) -> Counter[int]:
    """Ask for texts, again and again, until a condition holds; return the statuses."""
    statuses: Counter[int] = Counter()
    deadline = time.monotonic() + 3 * WAIT

    async def client(http: httpx.AsyncClient) -> None:
        while not is_over():
            assert time.monotonic() < deadline, statuses
            answer = await http.post("/v1/completions", json=replicas.body(n=1))
            statuses[answer.status_code] += 1

    async with httpx.AsyncClient(base_url=replicas.url, headers={"authorization": f"Bearer {TOKEN}"}) as http:
        http.timeout = httpx.Timeout(WAIT)
        await asyncio.gather(*[client(http) for _ in range(clients)])
    return statuses


def test_openais_client_is_answered_by_both_replicas_alike(replicas: Replicas) -> None:
    client = replicas.client()
    asked: dict[str, Any] = {"model": f"{replicas.model}:backward", "prompt": "river", "max_tokens": 30, "seed": 5}
    texts: dict[str, set[str]] = {}
    while len(texts) < 2:
        answer = client.completions.with_raw_response.create(**asked)
        texts.setdefault(answer.headers["x-bwlm-replica"], set()).add(answer.parse().choices[0].text)
    assert len(set.union(*texts.values())) == 1

    grown = whole = ""
    for chunk in client.completions.create(**asked, stream=True):
        grown = getattr(chunk.choices[0], "prepend", "") + grown
        whole += chunk.choices[0].text
    assert {grown, whole} == set.union(*texts.values())
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.completions.create(**asked | {"model": "other"})


def test_who_may_ask_is_checked_behind_the_proxy(replicas: Replicas) -> None:
    with replicas.http() as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 401
        assert http.get("/v1/models", headers={"host": "elsewhere.example"}).status_code == 421
        assert http.get("/v1/models", headers={"origin": "http://elsewhere.example"}).status_code == 403
        assert "default-src 'none'" in http.get("/").headers["content-security-policy"]


def test_a_stream_comes_as_it_grows_and_a_client_that_leaves_frees_its_slot(replicas: Replicas) -> None:
    """One stream from each replica: a replica that is busier than the other is not asked for its figures."""
    before = replicas.until(are_idle)
    lines: dict[str, Iterator[str]] = {}  # httpx leaves once nobody holds them
    with replicas.http() as http, ExitStack() as streams:
        while len(lines) < 2:
            answer = streams.enter_context(http.stream("POST", "/v1/completions", json=replicas.body(stream=True)))
            if answer.status_code == 200:
                lines[answer.headers["x-bwlm-replica"]] = answer.iter_lines()
                next(lines[answer.headers["x-bwlm-replica"]])
        replicas.until(are_busy)  # so the first line came before the last token
    after = replicas.until(are_idle)
    for replica, figures in after.items():
        written = figures["generated_tokens"] - before[replica]["generated_tokens"]
        assert 0 < written < LONG["n"] * LONG["max_tokens"], "the rest was not written"


def are_busy(figures: dict[str, dict[str, Any]]) -> bool:
    return len(figures) == 2 and all(one["running"] == 1 and one["waiting"] > 0 for one in figures.values())


def are_idle(figures: dict[str, dict[str, Any]]) -> bool:
    return len(figures) == 2 and all((one["running"], one["waiting"]) == (0, 0) for one in figures.values())


def test_a_full_server_says_429_and_when_to_try_again(replicas: Replicas) -> None:
    async def all_at_once() -> list[httpx.Response]:
        limits, headers = httpx.Limits(max_connections=None), {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=replicas.url, headers=headers, timeout=WAIT, limits=limits) as http:
            asked = [http.post("/v1/completions", json=replicas.body(n=1)) for _ in range(300)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(all_at_once())
    assert {answer.status_code for answer in answers} == {200, 429}, "never 503"
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.json()["error"]["type"] for answer in refused} == {"rate_limit_error"}
    assert {int(answer.headers["retry-after"]) for answer in refused} <= {1, 2, 3, 4, 5}
    served = Counter(answer.headers["x-bwlm-replica"] for answer in answers if answer.status_code == 200)
    assert len(served) == 2
    assert sum(served.values()) >= 2 * 16, "every place of both replicas was taken"


def test_a_replica_that_dies_is_replaced_and_the_other_serves_on(replicas: Replicas) -> None:
    before = replicas.until(are_idle).keys()
    psutil.Process(replicas.pids()[0]).kill()
    client = replicas.client()
    seen: set[str] = set()
    while len(seen | before) < 3:
        answer = client.completions.with_raw_response.create(model=replicas.model, prompt="river", max_tokens=2)
        seen.add(answer.headers["x-bwlm-replica"])
    assert len(seen & before) == 1, "the other one"
    replicas.until(are_idle)


def test_a_signal_lets_streams_end_and_leaves_no_process(replicas: Replicas) -> None:
    below = psutil.Process(replicas.popen.pid).children(recursive=True)
    body = replicas.body(n=4, stream=True)
    with replicas.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        replicas.popen.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert replicas.popen.wait(WAIT) == 128 + signal.SIGTERM
    assert psutil.wait_procs(below, timeout=WAIT)[1] == []


def told_by(run: ExperimentFolder, *options: str) -> str:
    """The last line of a server that does not start."""
    with serving(run.path.parent, run.id, *options) as popen:
        assert popen.stderr is not None
        said = popen.stderr.read().splitlines()
        assert popen.wait(WAIT) == 2
        assert not [line for line in said if "Traceback" in line]
        return said[-1]


def test_a_missing_package_is_named(run: ExperimentFolder) -> None:
    """Without `ray[serve]` Ray itself fails with a trace."""
    without = "import sys; sys.modules['grpc_reflection'] = None; from bwlm.cli import main; main()"
    command = [sys.executable, "-c", without, "serve", run.id, "--replicas", "1", "--storage", str(run.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "bwlm: bwlm serve needs the package grpc_reflection: pip install 'bwlm[serve]'"
    )


def test_replicas_that_cannot_start_say_why_in_a_line(run: ExperimentFolder) -> None:
    [port] = free_ports(1)
    cores = len(os.sched_getaffinity(0))
    told = told_by(run, "--port", str(port), "--replicas", "1000")
    assert told.startswith(f"bwlm: --replicas 1000: each needs 1 CPUs and 0 GPUs, and the cluster has room for {cores}")

    with socket.create_server(("127.0.0.1", port)):
        told = told_by(run, "--port", str(port), "--replicas", "1")
    assert told.startswith(f"bwlm: --port {port}: Failed to bind to address '127.0.0.1:{port}' on the head")

    [weights] = (run.checkpoints / "step_000001").glob("model.*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    try:
        told = told_by(run, "--port", str(port), "--replicas", "1")
    finally:
        weights.write_bytes(content)
    assert told.startswith(f"bwlm: no replica started: {weights}: damaged")
