"""The journal of a run: whole lines only, also after kill -9, and no step twice after a resume."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bwlm.record.journal import NAME, Entry, Journal, entries_after, entries_holding, last_entry, read_journal


def write(folder: Path, first: int, last: int, resume: int = 0) -> None:
    journal = Journal(folder, resume)
    for step in range(first, last + 1):
        journal.append(step, {"loss": 1 / step})
    journal.close()


def steps(folder: Path) -> list[int]:
    return [entry.step for entry in read_journal(folder)]


def test_what_is_appended_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((1_700_000_000_123_456_789, 1_700_000_001_000_000_000))
    monkeypatch.setattr("bwlm.record.journal.time.time_ns", lambda: next(moments))
    journal = Journal(tmp_path)
    journal.append(1, {"loss": 2.5, "tokens": 512})
    journal.append(2, {"loss": 0.1})
    first, second = read_journal(tmp_path)
    assert first == Entry(1, first.time, {"loss": 2.5, "tokens": 512})
    assert second.metrics == {"loss": 0.1}
    assert (first.time, second.time) == (1_700_000_000_123, 1_700_000_001_000)
    journal.sync()
    journal.close()


def test_an_entry_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    """`runs list` and MLflow follow a run through this file."""
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append(step, {})
        assert steps(tmp_path)[-1] == step
    journal.close()


def test_entries_that_hold_a_metric(tmp_path: Path) -> None:
    assert list(entries_holding(tmp_path, "val_bpb")) == []
    journal = Journal(tmp_path)
    for step, metrics in enumerate([{"loss": 3.0}, {"val_bpb": 2.5}, {"val_bpb_forward": 2.0}, {"val_bpb": 2.25}], 1):
        journal.append(step, metrics)
    journal.close()
    with (tmp_path / NAME).open("a") as file:
        file.write(
            '{"step": 5, "time": 0, "metrics": {"loss": 1}, "note": "val_bpb"}\n{"step": 6, "metrics": {"val_bpb"'
        )
    assert [(entry.step, entry.metrics["val_bpb"]) for entry in entries_holding(tmp_path, "val_bpb")] == [
        (2, 2.5),
        (4, 2.25),
    ]


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    journal.close()
    [entry] = read_journal(tmp_path)
    assert entry.metrics == {"c": 1.0}


def test_a_resume_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    write(tmp_path, 5, 7, resume=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("resume", [0, 10, 99])
def test_the_ends_of_a_rewind(resume: int, tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    Journal(tmp_path, resume).close()
    assert steps(tmp_path) == list(range(1, min(resume, 10) + 1))


TORN = b'{"step": 11, "time": 5, "metr'


def test_a_torn_last_line_is_passed_over_and_forgotten_at_the_next_resume(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    with (tmp_path / NAME).open("ab") as file:
        file.write(TORN)
    assert steps(tmp_path) == list(range(1, 11))
    last = last_entry(tmp_path)
    assert last is not None
    assert last.step == 10
    write(tmp_path, 11, 12, resume=10)
    assert steps(tmp_path) == list(range(1, 13))


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\x00\n", b"{}\n", b'{"step": 3}\n', b"[1]\n", b"\xff\xfe\n"])
def test_a_damaged_line_costs_that_line_only(damage: bytes, tmp_path: Path) -> None:
    """After a loss of power a block of the file may read as zeros."""
    write(tmp_path, 1, 3)
    with (tmp_path / NAME).open("ab") as file:
        file.write(damage)
    write_on = Entry(4, 1, {"loss": 0.5})
    with (tmp_path / NAME).open("ab") as file:
        file.write(write_on.line() + damage)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert last_entry(tmp_path) == write_on


def test_no_journal_holds_nothing(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path)) == []
    assert last_entry(tmp_path) is None
    Journal(tmp_path).close()
    assert list(read_journal(tmp_path)) == []
    assert last_entry(tmp_path) is None


ENTRIES = st.lists(
    st.builds(
        Entry,
        step=st.integers(0, 10**9),
        time=st.integers(0, 10**13),
        metrics=st.dictionaries(st.text(max_size=200), st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    ),
    max_size=8,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES, torn=st.booleans())
def test_the_last_entry_is_the_last_of_all(entries: list[Entry], torn: bool, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"".join(entry.line() for entry in entries) + (TORN if torn else b""))
    assert list(read_journal(tmp_path)) == entries
    assert last_entry(tmp_path) == (entries[-1] if entries else None)


@pytest.mark.parametrize("width", [100, 30_000, 70_000, 200_000])
def test_the_last_entry_of_a_long_journal(width: int, tmp_path: Path) -> None:
    """Also where lines are longer than what is read at once."""
    entries = [Entry(step, step, {"m" * width: float(step)}) for step in (1, 2)]
    (tmp_path / NAME).write_bytes(b"".join(entry.line() for entry in entries))
    assert last_entry(tmp_path) == entries[-1]
    with (tmp_path / NAME).open("ab") as file:
        file.write(b"x" * width)
    assert last_entry(tmp_path) == entries[-1]


_WRITER = """
import sys
from pathlib import Path
from bwlm.record.journal import Journal, last_entry
folder = Path(sys.argv[1])
last = last_entry(folder)
step = last.step if last else 0
journal = Journal(folder, step)
print("ready", flush=True)
while True:
    step += 1
    journal.append(step, {f"metric_{i}": step + i / 7 for i in range(40)})
"""


def test_kill_9_leaves_whole_lines_whose_steps_increase(tmp_path: Path) -> None:
    rng, before = random.Random(0), 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.005, 0.04))
            writer.send_signal(signal.SIGKILL)
        entries = list(read_journal(tmp_path))
        assert [entry.step for entry in entries] == list(range(1, len(entries) + 1))
        assert all(e.metrics == {f"metric_{i}": e.step + i / 7 for i in range(40)} for e in entries)
        assert last_entry(tmp_path) == entries[-1]
        assert len(entries) > before
        before = len(entries)


def test_the_last_entry_that_holds_a_metric(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(1, 2001):
        journal.append(step, {"loss": 1.0} | ({"val_bpb": step / 10} if step in (3, 5) else {}))
    assert last_entry(tmp_path, "val_bpb") == next(entry for entry in read_journal(tmp_path) if entry.step == 5)
    assert last_entry(tmp_path, "val") is None


@pytest.mark.parametrize("width", [1, 3000])
@pytest.mark.parametrize("after", [0, 1, 199, 200, 201, 500])
def test_the_entries_after_a_step(width: int, after: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(1, 201):
        journal.append(step, {"m" * width: float(step)})
    assert [entry.step for entry in entries_after(tmp_path, after)] == list(range(after + 1, 201))
    assert entries_after(tmp_path / "none", after) == []
