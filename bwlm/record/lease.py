"""Lease on a run's folder: one process may write to it; a process that lost the lease is fenced off.

`lease.json` names the holder, the time since when, and how long it lasts without a sign of life. The holder keeps a
lock on the file, which the kernel frees when the process dies; so nothing has to expire. But a process that is frozen
(SIGSTOP, a suspended machine, a lost network) keeps its lock. So the holder also touches the file every few seconds.
A process that waits and sees no touch for as long as the lease lasts takes it over: it puts a new file, with its own
lock, in the place of the old one.

Only the process whose lease has the name `lease.json` may write. A process asks (`Lease.check`), then writes, and may
be frozen in between. So no write takes effect by itself:

- A file that others read is made under a temporary name, then checked, then renamed. The taker deletes such temporary
  files once it has the lease and before it reads anything, so that a frozen process that wakes finds nothing to
  rename.
- A file that is appended to is replaced by a copy: a frozen process that wakes appends to a file without a name.

In a bucket (`bwlm/storage/claim.py`) a process needs two leases: this one of the working folder, against processes of
its machine, and then one of the bucket, against those of other machines.

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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from bwlm.errors import Interrupted, RunError
from bwlm.format import duration
from bwlm.storage import claim as bucket_lease
from bwlm.storage.opened import board_of, here, shared

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Seconds without a sign of life after which a lease may be taken. Longer than any system call that is not stuck."""
_TOUCHES = 12
"""Touches of the file in that time."""
_TRIES = 100
"""Tries, ten milliseconds apart, before the process that stands in the way counts as the holder."""
_Sight = tuple["Holder", int]
"""Content of a lease, and the time of its last touch in nanoseconds."""


class LeaseLost(RunError):
    """Lease that another process took while this one did not move: this one must not write what it holds of the run."""


@dataclass(frozen=True)
class Holder:
    """Content of lease.json."""

    host: str = "?"
    pid: int | str = "?"
    since: float = math.nan
    """Seconds since the epoch when the lease was taken, by the holder's clock."""
    seconds: float = LEASE_SECONDS
    """Seconds that the lease lasts without a sign of life."""
    mark: str = ""
    """Text that is different for each lease."""

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def since_words(self) -> str:
        """Start of the lease, `since 2026-07-31 17:05:17 (12 minutes ago)`, by the clock of this machine."""
        if math.isnan(self.since):
            return "since an unknown time"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"since {at} ({duration(max(0.0, time.time() - self.since))} ago)"


class Lease:
    """Lease that this process holds from construction until it is released or taken."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Put this lease in the place of the present lease; its holder learns of it at the next check."""
        self.holder = Holder(socket.gethostname(), os.getpid(), time.time(), seconds, uuid.uuid4().hex)
        self.lost = False
        """True once a check has found that another process took it."""
        self.claim: bucket_lease.Claim | None = None
        """Lease of the bucket that belongs to it; None for a storage that is a folder."""
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
            fcntl.flock(file, fcntl.LOCK_EX)  # before others can find the file under its name
            file.write(self._content)
            temporary.replace(self._path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _touch(self) -> None:
        """Touch this lease's own file, whoever has its name by now, at the time of the file system's clock."""
        while not self._over.wait(self.holder.seconds / _TOUCHES):
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def check(self) -> None:
        """Raise `LeaseLost`, naming the taker, if this process may not write any more. Costs some microseconds.

        Reads the file, because on NFS opening a file is what asks the server.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self.lost = True
            raise LeaseLost(f"{self._path}: is gone, so this process lost the lease: launch the run again") from None
        if content != self._content:
            self.lost = True
            taker = _parsed(content)
            raise LeaseLost(
                f"{self._path.parent.name}: {taker} writes to it {taker.since_words}; it was taken from this process "
                f"({self.holder}), which had shown no sign of life for {self.holder.seconds:g} seconds"
            )
        if self.claim is not None and self.claim.lost:
            self.lost = True
            raise LeaseLost(self.claim.lost)

    def is_held(self) -> bool:
        """Return whether this process still has the lease."""
        try:
            self.check()
        except LeaseLost:
            return False
        return True

    def release(self) -> None:
        """Let others have the lease; the file stays and names its last holder."""
        self._over.set()
        self._thread.join()
        if self.claim is not None:
            self.claim.release()
        fcntl.flock(self._file, fcntl.LOCK_UN)  # else a process that was forked meanwhile would keep the lock
        self._file.close()


# ---- looking ----


def living_holder(path: Path) -> Holder | None:
    """Return the holder, if it has shown itself within the lease's time; None if the lease is free or has run out."""
    holder, is_silent = present_holder(path) or (None, True)
    return None if is_silent else holder


def present_holder(path: Path) -> tuple[Holder, bool] | None:
    """Return the process that keeps the lock, and whether it is silent: its lease has run out. None if none does."""
    if not _is_locked(path):
        elsewhere = _holder_elsewhere(path)
        return (elsewhere, False) if elsewhere else None
    seen = _look(path)
    return seen[0], _has_run_out(path, seen)


def _holder_elsewhere(path: Path) -> Holder | None:
    """Return the holder on another machine, if the storage is in a bucket."""
    if (folder := shared(path)) is None:
        return None
    seen = board_of(folder.bucket.address).living(folder.name, path.stem)
    if seen is None or seen.holder.get("place") == here(folder.root)["place"]:
        return None  # of this machine: nobody has locked the file, so it is dead
    return _from_told(seen.holder)


def last_holder(path: Path) -> Holder:
    """Return the holder, or the last one of a lease that was released; of a lease that is not there, host `?`."""
    if (folder := shared(path)) and (seen := bucket_lease.newest(folder.bucket, folder.name, path.stem)):
        return _from_told(seen.holder)
    return _look(path)[0]


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock, frozen or not."""
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
        return _from_told(dict(json.loads(content)))
    except (ValueError, TypeError):
        return Holder()


def _from_told(said: Mapping[str, Any]) -> Holder:
    known = {field.name for field in fields(Holder)}
    # a lease that does not say how long it lasts is not touched either, so it must not run out
    return Holder(**{"seconds": math.inf} | {name: value for name, value in said.items() if name in known})


def _has_run_out(path: Path, seen: _Sight) -> bool:
    """Return whether a lease has run out, by the clock that stamps the files there: another machine's may differ.

    If nothing can be written there, it has not run out.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return False
    return now - seen[1] >= 1e9 * seen[0].seconds


# ---- taking ----


def take(path: Path, seconds: float, wait: float, give_up: Callable[[], bool]) -> tuple[Lease, bool]:
    """Return the lease once it is free or its holder is silent, and whether another process was waited for.

    Raises `Interrupted` if `give_up` becomes true. Time without a sign of life is counted in this process's own
    looks, not by a clock: a process that was suspended along with the holder gives it the time to show itself, and a
    clock that is set forward takes nobody's lease away. In a bucket the same is done for its lease after that.
    """
    lease, waited = _take_here(path, seconds, wait, give_up)
    if folder := shared(path):
        try:
            lease.claim, elsewhere = bucket_lease.take(
                folder.bucket, folder.name, path.stem, _told(lease, folder.root), wait, give_up, patient=True
            )
        except BaseException:
            lease.release()
            raise
        waited = waited or elsewhere
    return lease, waited


def _told(lease: Lease, root: Path) -> dict[str, Any]:
    return asdict(lease.holder) | dict(here(root))


def _take_here(path: Path, seconds: float, wait: float, give_up: Callable[[], bool]) -> tuple[Lease, bool]:
    """Return the lease of a file, as `take`."""
    seen: _Sight | None = None
    silence, waited = 0.0, False
    while (lease := _take_free(path, seconds)) is None:
        before, seen = seen, _look(path)
        silence = silence + wait if seen == before else 0.0
        waited = waited or _is_locked(path)
        if silence >= seen[0].seconds and (lease := _take_over(path, seen, seconds)):
            return lease, True
        if give_up():
            raise Interrupted(f"stopped on request while {seen[0]} trained {path.parent.name}")
        time.sleep(wait)
    return lease, waited


def take_at_once(path: Path, seconds: float = LEASE_SECONDS) -> Lease | Holder:
    """Return the lease, or its holder, without waiting; a lease that has run out is taken at once."""
    lease = _take_here_at_once(path, seconds)
    if isinstance(lease, Holder) or (folder := shared(path)) is None:
        return lease
    taken = bucket_lease.take_at_once(folder.bucket, folder.name, path.stem, _told(lease, folder.root))
    if isinstance(taken, bucket_lease.Claim):
        lease.claim = taken
        return lease
    lease.release()
    return _from_told(taken.holder)


def _take_here_at_once(path: Path, seconds: float) -> Lease | Holder:
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
    """Return the lease if nobody holds it; the process that locks the present file may put another in its place."""
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
    """Take the lease of a holder that keeps its lock; None if it shows itself, or another process takes the lease.

    Two takers would do no harm, since the name stands for the lease of one; but the other would have begun in vain.
    """
    with path.with_name(f".{path.name}.takers").open("ab") as takers:
        if not _lock(takers, fcntl.LOCK_EX) or _look(path) != seen:
            return None
        lease = Lease(path, seconds)
    log.warning(
        "%s showed no sign of life for %g seconds: %s takes the run over", seen[0], seen[0].seconds, lease.holder
    )
    return lease
