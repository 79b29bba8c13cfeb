"""The HTTP server: one app for several models, which speaks OpenAI's protocol, reranks, fills in, and has the page.

Not here: what the endpoints do (`endpoints.py`), and who may ask (`guard.py`).
"""

from __future__ import annotations

import asyncio
import math
import re
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from bwlm.chat.access import LOCAL, Access
from bwlm.chat.endpoints import FAILED, ClientLeft, Hub, Stopping, as_json, router
from bwlm.chat.engine import Busy
from bwlm.chat.guard import SECURITY_HEADERS, Guard
from bwlm.chat.metrics import Counted, ServerMetrics
from bwlm.chat.protocol import BODIES
from bwlm.chat.served import ServedModel, UnknownModel
from bwlm.chat.service import EngineService, OutOfTime
from bwlm.chat.wire import error_object
from bwlm.errors import UserError, nearest

PAGE = Path(__file__).parent / "page"


def build_app(models: Sequence[ServedModel], access: Access = LOCAL, seconds: float = 300.0) -> FastAPI:
    """Return the app, whose engines run as long as it does. A request may take `seconds`."""
    app = FastAPI(title="bwlm", docs_url=None, redoc_url=None, lifespan=_lifespan)
    metrics = ServerMetrics(models)
    app.state.hub = Hub(models, seconds, metrics)
    for error, answer in _ANSWERS.items():
        app.exception_handler(error)(answer)
    app.include_router(router)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    files = {f"/{path.relative_to(PAGE)}" for path in PAGE.rglob("*") if path.is_file()}
    endpoints = frozenset(route.path for route in router.routes if isinstance(route, APIRoute))
    app.add_middleware(Guard, access=access, open_paths=frozenset({"/", "/health", *files}))
    app.add_middleware(Counted, metrics=metrics, paths=endpoints)
    return app


def run_server(app: FastAPI, listening: socket.socket, grace: float) -> int | None:
    """Serve until a signal comes; return its number.

    After it no request is taken, and those that run have `grace` seconds.
    """
    return _Server(server_config(app, grace), app.state.hub, grace).run_until_signal(listening)


def server_config(app: FastAPI, grace: float) -> uvicorn.Config:
    """Return how uvicorn runs the app; its own limit on the end is a little longer than `grace`."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace) + 2,
    )


class _Server(uvicorn.Server):
    """Server that tells the app when it is asked to end."""

    def __init__(self, config: uvicorn.Config, hub: Hub, grace: float) -> None:
        super().__init__(config)
        self._hub, self._grace = hub, grace

    def run_until_signal(self, listening: socket.socket) -> int | None:
        """Serve; return the signal that ended it."""
        ended_by: list[int] = []
        before = {
            number: signal.signal(number, lambda number, _: ended_by.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self.run([listening])  # raises the signal again at its end, for the handlers above
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return ended_by[0] if ended_by else None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note that the server is to end, and give streams their time."""
        super().handle_exit(sig, frame)
        if not self._hub.stopping:
            self._hub.stop()
            asyncio.get_running_loop().call_later(self._grace, self._hub.end_streams)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    models: Sequence[ServedModel] = app.state.hub.models
    for model in models:
        model.service = EngineService(model.engine)
    yield
    for model in models:
        model.running().close()


# ---- errors, in OpenAI's form ----


_FIELDS = {name for body in BODIES for name in body.model_fields}


async def _invalid(request: Request, error: Any) -> Response:
    """Answer a body that is not as declared, with its first fault."""
    fault = error.errors()[0]
    message, param = _fault(fault)
    return as_json(error_object(message, "invalid_request_error", param), 400)


def _fault(fault: dict[str, Any]) -> tuple[str, str | None]:
    """Return the message of pydantic's error, and the field that it is about."""
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault['ctx']['error']}", None
    place = [part for part in fault["loc"] if part not in ("body", "query")]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"no such field{nearest(str(place[-1]), _FIELDS)}"
    return (f"{field}: {message}", field) if field else (message, None)


async def _mistake(request: Request, error: Any) -> Response:
    """Answer a mistake in what was asked; the message begins with its field."""
    field = re.match(r"([a-z_.\[\]\d]+): ", str(error))
    return as_json(error_object(str(error), "invalid_request_error", field[1] if field else None), 400)


async def _unknown_model(request: Request, error: Any) -> Response:
    return as_json(error_object(str(error), "invalid_request_error", "model", "model_not_found"), 404)


async def _busy(request: Request, error: Any) -> Response:
    body = error_object(str(error), "rate_limit_error", code="busy")
    return as_json(body, 429, {"retry-after": str(request.app.state.hub.retry_after)})


async def _stopping(request: Request, error: Any) -> Response:
    return as_json(error_object(str(error), "server_error", code="stopping"), 503, {"retry-after": "5"})


async def _late(request: Request, error: Any) -> Response:
    # the same request would take as long again
    body = error_object(str(error), "server_error", code="timeout")
    return as_json(body, 504, {"x-should-retry": "false"})


async def _http(request: Request, error: Any) -> Response:
    return as_json(error_object(str(error.detail), "invalid_request_error"), error.status_code, error.headers)


async def _failed(request: Request, error: Any) -> Response:
    # Starlette sends this one itself, outside of the guard
    return as_json(error_object(FAILED, "server_error"), 500, SECURITY_HEADERS)


async def _left(request: Request, error: Any) -> Response:
    """Answer nobody; the status is the one that nginx notes."""
    return Response(status_code=499)


_ANSWERS: dict[Any, Any] = {
    RequestValidationError: _invalid,
    UnknownModel: _unknown_model,
    UserError: _mistake,
    Busy: _busy,
    Stopping: _stopping,
    OutOfTime: _late,
    ClientLeft: _left,
    HTTPException: _http,
    Exception: _failed,
}
