"""The gate before the server: who may ask, how much, and what a browser may do with the page.

A page of another site must not reach a server that listens on loopback: `Host` and `Origin` are checked, and bodies
must be JSON, which a browser does not send to another site unasked. A body is read whole, within its limits, before
anything else happens.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bwlm.chat.access import Access
from bwlm.chat.wire import error_object

MOST_BYTES = 2**20
"""Most bytes of a body."""

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Refusal(Exception):
    """Answer to a request that is not let in."""

    status: int
    message: str
    code: str


class Guard:
    """ASGI middleware that lets in what `Access` allows, and adds the headers of security to every response."""

    def __init__(self, app: ASGIApp, access: Access, open_paths: frozenset[str]) -> None:
        """Guard `app`; `open_paths` need no token."""
        self.app = app
        self.access = access
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            assert scope["type"] == "lifespan", "no websockets are served"
            await self.app(scope, receive, send)
            return
        guarded = _with_headers(send)
        try:
            self._check(scope)
            body = await self._body(receive)
        except Refusal as refusal:
            await _refuse(refusal, guarded)
            return
        await self.app(scope, _replay(body, receive), guarded)

    def _check(self, scope: Scope) -> None:
        """Raise `Refusal` for a request that must not come in, as its headers say."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if _name(host) not in self.access.hosts:
            raise Refusal(421, f"Host {host[:100]!r}: not a name of this server: add --allow-host NAME", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host:
            raise Refusal(403, f"Origin {origin[:100]!r}: another site may not ask this server", "wrong_origin")
        if scope["path"] not in self.open_paths and not self._knows(headers.get("authorization", "")):
            raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN", "invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal(415, "the body must be JSON: Content-Type: application/json", "wrong_content_type")
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MOST_BYTES:
            raise _TOO_LARGE

    def _knows(self, authorization: str) -> bool:
        """Return true if the token is right, or none is asked for."""
        if self.access.token is None:
            return True
        kind, _, token = authorization.partition(" ")
        right = hmac.compare_digest(token.strip().encode("latin-1"), self.access.token.encode())
        return kind.lower() == "bearer" and right

    async def _body(self, receive: Receive) -> bytes:
        """Return the whole body. Raises `Refusal` if it is too large, or does not come in time."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.access.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the client left", "client_left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > MOST_BYTES:
                        raise _TOO_LARGE
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, "the body did not come in time", "timeout") from None


_TOO_LARGE = Refusal(413, f"the body is too large: at most {MOST_BYTES} bytes", "too_large")


def _place(origin: str) -> str:
    """Return the host in an Origin header, with its port."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # such as an open bracket
        return ""


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # such as an open bracket
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    added = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return guarded


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(error_object(refusal.message, "invalid_request_error", code=refusal.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
