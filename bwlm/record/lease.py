"""A lease on a run's folder: one process may write to it; a process that lost the lease is fenced off.

`lease.json` says who holds it, since when, and how long it lasts without a sign of life. The holder keeps a lock on the
file, which the kernel frees when the process dies; so nothing has to expire. But a process that is frozen (SIGSTOP, a
suspended machine, a network that is away) keeps its lock. So the holder also touches the file every few seconds, and
whoever waits and sees no touch for as long as the lease lasts puts one of its own in its place, a new file with its
own lock.

Whose lease the name `lease.json` stands for may write, nobody else. A process asks (`Lease.check`), then writes, and
may be frozen in between. So nothing takes effect by the write itself:

- What others read is made under a temporary name, then checked, then renamed. A taker deletes such temporaries once
  the lease is its own and before it reads anything, so the rename of one that woke finds nothing to rename.
- What is appended to, the taker replaces by a copy: one that woke appends to a file that has no name any more.

A deletion has no such second half. A holder that is frozen between its check and the deletion of an old checkpoint
deletes it when it wakes, also if the taker has saved that step again meanwhile; the taker's other checkpoints stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from bwlm.errors import Interrupted, RunError
from bwlm.format import duration

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Without a sign of life, after which a lease may be taken. Longer than any system call that is not stuck."""
_TOUCHES = 12
"""In that time."""
_TRIES = 100
"""Ten milliseconds apart, before whoever stands in the way counts as the holder."""
_Sight = tuple["Holder", int]
"""What a lease says, and when it was last touched, in nanoseconds."""


class LeaseLost(RunError):
    """Another process took the run over while this one did not move; what it holds of it is not to be written."""


@dataclass(frozen=True)
class Holder:
    """Content of lease.json."""

    host: str = "?"
    pid: int | str = "?"
    since: float = math.nan
    """Seconds since the epoch, by its own clock."""
    seconds: float = LEASE_SECONDS
    """How long it holds without a sign of life."""
    mark: str = ""
    """Of this lease and no other."""

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def since_words(self) -> str:
        """`since 2026-07-31 17:05:17 (12 minutes ago)`, by the clock of this machine."""
        if math.isnan(self.since):
            return "since an unknown time"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"since {at} ({duration(max(0.0, time.time() - self.since))} ago)"


class Lease:
    """Held by this process from its making until it is released, or taken."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Puts it in the place of the one that is there; whoever holds that one hears of it at its next check."""
        self.holder = Holder(socket.gethostname(), os.getpid(), time.time(), seconds, uuid.uuid4().hex)
        self.lost = False
        """Whether a check has found that another process took it."""
        self._path = path
        self._content = json.dumps(asdict(self.holder)).encode()
        self._file = self._put()
        self._over = threading.Event()
        # a daemon: it must not keep a process alive that has nothing else to do
        self._thread = threading.Thread(target=self._touch, name=f"lease of {path.parent.name}", daemon=True)
        self._thread.start()

    def _put(self) -> IO[bytes]:
        temporary = self._path.with_name(f".{self._path.name}.{self.holder.mark[:8]}.tmp")
        file = temporary.open("wb", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # before it has the name under which others find it
            file.write(self._content)
            temporary.replace(self._path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _touch(self) -> None:
        """Of its own file, whoever's lease has the name by now; by the clock of the file system."""
        while not self._over.wait(self.holder.seconds / _TOUCHES):
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def check(self) -> None:
        """Raises `LeaseLost`, with who took it, if this process may not write any more. Costs some microseconds.

        It reads the file, because on NFS opening one is what asks the server.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self.lost = True
            raise LeaseLost(f"{self._path}: is gone, and with it this process's right to write to the run") from None
        if content != self._content:
            self.lost = True
            taker = _parsed(content)
            raise LeaseLost(
                f"{self._path.parent.name}: {taker} writes to it {taker.since_words}; it was taken from this process "
                f"({self.holder}), which had shown no sign of life for {self.holder.seconds:g} seconds"
            )

    def is_held(self) -> bool:
        try:
            self.check()
        except LeaseLost:
            return False
        return True

    def release(self) -> None:
        """Lets others have it; the file stays and says who held it last."""
        self._over.set()
        self._thread.join()
        fcntl.flock(self._file, fcntl.LOCK_UN)  # or a process that was forked meanwhile would keep it
        self._file.close()


# ---- looking ----


def living_holder(path: Path) -> Holder | None:
    """Who holds the lease and has shown so within its time; None where it is free or has run out."""
    if not _is_locked(path):
        return None
    seen = _look(path)
    return None if _has_run_out(path, seen) else seen[0]


def _is_locked(path: Path) -> bool:
    """Whether a process holds it, frozen or not."""
    try:
        with path.open("rb") as file:
            return not _lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _look(path: Path) -> _Sight:
    try:
        with path.open("rb") as file:
            return _parsed(file.read()), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return Holder(), 0


def _parsed(content: bytes) -> Holder:
    try:
        said = dict(json.loads(content))
    except (ValueError, TypeError):
        return Holder()
    known = {field.name for field in fields(Holder)}
    # one that does not say how long it lasts is not touched either
    return Holder(**{"seconds": math.inf} | {name: value for name, value in said.items() if name in known})


def _has_run_out(path: Path, seen: _Sight) -> bool:
    """By the clock that stamps the files there, since another machine's need not agree with it.

    Where nothing can be written nothing has run out.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return False
    return now - seen[1] >= 1e9 * seen[0].seconds


# ---- taking ----


def take(path: Path, seconds: float, wait: float, give_up: Callable[[], bool]) -> tuple[Lease, bool]:
    """The lease, and whether another process was waited for. Raises `Interrupted` if it is told to `give_up`.

    Time without a sign of life is counted in looks of this process's own, not by a clock: one that was suspended along
    with the holder gives it the time to show itself, and a clock that is set forward takes nobody's lease away.
    """
    seen: _Sight | None = None
    silence, waited = 0.0, False
    while (lease := _take_free(path, seconds)) is None:
        before, seen = seen, _look(path)
        silence = silence + wait if seen == before else 0.0
        waited = waited or _is_locked(path)
        if silence >= seen[0].seconds and (lease := _take_over(path, seen, seconds)):
            return lease, True
        if give_up():
            raise Interrupted(f"asked to end while {seen[0]} trained {path.parent.name}")
        time.sleep(wait)
    return lease, waited


def take_at_once(path: Path, seconds: float = LEASE_SECONDS) -> Lease | Holder:
    """The lease, or who holds it; one that has run out is taken without more ado."""
    for _ in range(_TRIES):
        if lease := _take_free(path, seconds):
            return lease
        if holder := living_holder(path):
            return holder
        seen = _look(path)
        if _has_run_out(path, seen) and (lease := _take_over(path, seen, seconds)):
            return lease
        time.sleep(0.01)  # somebody looks at it, or takes it at this moment
    return _look(path)[0]


def _take_free(path: Path, seconds: float) -> Lease | None:
    """The lease, if nobody holds it. Who has the lock of the file that is there may put another one in its place."""
    with path.open("ab") as there:
        if _lock(there, fcntl.LOCK_EX) and _has_the_name(path, there):
            return Lease(path, seconds)
    return None


def _has_the_name(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _take_over(path: Path, seen: _Sight, seconds: float) -> Lease | None:
    """Takes the lease of a holder that keeps its lock, unless it shows itself or another process takes it.

    Two that took it would do no harm, since its name stands for one of them; but one would have begun in vain.
    """
    with path.with_name(f".{path.name}.takers").open("ab") as takers:
        if not _lock(takers, fcntl.LOCK_EX) or _look(path) != seen:
            return None
        lease = Lease(path, seconds)
    log.warning(
        "%s showed no sign of life for %g seconds: %s takes the run over", seen[0], seen[0].seconds, lease.holder
    )
    return lease
