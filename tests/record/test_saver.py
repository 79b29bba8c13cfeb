"""Saves beside training: one at a time, in their order, and what went wrong comes up."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from bwlm.errors import RunError
from bwlm.record import checkpoint
from bwlm.record.checkpoint import KeepPolicy, checkpoint_steps, load_checkpoint, write_checkpoint
from bwlm.record.saver import CheckpointSaver
from tests.faults.checkpoints import is_of, names, snapshot

LONG = 60.0
"""Seconds after which something that is waited for will never come"""


class Gate:
    """Stands in the way of file writes: `reached` says that one waits, `open` lets all go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = checkpoint.save_file

        def save_file(*given: Any) -> None:
            self.reached.set()
            assert self.open.wait(LONG)
            real(*given)

        monkeypatch.setattr(checkpoint, "save_file", save_file)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_save_goes_on_beside_its_caller_and_is_whole_at_the_end(tmp_path: Path, gate: Gate) -> None:
    with CheckpointSaver(tmp_path, KeepPolicy(9)) as saver:
        saver.save(snapshot(1))
        assert gate.reached.wait(LONG)
        assert checkpoint_steps(tmp_path) == []  # the caller is here while the file is not
        gate.open.set()
        saver.wait()
        assert checkpoint_steps(tmp_path) == [1]
        saver.save(snapshot(2))
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert all(is_of(load_checkpoint(tmp_path, step), snapshot(step)) for step in (1, 2))


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    with CheckpointSaver(tmp_path, KeepPolicy(9)) as saver:
        saver.save(snapshot(1))
        assert gate.reached.wait(LONG)
        threading.Timer(0.05, gate.open.set).start()
        saver.save(snapshot(2))
        assert 1 in checkpoint_steps(tmp_path)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_copy_is_let_go_when_it_is_on_disk(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, KeepPolicy(9)) as saver:
        saved = snapshot(1)
        copies = [weakref.ref(tensor) for tensor in (saved.model["a"], saved.optimizer["exp_avg"])]
        saver.save(saved)
        del saved
        saver.wait()
        limit = time.monotonic() + LONG  # the thread lets go of its work a moment after it is done
        while any(copy() is not None for copy in copies):
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_the_policy_holds(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, KeepPolicy(last=1, best=True)) as saver:
        for step, metric in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None)):
            saver.save(snapshot(step, metric))
    assert names(tmp_path) == ["step_000002", "step_000004"]


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_what_went_wrong_comes_up_at_the_next_call(then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, snapshot(1), KeepPolicy(9))
    saver = CheckpointSaver(tmp_path, KeepPolicy(1))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fail)
        saver.save(snapshot(2))
        with pytest.raises(
            RunError, match=r"step_000002/model\.safetensors: cannot be written \(No space left"
        ) as told:
            saver.save(snapshot(3)) if then == "save" else getattr(saver, then)()
    assert "goes on from step 1" in str(told.value)
    assert names(tmp_path) == ["step_000001"]
    if then != "close":
        saver.save(snapshot(3))  # the fault is told once
        saver.close()
        assert checkpoint_steps(tmp_path) == [3]


def test_a_first_save_that_fails_says_that_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(RunError, match="from its beginning"), CheckpointSaver(tmp_path, KeepPolicy(1)) as saver:
        saver.save(snapshot(1))
    assert names(tmp_path) == []


def save_and_fail(folder: Path, step: int) -> None:
    with CheckpointSaver(folder, KeepPolicy(9)) as saver:
        saver.save(snapshot(step))
        raise KeyError("the run's own fault")


def test_what_ended_the_run_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The save that runs when a run ends is finished all the same, and its own fault is not lost."""
    with pytest.raises(KeyError, match="own fault"):
        save_and_fail(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == [1]
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="own fault"):
        save_and_fail(tmp_path, 2)
    assert "No space left" in caplog.text
