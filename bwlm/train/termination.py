"""Notices that a process was asked to end (SIGTERM), in whatever thread it trains.

Python runs signal handlers in the main thread alone. In a Ray worker that thread is Ray's, with a handler that leaves
at once, and training happens in another. `faulthandler` has a handler in C that any thread may install: it writes where
the process was to a file, and that the file has grown says that the signal came. Imports nothing heavy.
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
"""Exit code of a command that was asked to end, as shells count it."""

_lock = threading.Lock()
_blocks = 0  # in which the signal is noted: there is one handler for the whole process


@cache
def _notes() -> IO[bytes]:
    return tempfile.TemporaryFile()


class Termination:
    """While its block runs, SIGTERM is noted instead of ending the process; blocks nest, in any threads.

    After the last block the handler that was there before takes over again, and `asked` stays as it is.
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
        """Whether SIGTERM came since this was made, in any block."""
        return self._size() > self._before

    @staticmethod
    def _size() -> int:
        return os.fstat(_notes().fileno()).st_size
