"""The endpoints: each takes a checked request, asks a model, and answers.

A request is checked whole before a model is asked. An error before the first token has a status of its own; after it
the stream ends with an error object. A client that leaves frees its slot.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bwlm.chat.answer import Answer
from bwlm.chat.dialogue import prompt_room
from bwlm.chat.engine import Event
from bwlm.chat.engine import Request as EngineRequest
from bwlm.chat.infill import Infill
from bwlm.chat.metrics import CONTENT_TYPE, ServerMetrics
from bwlm.chat.protocol import ChatRequest, CompletionRequest, InfillRequest, RerankRequest
from bwlm.chat.rerank import rank, results
from bwlm.chat.served import ServedModel, find
from bwlm.chat.wire import ChatWire, CompletionWire, Wire, error_object, to_line
from bwlm.errors import BwlmError, UserError

log = logging.getLogger(__name__)
router = APIRouter()
_T = TypeVar("_T")
Events = Mapping[str, list[Event]]
"""Events that the engine brought, by request."""
FAILED = "the model failed: see the server's log"


class Stopping(BwlmError):
    """The server is about to end."""


class ClientLeft(Exception):
    """The client closed its connection: nobody waits for the answer."""


@dataclass
class Hub:
    """State that the endpoints share."""

    models: Sequence[ServedModel]
    seconds: float
    """Longest time of a request."""
    metrics: ServerMetrics
    stopping: bool = False

    def stop(self) -> None:
        """Take no new requests; those that run go on."""
        self.stopping = True

    def end_streams(self) -> None:
        """End the requests that still run, each with an error."""
        for model in self.models:
            model.running().end_all(Stopping("the server stops"))

    @property
    def retry_after(self) -> int:
        """Seconds after which a client may try again: the longer, the more requests wait."""
        rounds = [model.engine.queued // model.engine.slots for model in self.models]
        return min(5, 1 + max(rounds))


def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON; text stays readable."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, status, headers, "application/json")


# ---- what is told ----


@router.get("/health")
async def health(request: Request) -> Response:
    """Tell whether requests are taken."""
    return as_json({"status": "stopping"}, 503) if _hub(request).stopping else as_json({"status": "ok"})


@router.get("/stats")
async def stats(request: Request) -> Response:
    """Tell how busy the models are, and how fast."""
    return as_json(_hub(request).metrics.stats())


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Give the figures to Prometheus."""
    return Response(_hub(request).metrics.exposition(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models in OpenAI's form."""
    return as_json({"object": "list", "data": [model.as_object() for model in _hub(request).models]})


@router.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str) -> Response:
    """Tell about one model in OpenAI's form."""
    return as_json(find(_hub(request).models, name, None)[0].as_object())


@router.get("/model_info")
async def model_info(request: Request, model: str | None = None) -> Response:
    """Tell about a model, the first one unless it is named."""
    return as_json(find(_hub(request).models, model, None)[0].as_object())


# ---- what is written ----


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Write the next message of a talk."""
    model, reading = find(_hub(request).models, body.model, body.direction)
    limit = model.limit(body)
    dialogue = model.dialogue(body.messages, reading)
    reading = dialogue.turns[-1].reading
    prompt, dropped = dialogue.prompt(prompt_room(model.context, limit))
    logprobs = body.top_logprobs if body.logprobs else None
    answers = model.answers(body, limit, prompt, reading, range(body.n), logprobs)
    wire = ChatWire(
        model=body.model or model.name,
        direction=reading,
        rendered_as=model.rendered_as,
        dropped=dropped,
        prompt_tokens=len(prompt.ids),
        tokenizer=model.tokenizer,
        answers=answers,
        logprobs=body.logprobs,
        include_usage=body.stream_options.include_usage,
    )
    return await _write(request, model, wire, body.stream)


@router.post("/v1/completions")
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Go on with texts, or score them."""
    model, reading = find(_hub(request).models, body.model, body.direction)
    limit = model.limit(body)
    scored = body.logprobs is not None
    if body.stream and body.echo and scored:
        raise UserError("stream: log-probabilities of an echoed prompt come in one piece: leave stream out")
    answers: list[Answer] = []
    prompt_tokens = dropped = 0
    for text in body.prompt:
        fitted = model.document(text, reading, prompt_room(model.context, limit))
        indices = range(len(answers), len(answers) + body.n)
        echo = model.echo(text, reading, fitted) if body.echo else None
        answers += model.answers(body, limit, fitted.prompt, reading, indices, body.logprobs, echo)
        prompt_tokens += len(fitted.prompt.ids)
        dropped += fitted.dropped
    wire = CompletionWire(
        model=body.model or model.name,
        direction=reading,
        rendered_as="document",
        dropped=dropped,
        prompt_tokens=prompt_tokens,
        tokenizer=model.tokenizer,
        answers=answers,
        logprobs=scored,
        include_usage=body.stream_options.include_usage,
    )
    return await _write(request, model, wire, body.stream)


@router.post("/v1/rerank")
@router.post("/v2/rerank")
@router.post("/rerank")
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Order documents by how well a query follows from them."""
    model, reading = find(_hub(request).models, body.model, body.direction)
    ranking = rank(model, reading, body.query, body.documents)
    # one after the other: reading is not faster at once, and others get their turn
    events = await _all_events(request, model, ranking.requests, at_once=1)
    scores = [ranking.score(events[one.id][-1]) for one in ranking.requests]
    most = body.top_n or len(scores)
    tokens = sum(len(one.ids) for one in ranking.requests)
    return as_json(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model or model.name,
            "direction": reading,
            "rendered_as": "conversation" if model.voice.manner(reading) == "asks" else "document",
            "results": results(scores, ranking.query_ids, body.documents, most, body.return_documents),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


@router.post("/infill")
async def infill(request: Request, body: InfillRequest) -> Response:
    """Write the middle of a text from both sides, and return the text that makes the whole likeliest."""
    model, _ = find(_hub(request).models, body.model, None)
    task = Infill(model, body)
    middles = task.ranked(await _all_events(request, model, task.writing, then=task.scoring))
    return as_json(
        {
            "content": middles[0]["content"],
            "model": body.model or model.name,
            "stop": True,
            "tokens_predicted": len(task.writing) * body.n_predict,
            "tokens_evaluated": sum(len(one.ids) for one in task.writing),
            "dropped": task.left_out,
            "candidates": middles,
        }
    )


async def _all_events(
    request: Request,
    model: ServedModel,
    requests: Sequence[EngineRequest],
    at_once: int | None = None,
    then: Callable[[Events], Sequence[EngineRequest]] | None = None,
) -> Events:
    """Return all that the engine brought, by request. `then` returns what follows, from what was brought before."""
    events: Events = defaultdict(list)

    async def collect(stream: AsyncGenerator[Event]) -> None:
        async with aclosing(stream):
            async for event in stream:
                events[event.request].append(event)

    after = None if then is None else partial(then, events)
    await while_connected(request, collect(_begin(request, model, requests, at_once, after)))
    return events


def _begin(
    request: Request,
    model: ServedModel,
    requests: Sequence[EngineRequest],
    at_once: int | None = None,
    then: Callable[[], Sequence[EngineRequest]] | None = None,
) -> AsyncGenerator[Event]:
    """Return what the engine will bring. Raises `Stopping` if no requests are taken any more."""
    hub = _hub(request)
    if hub.stopping:
        raise Stopping("the server stops")
    stream = model.running().stream(*requests, at_once=at_once, seconds=hub.seconds, then=then)
    return hub.metrics.timed(model, stream)


async def _write(request: Request, model: ServedModel, wire: Wire, streamed: bool) -> Response:
    """Let the model write, and return the whole response, or a stream that has had its first event."""
    events = _begin(request, model, [answer.request for answer in wire.answers])
    if streamed:
        first = await while_connected(request, anext(events))
        # the model's own time is over before the client's
        return EventStream(_closed_by_error(wire.lines(_after(first, events))), events, 2 * _hub(request).seconds)
    await while_connected(request, _collect(wire, events))
    return as_json(wire.response())


async def _collect(wire: Wire, events: AsyncGenerator[Event]) -> None:
    answers = {answer.request.id: answer for answer in wire.answers}
    async with aclosing(events):
        async for event in events:
            answers[event.request].take(event)


async def _after(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for event in events:
        yield event


async def _closed_by_error(lines: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield lines; if their source fails, an error object is the last one."""
    try:
        async for line in lines:
            yield line
    except BwlmError as error:
        yield to_line(error_object(str(error), "server_error"))
    except Exception:
        log.exception("a stream failed")
        yield to_line(error_object(FAILED, "server_error"))


class EventStream(StreamingResponse):
    """Stream of server-sent events. With the connection, it closes the events of the engine that it is made of."""

    def __init__(self, lines: AsyncGenerator[bytes], events: AsyncGenerator[Event], seconds: float) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self._lines, self._events, self._seconds = lines, events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines until the last one, until the client leaves, or for a client that does not read: in time."""
        with suppress(TimeoutError):
            async with aclosing(self._events), aclosing(self._lines), asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """Return what the work returns. Raises `ClientLeft`, and cancels the work, if the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    """Return once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
