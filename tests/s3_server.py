"""A real S3 server (moto's) on loopback, and a proxy before it that makes the faults of a network."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.mlflow_server import free_port

BUCKET = "lab-runs"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The address of a server that holds one empty bucket, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process, log)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "the server did not come up"
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=2):
                return
        except OSError:
            time.sleep(0.1)


@dataclass(frozen=True)
class Request:
    """What a client asks of the server."""

    number: int
    """How many came before it."""
    method: str
    path: str
    """With its query."""

    @property
    def writes(self) -> bool:
        return self.method in ("PUT", "POST", "DELETE")

    @property
    def lists(self) -> bool:
        return "list-type=2" in self.path


PASS, REFUSE, DENY, CUT, LOSE, SLOW, STALE = "pass", "refuse", "deny", "cut", "lose", "slow", "stale"
"""Ways to treat a request: forward it; answer 503; deny access; forward half of its body and cut the connection;
forward it and cut the connection before the answer; wait before it is forwarded; answer a listing as it was."""
Rule = Callable[[Request], str]


class FaultyProxy(ThreadingHTTPServer):
    """Proxy whose `rule` decides what becomes of each request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.rule: Rule = lambda request: PASS
        self.slow_seconds = 2.0
        self.rate = math.inf
        """Bytes per second of each connection, there and back."""
        self.seen: list[Request] = []
        self.listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that were killed leave broken pipes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        return

    def _handle(self) -> None:
        with self.server.lock:
            request = Request(len(self.server.seen), self.command, self.path)
            self.server.seen.append(request)
        action = self.server.rule(request)
        if action == SLOW:
            time.sleep(self.server.slow_seconds)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if action == CUT:
            self._half(body)
            return self._hang_up()
        if action == REFUSE:
            return self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        if action == DENY:
            return self._answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
        if action == STALE and request.path in self.server.listings:
            return self._answer(*self.server.listings[request.path])
        status, headers, content = self._forward(body)
        if request.lists and action != STALE:
            self.server.listings[request.path] = (status, headers, content)
        if action == LOSE:
            return self._hang_up()
        time.sleep((len(body) + len(content)) / self.server.rate)
        return self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _half(self, body: bytes) -> None:
        """Sends the head and half of the body to the server, as a client that dies in the middle."""
        host, _, port = self.server.target.partition(":")
        with socket.create_connection((host, int(port))) as connection, contextlib.suppress(OSError):
            head = [
                f"{self.command} {self.path} HTTP/1.1",
                *(f"{name}: {value}" for name, value in self.headers.items()),
            ]
            connection.sendall("\r\n".join([*head, "", ""]).encode() + body[: len(body) // 2])

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "server", "date"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at `target`."""
    proxy = FaultyProxy(target)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
