"""Lines about long work: on a terminal, and in a log."""

from __future__ import annotations

import io

import pytest

from bwlm import progress
from bwlm.progress import print_if_due, track, working


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    clock = [1000.0]
    monkeypatch.setattr("bwlm.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("bwlm.progress._lines_now_and_then", progress.nullcontext)  # the test asks for lines itself
    return clock


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    print_if_due()
    return capsys.readouterr().err


def test_a_log_gets_few_lines_however_long_the_work(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with working("starting Ray"):
        lines = 0
        for now[0] in range(1000, 1000 + 3600):  # an hour, asked each second
            lines += bool(printed(capsys))
        assert lines == 5 + (3600 - 160) // 300  # after 10, 20, 40, 80, 160 s, then every five minutes
        now[0] += 300
        assert printed(capsys) == "starting Ray: 1:04:59\n"
    assert printed(capsys) == ""


def test_counted_work_tells_the_number_and_the_time_left(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with working("packing", "documents", 6000, lambda: 1500):
        now[0] += 20
        assert printed(capsys) == "packing: 1,500 of 6,000 documents, about 1:00 left\n"
    with working("packing", "documents", 0, lambda: 1500):  # nobody knows how many there are
        now[0] += 20
        assert printed(capsys) == "packing: 1,500 documents, 0:20\n"


def test_the_inner_work_is_shown_and_then_the_outer(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with working("reporting"):
        for run in track(["a", "b", "c"], "reading", "runs"):
            now[0] += 15
            expected = {"a": "reading: 0:15\n", "b": "reading: 1 of 3 runs, about 1:00 left\n", "c": ""}
            assert printed(capsys) == expected[run]
        assert printed(capsys) == "reporting: 0:45\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with working("packing", "documents", 10, lambda: 5):
        assert "packing: 5 of 10 documents" in terminal.getvalue()
        assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased


def test_work_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="broken"), working("packing"):
        raise ValueError("broken")
    assert progress._works == []
