"""A server on a port of its own, with tiny models that nobody trained, whose steps a test may hold up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import torch
import uvicorn
from fastapi import FastAPI

from bwlm.chat import engine as engine_module
from bwlm.chat.access import LOCAL
from bwlm.chat.dialogue import Voice
from bwlm.chat.engine import Engine, Event
from bwlm.chat.served import ServedModel
from bwlm.chat.server import build_app, server_config
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.text.tokenizer import Tokenizer

LENGTH = 128
WAIT = 60.0
"""Most seconds until a condition holds."""

VOICES = {
    "forward": Voice("forward", "whole", True),
    "backward": Voice("backward", "whole", True),
    "both": Voice("bidirectional", "whole", True),
    "answers": Voice("bidirectional", "turns", False),
    "asks": Voice("backward", "whole", False),
}
"""Voices by the names of their models."""


class Gate:
    """Gate that an engine passes before each step: open, or open for some steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: float = float("inf")
        self.steps = 0

    def close(self) -> None:
        """Let no further step begin."""
        self.let(0)

    def open(self) -> None:
        """Let all steps begin."""
        self.let(float("inf"))

    def let(self, steps: float) -> None:
        """Let this many further steps begin."""
        with self._changed:
            self._left = steps
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Wait until a step may begin."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._left > 0, 10 * WAIT), "the gate stayed closed"
            self._left -= 1
            self.steps += 1


class GatedEngine(Engine):
    """Engine whose steps pass a gate; `failure`, if set, is raised by the next one that has work."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = Gate()
        self.failure: Exception | None = None

    def step(self) -> list[Event]:
        self.gate.pass_through()
        if self.failure is not None and (self.running or self.queued):
            failure, self.failure = self.failure, None
            raise failure
        return super().step()


def tiny_model(tokenizer: Tokenizer, seed: int = 0) -> GPT:
    """A model of one layer with weights at random: it prefers some tokens, for no reason."""
    model = GPT(GPTConfig(tokenizer.vocab_size, depth=1, width=32, heads=2, kv_heads=2, sequence_length=LENGTH))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def served(name: str, voice: Voice, tokenizer: Tokenizer, slots: int = 4, waiting: int = 32) -> ServedModel:
    engine = GatedEngine(tiny_model(tokenizer), slots, waiting)
    about = {"direction": voice.direction, "readings": list(voice.readings), "created": 0}
    return ServedModel(name, voice, tokenizer, engine, about)


@dataclass
class Server:
    """A server that runs, and its clients."""

    app: FastAPI
    port: int
    models: dict[str, ServedModel]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        """The real client; it tries once unless told otherwise."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": WAIT} | options
        )

    def post(self, path: str, content: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=content, timeout=WAIT, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT, **options)

    def engine(self, name: str) -> GatedEngine:
        engine = self.models[name].engine
        assert isinstance(engine, GatedEngine)
        return engine


@contextmanager
def running(models: Sequence[ServedModel], **settings: Any) -> Iterator[Server]:
    """Runs a server in a thread."""
    app = build_app(models, settings.pop("access", LOCAL), **settings)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, 5))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Server(app, listening.getsockname()[1], {model.name: model for model in models})
    finally:
        for model in models:
            if isinstance(model.engine, GatedEngine):
                model.engine.gate.open()
        server.should_exit = True
        thread.join(WAIT)
        listening.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition."""
    for _ in range(int(WAIT / 0.005)):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("the condition never held")


@contextmanager
def saying(ids: Sequence[int], monkeypatch: Any) -> Iterator[None]:
    """Lets every model say these ids, over and over, wherever its prompt ends."""
    begun: dict[int, int] = {}

    def scripted(logits: Any, sampling: Any, randoms: Sequence[Any], rows: Sequence[Sequence[int]] = ()) -> list[int]:
        chosen = []
        for random in randoms:  # each request has its own
            place = begun.get(id(random), 0)
            begun[id(random)] = place + 1
            chosen.append(ids[place % len(ids)])
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "choose", scripted)
        yield
