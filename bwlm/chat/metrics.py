"""Figures of a server that runs: for a person as JSON, for Prometheus as text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bwlm.chat.engine import Event
from bwlm.chat.served import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """Counts of responses and times of texts, and the figures of each model's engine."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "bwlm_responses", "Responses by path and status.", ["path", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "bwlm_time_to_first_token_seconds", "From a request to its first token.", ["model"],
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self.whole = Histogram(
            "bwlm_request_seconds", "From a request to its last token.", ["model"],
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._registry.register(_Engines(models))

    def count(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    async def timed(self, model: ServedModel, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        """Yield events, and note the times of the first and the last one."""
        began = time.perf_counter()
        is_first = True
        async with aclosing(events):
            async for event in events:
                if is_first:
                    self.first_token.labels(model.name).observe(time.perf_counter() - began)
                    is_first = False
                yield event
        self.whole.labels(model.name).observe(time.perf_counter() - began)

    def exposition(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def stats(self) -> dict[str, Any]:
        """Return the figures as `/stats` gives them."""
        samples = next(iter(self._responses.collect())).samples
        counts: dict[str, int] = {}
        for sample in samples:
            if sample.name.endswith("_total"):
                status = sample.labels["status"]
                counts[status] = counts.get(status, 0) + int(sample.value)
        return {"responses": counts, "models": [_figures(model) for model in self._models]}


def _figures(model: ServedModel) -> dict[str, Any]:
    engine, service = model.engine, model.running()
    return {
        "id": model.name,
        "slots": engine.slots,
        "running": engine.running,
        "waiting": max(0, service.live - engine.running),
        "prompt_tokens": engine.prompt_ids,
        "reused_prompt_tokens": engine.reused_ids,
        "prefix_reuse": engine.reused_ids / engine.prompt_ids if engine.prompt_ids else 0.0,
        "generated_tokens": engine.generated_ids,
        "busy_seconds": service.busy_seconds,
        "tokens_per_second": engine.generated_ids / service.busy_seconds if service.busy_seconds else 0.0,
    }


_GAUGES = {"slots": "Slots.", "running": "Requests that have a slot.", "waiting": "Requests that wait for one."}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_prompt_tokens": "Tokens of prompts that were not read again.",
    "generated_tokens": "Tokens that were generated.",
    "busy_seconds": "Seconds that the engine worked.",
}


class _Engines(Collector):
    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Yield the figures of the engines."""
        figures = [_figures(model) for model in self._models if model.service is not None]
        for kind, named in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, told in named.items():
                family = kind(f"bwlm_{name}", told, labels=["model"])
                for one in figures:
                    family.add_metric([one["id"]], one[name])
                yield family


class Counted:
    """ASGI middleware that counts the responses; paths that are no endpoint are counted together."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and count its response."""

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        is_counted = False

        async def counted(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                is_counted = True
                self.metrics.count(path, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            if not is_counted:  # the response to it is sent outside of this middleware
                self.metrics.count(path, 500)
            raise
