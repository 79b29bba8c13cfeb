"""A living holder keeps a lease, a dead one frees it at once, a frozen one loses it and hears of it when it wakes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

from bwlm.errors import Interrupted
from bwlm.record import lease as module
from bwlm.record.lease import Holder, Lease, LeaseLost, living_holder, take, take_at_once

SECONDS = 1.5
"""How long the leases of these tests last without a sign of life"""
LONG = 60.0
"""Seconds after which something that is waited for will never come"""
ME = f"{socket.gethostname()}:{os.getpid()}"

_HOLDER = """
import sys
from pathlib import Path
from bwlm.record.lease import LeaseLost, take
leases = [take(Path(path), float(sys.argv[1]), 0.02, lambda: False)[0] for path in sys.argv[2:]]
print("held", flush=True)
for line in sys.stdin:
    try:
        leases[0].check()
        print("may write", flush=True)
    except LeaseLost as error:
        print(error, flush=True)
"""
_RACER = """
import json, os, sys
from pathlib import Path
from bwlm.record.lease import Lease, take_at_once
folder, number, races, racers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
won = {}
for race in range(races):
    here = folder / str(race)
    (here / "start" / number).touch()
    while len(os.listdir(here / "start")) < racers:
        pass
    taken = take_at_once(here / "lease.json")
    if isinstance(taken, Lease):
        won[race] = taken
print(json.dumps(list(won)), flush=True)
sys.stdin.readline()
print(json.dumps([race for race, lease in won.items() if lease.is_held()]), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "lease.json"


@contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end of the block, frozen or not."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def holder(*paths: Path, seconds: float = SECONDS) -> Iterator[subprocess.Popen[str]]:
    with python(_HOLDER, seconds, *paths) as process:
        assert heard(process) == "held"
        yield process


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    print(line, file=process.stdin, flush=True)


def freeze(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


def after(polls: int) -> Callable[[], bool]:
    """Return what tells a waiter to give up when it has looked so many times, each 0.02 seconds after the last."""
    left = iter(range(polls))
    return lambda: next(left, None) is None


def taken(path: Path) -> Lease:
    return take(path, SECONDS, 0.02, lambda: False)[0]


# ---- frozen ----


def test_a_frozen_holder_loses_it_after_its_time_and_cannot_write_when_it_wakes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(path) as frozen:
        freeze(frozen)
        lease, waited = take(path, SECONDS, 0.02, lambda: False)
        assert waited
        theirs = f"{socket.gethostname()}:{frozen.pid}"
        assert f"{theirs} showed no sign of life for 1.5 seconds: {ME} takes the run over" in caplog.text
        for signal_ in (signal.SIGCONT, signal.SIGSTOP, signal.SIGCONT):  # asleep or awake, it does not get it back
            frozen.send_signal(signal_)
            lease.check()
            assert str(living_holder(path)) == ME
        tell(frozen)
        said = heard(frozen)
        assert re.match(rf"run: {ME} writes to it since 20..-..-.. ..:..:.. \(\d+ seconds ago\); it was taken ", said)
        assert f"this process ({theirs}), which had shown no sign of life for 1.5 seconds" in said
        lease.release()
        assert living_holder(path) is None


def test_a_frozen_holder_keeps_it_until_its_time_is_over(path: Path) -> None:
    with holder(path, seconds=LONG) as frozen:
        freeze(frozen)
        with pytest.raises(Interrupted):
            take(path, SECONDS, 0.02, after(polls=10))
        frozen.send_signal(signal.SIGCONT)
        tell(frozen)
        assert heard(frozen) == "may write"


def test_a_frozen_holder_is_told_from_a_living_one(path: Path) -> None:
    with holder(path, seconds=0.3) as frozen:
        assert str(living_holder(path)) == f"{socket.gethostname()}:{frozen.pid}"
        freeze(frozen)
        wait_until(lambda: living_holder(path) is None)
        frozen.send_signal(signal.SIGCONT)
        wait_until(lambda: living_holder(path) is not None)
        tell(frozen)
        assert heard(frozen) == "may write"  # nobody took it
        freeze(frozen)
        wait_until(lambda: living_holder(path) is None)
        lease = take_at_once(path, SECONDS)
        assert isinstance(lease, Lease)
        lease.release()


def test_a_holder_that_is_killed_while_it_is_frozen_frees_it_at_once(path: Path) -> None:
    with holder(path, seconds=LONG) as frozen:
        freeze(frozen)
        frozen.kill()
        frozen.wait()
        take(path, SECONDS, 0.02, after(polls=50))[0].release()


def test_of_several_that_take_it_at_once_exactly_one_has_it(path: Path) -> None:
    """Of the leases of a frozen holder, and of free ones."""
    races, racers = 60, 3
    paths = [path.parent / str(race) / "lease.json" for race in range(races)]
    for one in paths:
        (one.parent / "start").mkdir(parents=True)
    with contextlib.ExitStack() as processes:
        frozen = processes.enter_context(holder(*paths[: races // 2], seconds=0.05))
        freeze(frozen)
        wait_until(lambda: all(living_holder(one) is None for one in paths))
        racing = [
            processes.enter_context(python(_RACER, path.parent, number, races, racers)) for number in range(racers)
        ]
        for moment in ("taken", "still held"):
            won = [race for racer in racing for race in json.loads(heard(racer))]
            assert sorted(won) == list(range(races)), moment
            for racer in racing:
                tell(racer)


@contextmanager
def silent(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lease without a sign of life since 2001."""
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": 1e9, "seconds": seconds}))
    os.utime(path, (1e9, 1e9))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def test_a_silent_holder_is_taken_over_after_as_many_looks_as_its_time_holds(path: Path) -> None:
    """The first look sees no silence; each of the five after it adds a fifth of the holder's time."""
    with silent(path, seconds=0.05):
        with pytest.raises(Interrupted):
            take(path, SECONDS, 0.01, after(polls=4))
        lease, waited = take(path, SECONDS, 0.01, after(polls=6))
        assert waited
        lease.release()


def test_a_holder_that_shows_itself_at_the_last_moment_keeps_it(path: Path) -> None:
    with silent(path, seconds=0.05):
        seen = module._look(path)
        os.utime(path)
        assert module._take_over(path, seen, SECONDS) is None
        lease = module._take_over(path, module._look(path), SECONDS)
        assert lease is not None
        lease.release()


def test_who_locks_a_file_that_lost_its_name_meanwhile_does_not_have_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the lease between the opening of the file and the lock."""
    lock, winners = module._lock, list[Lease]()

    def late(file: IO[bytes], kind: int) -> bool:
        if not winners:
            winners.append(Lease(path, SECONDS))
        return lock(file, kind)

    monkeypatch.setattr(module, "_lock", late)
    assert module._take_free(path, SECONDS) is None
    winners[0].check()
    winners[0].release()


def test_a_lease_does_not_run_out_where_nothing_can_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system's clock is not known there."""

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with silent(path, seconds=1):
        assert living_holder(path) is None
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        assert str(living_holder(path)) == "elsewhere:7"


# ---- alive ----


def test_a_living_holder_is_never_taken_over(path: Path) -> None:
    with holder(path) as alive:
        with pytest.raises(Interrupted, match=f"stopped on request while .*:{alive.pid} trained run"):
            take(path, SECONDS, 0.02, after(polls=round(3 * SECONDS / 0.02)))
        assert str(take_at_once(path)) == f"{socket.gethostname()}:{alive.pid}"
        tell(alive)
        assert heard(alive) == "may write"


def test_a_clock_that_is_set_forward_takes_nobodys_lease_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, now = taken(path), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    assert living_holder(path) == lease.holder
    assert lease.holder.since_words.endswith("(2 hours ago)")
    lease.release()


def test_its_thread_ends_with_it_and_keeps_no_process_alive(path: Path) -> None:
    before = threading.active_count()
    lease = taken(path)
    assert threading.active_count() == before + 1
    lease.release()
    assert threading.active_count() == before
    code = "import sys, pathlib, bwlm.record.lease as l; l.take_at_once(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=LONG)


def test_it_may_be_had_again_and_again(path: Path) -> None:
    for _ in range(3):
        lease = taken(path)
        lease.check()
        lease.release()
        assert not taken_away(lease)
    taken(path).release()
    assert taken_away(lease)
    assert [other.name for other in path.parent.iterdir()] == ["lease.json"]


def taken_away(lease: Lease) -> bool:
    return not lease.is_held()


def test_a_process_that_was_forked_meanwhile_does_not_keep_it(path: Path) -> None:
    lease = taken(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    lease.release()
    try:
        again = take_at_once(path)
        assert isinstance(again, Lease)
        again.release()
    finally:
        os.write(writing, b".")
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_who_only_looks_does_not_hold_it(path: Path) -> None:
    taken(path).release()
    with path.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        waiting = threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        waiting.start()
        lease, waited = take(path, SECONDS, 0.02, lambda: False)
    assert not waited
    lease.release()


# ---- what the file says ----


def test_a_lease_whose_file_is_gone_is_lost(path: Path) -> None:
    lease = taken(path)
    path.unlink()
    with pytest.raises(LeaseLost, match=r"lease\.json: is gone"):
        lease.check()
    assert lease.lost
    lease.release()


def test_a_holder_that_does_not_say_how_long_it_lasts_keeps_it(path: Path) -> None:
    """One that shows no signs of life cannot be told from a frozen one by their lack."""
    path.write_text('{"host": "elsewhere", "pid": 7, "since": 1e9}')
    os.utime(path, (1e9, 1e9))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert str(living_holder(path)) == "elsewhere:7"
        with pytest.raises(Interrupted):
            take(path, 0.05, 0.01, after(polls=30))


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", '{"host": "x"'])
def test_a_file_that_says_nothing_does_not_stand_in_the_way(content: str, path: Path) -> None:
    path.write_text(content)
    lease = take_at_once(path)
    assert isinstance(lease, Lease)
    lease.release()
    path.write_text(content)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = living_holder(path)
        assert found is not None
        assert (str(found), found.since_words) == ("?:?", "since an unknown time")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7e3, "117 minutes"), (9e5, "10 days")],
)
def test_since_when(seconds: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + seconds)
    assert Holder(since=1.7e9).since_words.endswith(f"({words} ago)")
