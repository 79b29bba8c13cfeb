"""Saves checkpoints beside training: a step is held up by the copy to host memory, and by nothing else.

One save runs at a time, so that one copy lies in memory besides the live state, whatever the disk does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from bwlm.errors import RunError
from bwlm.paths import Check, unchecked
from bwlm.record.checkpoint import KeepPolicy, Snapshot, write_checkpoint

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes snapshots in a thread of its own, whose file writes, hashes and syncs do not hold Python's lock.

    What a save raises comes up at the next `wait`, `save` or `close`. Call `wait` before a copy is made.
    """

    def __init__(self, folder: Path, keep: KeepPolicy, check: Check = unchecked) -> None:
        self._folder = folder
        self._keep = keep
        self._check = check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(self, snapshot: Snapshot, first: Callable[[], None] = lambda: None) -> None:
        """Waits for the save before, then starts this one, with what is to be done `first` in its thread.

        Raises `RunError` if the one before failed.
        """
        self.wait()
        self._running = self._thread.submit(self._write, snapshot, first)

    def _write(self, snapshot: Snapshot, first: Callable[[], None]) -> None:
        try:
            first()
            write_checkpoint(self._folder, snapshot, self._keep, self._check)
        except RunError:
            self._check()  # that nothing may be written any more comes before what could not be
            raise

    def wait(self) -> None:
        """Returns when everything handed in is on disk. Raises `RunError` if it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Waits and ends the thread; raises as `wait`."""
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
            log.error("%s", failed)  # what ended the run comes first
