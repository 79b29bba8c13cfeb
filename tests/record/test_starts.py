"""Starts of a run: every lost step is counted, and none twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.record import mlflow_view
from bwlm.record.catalog.describe import describe
from bwlm.record.journal import Journal
from bwlm.record.starts import (
    STARTS,
    Start,
    has_changed_workers,
    note_start,
    resume_words,
    starts_of,
    steps_lost,
    worker_words,
)
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import STEPS, NewRun, in_process


def train(folder: Path, first: int, last: int) -> None:
    """The steps after `first` up to `last`, by a process that is killed then."""
    while time.time_ns() // 1_000_000 <= starts_of(folder)[-1].time:  # a step takes longer than that
        time.sleep(0.001)
    journal = Journal(folder, first)
    for step in range(first + 1, last + 1):
        journal.append(step, {"train_loss": 1.0})
    journal.close()


def told(folder: Path) -> list[tuple[int, int, int]]:
    return [(start.step, start.lost, start.workers) for start in starts_of(folder)]


def test_steps_after_the_checkpoint_are_lost(tmp_path: Path) -> None:
    assert starts_of(tmp_path) == []
    note_start(tmp_path, 0, 1)
    train(tmp_path, 0, 7)
    note_start(tmp_path, 4, 2)
    train(tmp_path, 4, 9)
    note_start(tmp_path, 9, 2)  # saved at a notice
    train(tmp_path, 9, 11)
    note_start(tmp_path, 8, 1)
    assert told(tmp_path) == [(0, 0, 1), (4, 3, 2), (9, 0, 2), (8, 3, 1)]
    assert steps_lost(starts_of(tmp_path)) == 6


def test_steps_are_counted_once_if_the_process_dies_before_it_drops_them(tmp_path: Path) -> None:
    note_start(tmp_path, 0, 1)
    train(tmp_path, 0, 7)
    note_start(tmp_path, 4, 1)  # killed here
    note_start(tmp_path, 4, 1)
    train(tmp_path, 4, 7)  # the same steps, lost once more
    note_start(tmp_path, 4, 1)
    assert told(tmp_path) == [(0, 0, 1), (4, 3, 1), (4, 0, 1), (4, 3, 1)]


def test_a_start_from_before_the_last_one_loses_what_that_one_kept(tmp_path: Path) -> None:
    """The checkpoint that it was made from turns out to be damaged; whether its process got to drop steps or not."""
    for name, goes_on in (("dropped", True), ("killed before", False)):
        folder = tmp_path / name
        folder.mkdir()
        note_start(folder, 0, 1)
        train(folder, 0, 7)
        note_start(folder, 6, 1)
        if goes_on:
            train(folder, 6, 6)
        note_start(folder, 2, 1)
        assert told(folder) == [(0, 0, 1), (6, 1, 1), (2, 4, 1)]


def test_a_clock_that_is_set_back_hides_no_lost_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
        note_start(tmp_path, 0, 1)
    journal = Journal(tmp_path, 0)
    for step in range(1, 8):
        journal.append(step, {"train_loss": 1.0})
    journal.close()
    note_start(tmp_path, 4, 1)
    assert told(tmp_path) == [(0, 0, 1), (4, 3, 1)]


def test_starts_of_a_version_that_noted_no_entry_are_read(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text('[{"step": 0, "lost": 0, "workers": 1, "time": 5}]')
    train(tmp_path, 0, 7)
    note_start(tmp_path, 4, 1)
    assert told(tmp_path) == [(0, 0, 1), (4, 3, 1)]


def test_starts_in_words() -> None:
    once = [Start(0, 0, 2, 0)]
    assert (worker_words(once), resume_words(once), has_changed_workers(once)) == ("2", "", False)
    often = [*once, Start(40, 0, 2, 1), Start(1040, 1, 1, 2), Start(1090, 12, 4, 3)]
    assert worker_words(often) == "2, 1 from step 1,040, 4 from step 1,090"
    assert resume_words(often) == "3 resumes, 13 steps lost"
    assert resume_words(often[:2]) == "1 resume, 0 steps lost"
    assert has_changed_workers(often)


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text('[{"step": 1}]')
    with pytest.raises(UserError, match=r"starts\.json: does not hold the starts of a run: delete it"):
        starts_of(tmp_path)


def test_a_run_notes_its_starts_and_tells_them(new_run: NewRun) -> None:
    folder = new_run(checkpoint={"every": 5, "keep": 9})
    run_phase(folder, LocalSession(), in_process)
    assert told(folder.path) == [(0, 0, 1)]
    assert mlflow_view.start_tags(folder) == {}
    for late in (10, STEPS):  # as if it had been killed after step 12, before these were whole
        (folder.checkpoints / f"step_{late:06}" / "meta.json").unlink()
    (folder.path / "status.json").write_text("{}")
    run_phase(folder, LocalSession(), in_process)
    assert told(folder.path) == [(0, 0, 1), (5, STEPS - 5, 1)]
    assert mlflow_view.start_tags(folder) == {"bwlm.steps_lost": f"{STEPS - 5}"}
    known = describe(folder)
    assert known["steps_lost"] == STEPS - 5
    assert [start["step"] for start in known["starts"]] == [0, 5]
