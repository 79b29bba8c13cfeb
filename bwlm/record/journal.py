"""Journal of a run's metrics: `metrics.jsonl`, one line a step, appended and never rewritten while the run trains.

The journal is the source of truth: charts and `runs list` read it, and MLflow is fed from it, so that no tracking
server can hold up or lose a run.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bwlm.paths import Check, unchecked, write_atomic

NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Entry:
    """Line of the journal: the metrics of a step."""

    step: int
    """Optimizer steps done when it was measured."""
    time: int
    """Milliseconds since the epoch."""
    metrics: dict[str, float]

    def line(self) -> bytes:
        """Return the entry as a line of JSON, in bytes."""
        return (json.dumps({"step": self.step, "time": self.time, "metrics": self.metrics}) + "\n").encode()


class Journal:
    """Writer of entries. Opened at a step, it drops later entries, which a run that was cut off had logged."""

    def __init__(self, folder: Path, resume_step: int = 0, check: Check = unchecked) -> None:
        self.path = folder / NAME
        kept = [entry for entry in read_journal(folder) if entry.step <= resume_step]
        # a new file: an earlier writer that is frozen, not dead, will append to the old one
        write_atomic(self.path, b"".join(entry.line() for entry in kept), check)
        self._file = self.path.open("ab", buffering=0)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an entry as one line, so that a killed process leaves whole lines and at most one torn last line.

        Metrics that are not finite are left out. Raises `OSError` if the line cannot be written whole: a disk that is
        nearly full takes a part and reports no error.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = Entry(step, time.time_ns() // 1_000_000, finite).line()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def sync(self) -> None:
        """Make the written lines durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(folder: Path) -> Iterator[Entry]:
    """Yield the entries in their order; a torn last line is skipped, and so is a line that the disk damaged."""
    try:
        with (folder / NAME).open("rb") as file:
            for line in file:
                if entry := _parse(line):
                    yield entry
    except FileNotFoundError:
        return


def entries_holding(folder: Path, metric: str) -> Iterator[Entry]:
    """Yield the entries that hold a metric, in their order; the other lines, which may be most, are not parsed."""
    mark = f'"{metric}"'.encode()
    try:
        with (folder / NAME).open("rb") as file:
            for line in file:
                if mark in line and (entry := _parse(line)) and metric in entry.metrics:
                    yield entry
    except FileNotFoundError:
        return


def last_entry(folder: Path, holding: str = "") -> Entry | None:
    """Return the newest entry, or the newest that holds a metric; reads no more of the file than it must."""
    mark = f'"{holding}"'.encode() if holding else b""
    for lines, _ in _tails(folder):
        for line in reversed(lines):
            if mark in line and (entry := _parse(line)):
                return entry
    return None


def entries_after(folder: Path, step: int) -> list[Entry]:
    """Return the entries of later steps, in their order; reads no more of the file than it must."""
    later: list[Entry] = []
    for lines, is_all in _tails(folder):
        entries = [entry for line in lines if (entry := _parse(line))]
        later = [entry for entry in entries if entry.step > step]
        if is_all or len(later) < len(entries):
            break
    return later


def faults_of_order(folder: Path, whole: bool = True) -> Iterator[str]:
    """Yield damaged lines, and steps that do not follow each other, in words; the first of each kind.

    The last line may be torn. Without `whole`, looks no further back than the last 64 kB.
    """
    lines, is_all = next(_tails(folder), ([], True))
    if whole and not is_all:
        lines, is_all = (folder / NAME).read_bytes().split(b"\n"), True
    entries = [_parse(line) for line in (lines[:-1] if is_all else lines[1:-1])]
    if None in entries:
        first = entries.index(None)
        yield f"line {first + 1} of {len(entries)} is damaged" if is_all else "one of its last lines is damaged"
    steps = [entry.step for entry in entries if entry]
    if is_all and steps and steps[0] != 1:
        yield f"begins at step {steps[0]:,}"
    for before, after in pairwise(steps):
        if after != before + 1:
            yield f"step {after:,} follows step {before:,}"
            return


def _tails(folder: Path, size: int = 65536) -> Iterator[tuple[list[bytes], bool]]:
    """Yield the last lines of a journal, of which the first may be torn, and whether they are all.

    Yields more and more of them, until they are all.
    """
    try:
        with (folder / NAME).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                start = max(0, end - size)
                file.seek(start)
                yield file.read(end - start).split(b"\n"), start == 0
                if start == 0:
                    return
                size *= 4
    except FileNotFoundError:
        return


def _parse(line: bytes) -> Entry | None:
    """Return the entry of a line; None if it was torn or damaged: a part of a JSON object is not one."""
    try:
        entry = Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return entry if isinstance(entry.step, int) and isinstance(entry.metrics, dict) else None
