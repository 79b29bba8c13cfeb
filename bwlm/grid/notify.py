"""Notices of a launch, as JSON: POSTed to a URL, or given to a command on its standard input.

A thread sends them, each within seconds. So no address that hangs, refuses or is gone holds up a launch or ends it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import bwlm
from bwlm.credentials import masked
from bwlm.errors import UserError

log = logging.getLogger(__name__)

_SECONDS = 10.0
"""Seconds in which an address must answer, or a command must end."""
_LAST_SECONDS = 15.0
"""Seconds that the end of a launch waits for notices that are not sent yet."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Notifier:
    """Sender of notices to `launch.notify`; without a target it sends nothing."""

    def __init__(self, target: str | None) -> None:
        """Check the target. Raises `UserError` for one that cannot be sent to, such as a variable that is not set."""
        self._target = target or ""
        self._url = _url_of(self._target)
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._send_all, name="notify", daemon=True)
        if target:
            self._thread.start()

    def send(self, content: Mapping[str, Any]) -> None:
        """Send a notice soon, after those before it."""
        if self._target:
            self._waiting.put(json.dumps(content).encode())

    def close(self) -> None:
        """Wait some seconds until all notices are sent."""
        if self._target:
            self._waiting.put(None)
            self._thread.join(_LAST_SECONDS)

    def _send_all(self) -> None:
        while (content := self._waiting.get()) is not None:
            if fault := _post(self._url, content) if self._url else _run(self._target, content):
                self._tell_once(fault)

    def _tell_once(self, fault: str) -> None:
        if not self._failed:
            log.warning("launch.notify: %s: %s; the launch goes on", masked(self._target), masked(fault))
        self._failed = True


def _url_of(target: str) -> str:
    """Return the URL that a target names, with the values of its variables; '' for a command."""
    if not target.startswith(("http://", "https://")) and not _VARIABLE.fullmatch(target):
        return ""
    missing = [name for name in _VARIABLE.findall(target) if name not in os.environ]
    if missing:
        raise UserError(f"launch.notify: {target}: the environment variable {missing[0]} is not set: export it")
    url = _VARIABLE.sub(lambda match: os.environ[match[1]], target)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"launch.notify: {masked(target)}: not an address: give http://host/.. or https://host/..")
    return url


def _post(url: str, content: bytes) -> str:
    """Return why a URL did not take the content; '' if it did. The words do not hold the URL, which may be secret."""
    headers = {"Content-Type": "application/json", "User-Agent": f"bwlm/{bwlm.__version__}"}
    try:
        urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"does not answer ({getattr(error.reason, 'strerror', None) or error.reason})"
    except Exception as error:  # whatever the other side sends must not end the thread
        return f"does not answer ({type(error).__name__})"
    return ""


def _run(command: str, content: bytes) -> str:
    """Return why a command of the shell failed; '' if it did not. One that hangs is killed with what it started."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, shell=True, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, start_new_session=True
    )
    try:
        _, errors = process.communicate(content, _SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"has not ended after {_SECONDS:g} seconds, and was killed"
    last = errors.decode(errors="replace").strip().splitlines()[-1:]
    return ": ".join([f"exits with {process.returncode}", *last]) if process.returncode else ""
