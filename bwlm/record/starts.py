"""Starts of a run, `starts.json`: from which step it was trained each time, by how many workers, and what was lost.

A start is noted before the journal drops the steps that are lost, so that none of them is forgotten. A process that is
killed between the two leaves them in the journal. So each start notes the journal's last entry: a next start that finds
the same one knows that they have been counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.paths import Check, read_json, unchecked, write_json
from bwlm.record.journal import last_entry

STARTS = "starts.json"


@dataclass(frozen=True)
class Start:
    """Start of a run, or its resume from a checkpoint."""

    step: int
    """Optimizer steps done before it."""
    lost: int
    """Steps that had been trained beyond it, and are trained again."""
    workers: int
    time: int
    """Milliseconds since the epoch."""
    seen: int = 0
    """Time of the journal's last entry before it, which tells that entry from all others; 0 if there was none."""


def starts_of(folder: Path) -> list[Start]:
    """Return the starts of a run, in their order; none for a run of an earlier version, or that has not begun.

    Raises `UserError` if the file holds something else.
    """
    path = folder / STARTS
    if not path.exists():
        return []
    try:
        return [Start(**start) for start in read_json(path)]
    except TypeError:
        raise UserError(f"{path}: does not hold the starts of a run: delete it, and they count from here on") from None


def note_start(folder: Path, step: int, workers: int, check: Check = unchecked) -> None:
    """Note that a run is trained on from a step. Raises `OSError` if that cannot be written."""
    starts, last, now = starts_of(folder), last_entry(folder), time.time_ns() // 1_000_000
    seen, reached = (last.time, last.step) if last else (0, 0)
    if starts and starts[-1].seen == seen:  # the start before has counted what lies beyond its own step
        reached = min(reached, starts[-1].step)
    start = Start(step, max(0, reached - step), workers, now, seen)
    write_json(folder / STARTS, [*map(asdict, starts), asdict(start)], check)


def steps_lost(starts: Sequence[Start]) -> int:
    """Return the steps that were trained again over all resumes."""
    return sum(start.lost for start in starts)


def has_changed_workers(starts: Sequence[Start]) -> bool:
    """Return whether the run was trained by different numbers of workers."""
    return len({start.workers for start in starts}) > 1


def worker_words(starts: Sequence[Start]) -> str:
    """Return the numbers of workers in words: `1, 2 from step 40, 1 from step 90`."""
    firsts = [next(alike) for _, alike in groupby(starts, key=lambda start: start.workers)]
    return ", ".join(f"{one.workers}{f' from step {one.step:,}' if one.step else ''}" for one in firsts)


def resume_words(starts: Sequence[Start]) -> str:
    """Return how often a run was resumed, and what that cost: `2 resumes, 12 steps lost`; '' if it never was."""
    resumes = len(starts) - 1
    return f"{counted(resumes, 'resume')}, {counted(steps_lost(starts), 'step')} lost" if resumes > 0 else ""
