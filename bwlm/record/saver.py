"""Checkpoints saved beside training: a step waits for the copy to host memory, and for nothing else.

Only one save runs at a time, so that one copy lies in memory besides the live state, whatever the disk does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from bwlm.errors import RunError
from bwlm.paths import Check, unchecked
from bwlm.record.checkpoint import KeepPolicy, Snapshot, write_checkpoint

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writer of snapshots in a thread of its own; its file writes, hashes and syncs do not hold Python's lock.

    An error of a save is raised by the next `wait`, `save` or `close`. Call `wait` before a copy is made.
    """

    def __init__(self, folder: Path, keep: KeepPolicy, check: Check = unchecked) -> None:
        self._folder = folder
        self._keep = keep
        self._check = check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self.seconds: float | None = None
        """Time of the last save that ended well; None before the first."""

    def save(self, snapshot: Snapshot, first: Callable[[], None] = lambda: None) -> None:
        """Wait for the save before, then start this one; its thread calls `first` before it writes.

        Raises `RunError` if the save before failed.
        """
        self.wait()
        self._running = self._thread.submit(self._write, snapshot, first)

    def _write(self, snapshot: Snapshot, first: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            first()
            write_checkpoint(self._folder, snapshot, self._keep, self._check)
            self.seconds = time.monotonic() - began
        except RunError:
            self._check()  # a lost lease explains the failure, so it is raised first
            raise

    def wait(self) -> None:
        """Wait until everything handed in is on disk. Raises `RunError` if it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread. Raises as `wait`."""
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # only logged: the error that ended the run is raised
