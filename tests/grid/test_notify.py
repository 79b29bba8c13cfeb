"""Notices of a launch: what reaches a URL or a command, and that nothing that fails or hangs reaches the launch."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from bwlm.errors import UserError
from bwlm.grid import notify
from bwlm.grid.notify import Notifier

SECRET = "hush-4711"


@contextmanager
def server(status: int = 200, hang: threading.Event | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that keeps what is POSTed to it; its address and what came."""
    came: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if hang is not None:
                hang.wait()
            content = self.rfile.read(int(self.headers["Content-Length"]))
            came.append({"path": self.path, "type": self.headers["Content-Type"], "content": json.loads(content)})
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    web = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}", came
    finally:
        if hang is not None:
            hang.set()
        web.shutdown()
        thread.join()
        web.server_close()


def test_a_url_gets_json_with_its_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as (address, came):
        monkeypatch.setenv("HOOK", SECRET)
        notifier = Notifier(address + "/services/${HOOK}")
        notifier.send({"event": "stall"})
        notifier.send({"event": "end"})
        notifier.close()
    assert [one["content"]["event"] for one in came] == ["stall", "end"]
    assert {(one["path"], one["type"]) for one in came} == {(f"/services/{SECRET}", "application/json")}


def test_a_command_of_the_shell_gets_json(tmp_path: Path) -> None:
    notifier = Notifier(f"tr a-z A-Z | cat > {tmp_path}/came")
    notifier.send({"event": "end"})
    notifier.close()
    assert (tmp_path / "came").read_text() == '{"EVENT": "END"}'


def test_no_target_sends_nothing() -> None:
    notifier = Notifier(None)
    notifier.send({"event": "end"})
    notifier.close()


@pytest.mark.parametrize(
    ("status", "said"), [(404, "answers 404 Not Found"), (500, "answers 500 Internal Server Error")]
)
def test_an_address_that_refuses_is_told_once_without_its_secret(
    status: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with server(status) as (address, came):
        monkeypatch.setenv("HOOK", SECRET)
        notifier = Notifier(address + "/${HOOK}")
        for _ in range(3):
            notifier.send({"event": "failure"})
        notifier.close()
    assert len(came) == 3
    assert caplog.messages == [f"launch.notify: {address}/${{HOOK}}: {said}; the launch goes on"]


def test_an_address_where_nobody_listens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with server() as (address, _):
        pass
    notifier = Notifier(address)
    notifier.send({"event": "end"})
    notifier.close()
    assert caplog.messages == [f"launch.notify: {address}: does not answer (Connection refused); the launch goes on"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such room >&2; exit 3", "exits with 3: no such room"),
        ("exit 1", "exits with 1"),
        ("sleep 600 | sleep 600", "has not ended after 0.3 seconds, and was killed"),
    ],
)
def test_a_command_that_fails_or_hangs_is_told(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "_SECONDS", 0.3)
    notifier = Notifier(command)
    notifier.send({"event": "end"})
    notifier.close()
    assert caplog.messages == [f"launch.notify: {command}: {said}; the launch goes on"]


def test_what_a_command_started_is_killed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_SECONDS", 0.3)
    notifier = Notifier(f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    notifier.send({"event": "end"})
    notifier.close()
    started = int((tmp_path / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(started).wait(timeout=60)


def test_an_address_that_hangs_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "_LAST_SECONDS", 0.3)
    with server(hang=threading.Event()) as (address, _):
        notifier = Notifier(address)
        began = time.monotonic()
        for _ in range(1000):
            notifier.send({"event": "stall"})
        notifier.close()
        assert time.monotonic() - began < notify._SECONDS, "it waited for an answer"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("${NO_SUCH_VARIABLE}", "the environment variable NO_SUCH_VARIABLE is not set: export it"),
        ("https://h/${NO_SUCH_VARIABLE}", "the environment variable NO_SUCH_VARIABLE is not set: export it"),
        ("http://", "not an address: give http://host/.. or https://host/.."),
        ("${A_PATH}", "not an address: give http://host/.. or https://host/.."),
    ],
)
def test_a_target_that_cannot_work_is_refused_at_once(target: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_PATH", "file:///etc/passwd")
    with pytest.raises(UserError) as caught:
        Notifier(target)
    assert str(caught.value) == f"launch.notify: {target}: {told}"
