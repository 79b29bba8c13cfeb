"""The gate: requests that the server lets in, and rights of a browser over its answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from bwlm.chat.access import LOOPBACK, Access
from bwlm.chat.guard import MOST_BYTES
from bwlm.text.tokenizer import Tokenizer
from tests.chat.serving import VOICES, WAIT, Server, running, served

ASKED = {"model": "forward", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with running([served("forward", VOICES["forward"], tokenizer)], access=Access(body_seconds=0.2)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[Server]:
    access = Access(LOOPBACK | {"lab.example"}, token="tøken")
    with running([served("forward", VOICES["forward"], tokenizer)], access=access) as server:
        yield server


def refused(answer: httpx.Response, status: int, code: str) -> bool:
    return (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_foreign_host_is_refused(server: Server, locked: Server) -> None:
    """A name that somebody else points at this machine does not reach it."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "[::1", ""):
        assert refused(server.post("/v1/completions", ASKED, headers={"host": host}), 421, "wrong_host")
    for host in ("localhost", f"localhost:{server.port}", "LOCALHOST", "[::1]:8000"):
        assert server.post("/v1/completions", ASKED, headers={"host": host}).status_code == 200
    assert locked.get("/health", headers={"host": "lab.example"}).status_code == 200


def test_a_page_of_another_site_is_refused(server: Server) -> None:
    for origin in (
        "https://evil.example",
        "http://localhost:1",
        "null",
        "http://[",
        f"http://127.0.0.1:{server.port}.evil.example",
    ):
        assert refused(server.post("/v1/completions", ASKED, headers={"origin": origin}), 403, "wrong_origin")
    own = {"origin": f"http://127.0.0.1:{server.port}"}
    assert server.post("/v1/completions", ASKED, headers=own).status_code == 200


def test_json_is_known_however_its_name_is_written(server: Server) -> None:
    kind = {"content-type": "Application/JSON ; charset=utf-8"}
    assert server.post("/v1/completions", ASKED, headers=kind).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_a_browser_sends_unasked_is_refused(kind: str, server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b"{}", headers={"content-type": kind})
    assert refused(answer, 415, "wrong_content_type")


def test_only_who_has_the_token_may_ask(locked: Server) -> None:
    for path in ("/v1/models", "/model_info", "/stats", "/metrics", "/openapi.json", "/v1//models", "/nowhere"):
        assert refused(locked.get(path), 401, "invalid_api_key"), path
    for wrong in ("Bearer", "Bearer no", "Basic tøken", "tøken", "Bearer tøkenn"):
        answer = locked.get("/v1/models", headers=[("authorization", wrong.encode())])
        assert refused(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.get("/v1/models", headers=[("authorization", "Bearer tøken".encode())]).status_code == 200
    assert locked.get("/health").status_code == 200
    assert locked.get("/").status_code == 200, "the page asks for the token"
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="no").models.list()


def test_every_answer_has_the_headers_of_security(server: Server) -> None:
    answers = [
        server.get("/"),
        server.get("/v1/models"),
        server.get("/nowhere"),
        server.post("/v1/completions", {}),
        server.post("/v1/completions", ASKED, headers={"host": "evil.example"}),
    ]
    server.engine("forward").failure = RuntimeError("no memory")
    answers.append(server.post("/v1/completions", ASKED))
    assert [answer.status_code for answer in answers] == [200, 200, 404, 400, 421, 500]
    for answer in answers:
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_asks_nobody_else(server: Server) -> None:
    assert "http" not in server.get("/").text.replace("http-equiv", "")
    assert server.get("/docs").status_code == 404


def test_a_body_that_is_too_large_is_not_read(server: Server) -> None:
    body = b"[" + b" " * MOST_BYTES + b"]"
    json = {"content-type": "application/json"}
    assert refused(httpx.post(f"{server.url}/v1/completions", content=body, headers=json), 413, "too_large")
    pieces = (b" " * 65536 for _ in range(MOST_BYTES // 65536 + 1))  # of a length that nobody says
    assert refused(httpx.post(f"{server.url}/v1/completions", content=pieces, headers=json), 413, "too_large")


@pytest.mark.parametrize("length", ["content-length: 100", "transfer-encoding: chunked"])
def test_a_body_that_never_ends_is_given_up(length: str, server: Server) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        connection.sendall(head.encode() + (b'3\r\n{"a\r\n' if "chunked" in length else b'{"a'))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods_are_answered_as_errors(method: str, server: Server) -> None:
    answer = httpx.request(method, f"{server.url}/v1/completions")
    assert answer.status_code in (404, 405)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_page_gives_no_other_file(server: Server) -> None:
    for path in ("/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            answer: Any = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 404 "), path
