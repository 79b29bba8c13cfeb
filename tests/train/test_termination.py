"""SIGTERM, sent for real, is noted in any thread, and ends a process again after the last block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bwlm.train.session import LocalSession
from bwlm.train.termination import Termination


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that reach a handler of Python's, as Ray's and the command line's are."""
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, before)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_thread_notices_and_the_handler_of_the_process_does_not(received: list[int]) -> None:
    began, noticed = threading.Event(), threading.Event()

    def work() -> None:
        with Termination() as termination:
            assert not termination.asked
            began.set()
            while not termination.asked:
                time.sleep(0.001)
            noticed.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(60)
    ask()
    assert noticed.wait(60)
    thread.join()
    assert received == []


def test_the_handler_from_before_takes_over_again_after_the_last_block(received: list[int]) -> None:
    with Termination():
        with Termination():
            pass
        ask()
    assert received == []
    ask()
    assert received == [signal.SIGTERM]


def test_what_was_noted_stays_and_does_not_reach_a_later_one(received: list[int]) -> None:
    first = Termination()
    with first:
        ask()
    assert first.asked
    with first:
        assert first.asked
    with Termination() as second:
        assert not second.asked
        ask()
        assert second.asked


@pytest.mark.usefixtures("received")
def test_a_session_alone_stops_if_it_was_given_one() -> None:
    with Termination() as termination:
        sessions = LocalSession(termination=termination), LocalSession()
        assert [session.stopping() for session in sessions] == [False, False]
        ask()
        assert [session.stopping() for session in sessions] == [True, False]


def test_a_process_ends_outside_of_the_block() -> None:
    script = """
import os, signal
from bwlm.train.termination import Termination
with Termination() as termination:
    os.kill(os.getpid(), signal.SIGTERM)
    print(termination.asked, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout == "True\n"
    assert ended.returncode == -signal.SIGTERM


def test_the_module_is_light() -> None:
    script = "import sys, bwlm.train.termination; print({'torch', 'ray'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
