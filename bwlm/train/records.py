"""The files that rank 0 writes while a run trains, and what happens when a write fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from bwlm.config import CheckpointSettings
from bwlm.errors import RunError
from bwlm.record.checkpoint import KeepPolicy, Snapshot
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import NAME, Journal
from bwlm.record.lease import LeaseLost
from bwlm.record.researchlog import ResearchLog
from bwlm.record.saver import CheckpointSaver
from bwlm.record.starts import STARTS, note_start

Entries = dict[str, dict[str, Any]]
"""Columns of one step, by group of the research log."""


def cannot_write(path: Path, error: OSError) -> RunError:
    """Return the error of a run whose file cannot be written, with the fix."""
    return RunError(
        f"{path}: cannot be written ({error.strerror or error}): free space or make it writable; "
        "launched again, the run goes on from its last checkpoint"
    )


class Records:
    """Files that rank 0 writes while a run trains: journal, research log, and checkpoints in the background.

    No file is written once the run's lease is lost. `wait_for_save` raises `LeaseLost` then, as it raises failed
    writes.
    """

    def __init__(
        self, folder: ExperimentFolder, phase: str, fixed: Mapping[str, Any], settings: CheckpointSettings, step: int
    ) -> None:
        """Open the files to continue after `step`; `fixed` are contents of the research log for the whole run.

        Raises `RunError` if a file cannot be written.
        """
        self._check = folder.check_lease
        config, experiment = folder.config(), folder.config().experiment
        about: dict[str, str | int | float] = {
            "experiment": config.id,
            "phase": phase,
            "fingerprint": config.fingerprint,
            "direction": experiment.direction,
            "depth": experiment.depth,
            "lr": experiment.lr,
            "seed": experiment.seed,
        }
        path = folder.path / STARTS
        try:
            note_start(folder.path, step, dist.get_world_size() if dist.is_initialized() else 1, self._check)
            path = folder.path / NAME
            self._journal = Journal(folder.path, step, self._check)
            path = folder.research_log(phase)
            self._log = ResearchLog(path, step, about, fixed, lease=folder.held)
        except OSError as error:
            raise cannot_write(path, error) from None
        # the next save must not delete the checkpoint that is being scored on tasks
        fewest = 2 if folder.config().experiment.evaluation.tasks else 1
        policy = KeepPolicy(max(settings.keep, fewest), settings.keep_best, settings.keep_every)
        self._saver = CheckpointSaver(folder.checkpoints, policy, self._check)
        self._failure: RunError | None = None

    def log(self, step: int, metrics: dict[str, float], entries: Entries) -> None:
        """Append metrics to the journal and entries to the research log; add the time of the last save to `metrics`.

        A failed write is kept for `wait_for_save`, where all ranks learn of it, before the next checkpoint.
        """
        if self._saver.seconds is not None:
            metrics["checkpoint_seconds"] = self._saver.seconds
        with self._noting_failure(self._journal.path):
            self._check()
            self._journal.append(step, metrics)
        with self._noting_failure(self._log.path):
            self._check()
            for group, columns in entries.items():
                self._log.write(group, step, **columns)

    @contextlib.contextmanager
    def _noting_failure(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = self._failure or cannot_write(path, error)
        except LeaseLost as error:
            self._failure = error

    def wait_for_save(self, last: bool = False) -> None:
        """Wait for the save in progress, if any. Raises `RunError` for every write that failed since.

        With `last`, the research log is merged at once.
        """
        self._saver.wait()
        with self._noting_failure(self._log.path):
            self._log.merge(now=last)
        if self._failure is not None:
            raise self._failure

    def save(self, snapshot: Snapshot) -> None:
        """Start a save; `wait_for_save` raises its failure. A journal or log that cannot be synced fails it too."""
        self._saver.save(snapshot, self._sync)

    def _sync(self) -> None:
        """Sync journal and research log before their checkpoint: a resumed run does not write those steps again."""
        for file in (self._journal, self._log):
            try:
                file.sync()
            except OSError as error:
                raise cannot_write(file.path, error) from None

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._saver.__exit__(kind, error, trace)
        finally:
            self._journal.close()
            with self._noting_failure(self._log.path):  # merged if the run ended well; else the tail file stays
                self._log.close()
