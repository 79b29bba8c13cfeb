"""Notices that a process was asked to end (SIGTERM), in whatever thread it trains.

Python runs signal handlers in the main thread alone. In a Ray worker that thread is Ray's, with a handler that exits
at once, and training runs in another thread. `faulthandler` has a handler in C that any thread may install. It writes
a stack trace to a file, so a file that has grown shows that the signal came. The module imports nothing heavy.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import threading
from functools import cache
from typing import IO

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that was ended by SIGTERM, as shells count it."""

_lock = threading.Lock()
_blocks = 0  # open contexts: there is one handler for the whole process


@cache
def _notes() -> IO[bytes]:
    return tempfile.TemporaryFile()


class Termination:
    """Context in which SIGTERM is noted instead of ending the process; contexts nest, in any threads.

    After the last one the earlier handler takes over again, and `asked` keeps its value.
    """

    def __init__(self) -> None:
        self._before = self._size()

    def __enter__(self) -> Termination:
        global _blocks
        with _lock:
            if _blocks == 0:
                faulthandler.register(signal.SIGTERM, _notes(), all_threads=False, chain=False)
            _blocks += 1
        return self

    def __exit__(self, *_: object) -> None:
        global _blocks
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                faulthandler.unregister(signal.SIGTERM)

    @property
    def asked(self) -> bool:
        """True if SIGTERM came since this object was made, in any context."""
        return self._size() > self._before

    @staticmethod
    def _size() -> int:
        return os.fstat(_notes().fileno()).st_size
