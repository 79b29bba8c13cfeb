"""`bwlm serve` as a process: signals while streams run, and fifty clients for a minute."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import psutil
import pytest
from openai.types import Completion

from tests.runs import NewFamily

BWLM = Path(sys.executable).parent / "bwlm"
WAIT = 120.0
SECONDS, CLIENTS = 60.0, 50
FLAT = 32 * 2**20
"""Bytes by which a server may grow after its first seconds."""


class Process(NamedTuple):
    popen: subprocess.Popen[str]
    url: str


@contextmanager
def process(storage: Path, *options: str) -> Iterator[Process]:
    command = [str(BWLM), "serve", *options, "--port", "0", "--threads", "1", "--storage", str(storage)]
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert popen.stderr is not None
        told = next(line for line in popen.stderr if "serving" in line)
        found = re.search(r"http://\S+", told)
        assert found is not None
        yield Process(popen, found[0])
    finally:
        popen.kill()
        popen.wait()
        assert popen.stderr is not None
        popen.stderr.close()


def long_stream(server: Process, model: str) -> openai.Stream[Completion]:
    """A stream of sixteen texts, one after the other in one slot, of which the first has begun."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model=model, prompt="river", n=16, max_tokens=60, stream=True, temperature=0)
    next(iter(stream))
    return stream


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_streams_end(number: signal.Signals, code: int, trained_base: NewFamily) -> None:
    run = trained_base("backward")
    with process(run.path.parent, run.id, "--slots", "1") as server:
        stream = long_stream(server, run.id)
        server.popen.send_signal(number)
        ends = Counter(chunk.choices[0].finish_reason for chunk in stream)
        assert sum(ends[reason] for reason in ("stop", "length")) == 16, "all came to their ends"
        assert server.popen.wait(WAIT) == code
        assert server.popen.stderr is not None
        told = server.popen.stderr.read()
        assert "Traceback" not in told
        assert "resume" not in told, "a server has nothing to resume"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_stream_that_takes_longer_than_the_grace_ends_with_an_error(trained_base: NewFamily) -> None:
    run = trained_base("forward")
    with process(run.path.parent, run.id, "--slots", "1", "--grace", "0") as server:
        stream = long_stream(server, run.id)
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server stops"):
            list(stream)
        assert server.popen.wait(WAIT) == 143


def test_a_compiled_server_writes_what_another_does(trained_base: NewFamily) -> None:
    run, written = trained_base("bidirectional"), []
    for options in ([], ["--compile"]):
        with process(run.path.parent, run.id, *options) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            texts = [
                client.completions.create(
                    model=f"{run.id}:{reading}", prompt="river", max_tokens=40, logprobs=1, seed=1
                )
                for reading in ("forward", "backward")
            ]
            written.append([text.choices[0] for text in texts])
    for plain, compiled in zip(*written, strict=True):
        assert plain.logprobs is not None
        assert compiled.logprobs is not None
        assert compiled.text == plain.text
        assert compiled.logprobs.token_logprobs == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
        assert len(compiled.logprobs.token_logprobs or []) > 10


class Load:
    """Clients that ask again and again, and what they were told."""

    def __init__(self, server: Process, model: str) -> None:
        self.url, self.model, self.pid = server.url, model, server.popen.pid
        self.asked = [(words, seed) for words in ("river", "the stone", "東京 window", "") for seed in range(6)]
        self.alone: dict[tuple[str, int], str] = {}
        self.statuses: Counter[int] = Counter()
        self.same = self.other = self.left = 0

    async def text(self, http: httpx.AsyncClient, words: str, seed: int) -> str | None:
        """The text for a prompt; None if the server was too busy."""
        body = {"model": self.model, "prompt": words, "seed": seed, "max_tokens": 30}
        answer = await http.post(f"{self.url}/v1/completions", json=body)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 5
            return None
        text: str = answer.json()["choices"][0]["text"]
        return text

    async def leave(self, http: httpx.AsyncClient, words: str) -> None:
        """Ask for a stream, and go after its first line."""
        body = {"model": self.model, "prompt": words, "max_tokens": 60, "stream": True}
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            self.statuses[answer.status_code] += 1
            async for _ in answer.aiter_lines():
                self.left += 1
                return

    async def client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            words, seed = rng.choice(self.asked)
            if rng.random() < 0.1:
                await self.leave(http, words)
                continue
            text = await self.text(http, words, seed)
            if text is None:
                await asyncio.sleep(rng.random())  # sooner than it was told, so that it is pressed
            elif text == self.alone[words, seed]:
                self.same += 1
            else:
                self.other += 1

    async def run(self) -> list[int]:
        """Ask one after the other, then all at once; return the server's memory, second by second."""
        memory = []
        async with httpx.AsyncClient(timeout=WAIT, limits=httpx.Limits(max_connections=CLIENTS)) as http:
            for words, seed in self.asked:
                self.alone[words, seed] = await self.text(http, words, seed) or ""
            end = time.monotonic() + SECONDS
            clients = [asyncio.create_task(self.client(http, number, end)) for number in range(CLIENTS)]
            while time.monotonic() < end:
                memory.append(psutil.Process(self.pid).memory_info().rss)
                await asyncio.sleep(1)
            await asyncio.gather(*clients)
        return memory


def test_fifty_clients_for_a_minute(trained_base: NewFamily) -> None:
    """No error but 429, memory that stays, and every answer as alone, but for draws that rounding decides."""
    run = trained_base("backward")
    with process(run.path.parent, run.id, "--slots", "8", "--waiting", "16") as server:
        load = Load(server, run.id)
        memory = asyncio.run(load.run())
        figures = f"{load.statuses}, {load.same} same, {load.other} other, {load.left} left, memory {memory[::10]}"
        print(figures)
        assert set(load.statuses) == {200, 429}, figures
        assert load.left > 50, figures
        assert load.other < 0.01 * load.same, figures
        assert max(memory) - memory[10] < FLAT, figures
        told = httpx.get(f"{server.url}/stats").json()["models"][0]
        assert (told["running"], told["waiting"]) == (0, 0), "all slots are free"
