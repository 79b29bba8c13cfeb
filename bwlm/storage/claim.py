"""Leases in a bucket: numbered objects, of which each number is created once.

    <prefix>/.leases/<folder>/<name>/00000003.json

Who creates the next number has the lease. Of a training it is the number of the attempt, which every later write of the
run carries (`head.py`). The holder writes its object again every few seconds, as a sign of life; a lease that is
released says so. Who waits and sees no change for as long as the lease lasts creates the next number. No object is
ever deleted: a process that knows of old numbers only would find the place of the next one free.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bwlm.errors import BwlmError, Interrupted
from bwlm.storage.objects import Bucket, BucketAway, Listed

log = logging.getLogger(__name__)

LEASES = ".leases"
_BEATS = 4
"""Signs of life in the time that a lease lasts."""
_BETWEEN = 0.1
"""Seconds between tries to create an object that others create too."""
_LOOK_SECONDS = 2.0
"""Seconds for which a listing of all leases is used."""
_LONGEST_SILENCE = 3600.0
"""Seconds without a sign of life after which a lease is not even read, to see who held it; all last for less."""


@dataclass(frozen=True)
class Seen:
    """Newest lease of a folder, as this process sees it."""

    number: int
    etag: str
    seconds: float
    """Time of its last sign of life, in seconds since the epoch, by the server's clock."""
    holder: Mapping[str, Any]
    """Words of its holder on itself; `released` is in it once it is free, `place` names its working folder."""

    @property
    def is_free(self) -> bool:
        """True once it is released."""
        return bool(self.holder.get("released"))

    def is_silent(self, clock_ahead: float) -> bool:
        """Return whether it has run out, by the server's clock, which is so many seconds ahead of this machine's."""
        return time.time() + clock_ahead - self.seconds >= float(self.holder.get("seconds", 0))


def newest(bucket: Bucket, folder: str, name: str) -> Seen | None:
    """Return the newest lease; None if there was none yet."""
    last = max(bucket.list(f"{LEASES}/{folder}/{name}/"), key=lambda one: one.key, default=None)
    return None if last is None else _seen(bucket, last)


def _seen(bucket: Bucket, last: Listed) -> Seen:
    found = bucket.read(last.key)
    holder = json.loads(found[0]) if found else {}
    return Seen(int(last.key.rpartition("/")[2].removesuffix(".json")), last.etag, last.seconds, holder)


class Board:
    """Newest leases of a bucket, listed all at once: a list of runs asks for each of them."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._listed: dict[str, Listed] = {}
        self._read: dict[str, Seen] = {}
        """Leases that were read, by key: another sign of life has another ETag."""
        self._at = -math.inf

    def living(self, folder: str, name: str) -> Seen | None:
        """Return a lease that is held, by a look of the last seconds; None if it is free or has run out.

        Also None if the bucket is away: nobody can say then.
        """
        with contextlib.suppress(BucketAway):
            return self._living(folder, name)
        return None

    def all_living(self, of: str | None = None) -> Iterator[tuple[str, Seen]]:
        """Yield name and lease of each that is held, of a folder or of all. Raises `BucketAway` if nobody can say."""
        self._look()
        for place in list(self._listed):
            folder, _, name = place.removeprefix(f"{LEASES}/").rpartition("/")
            if of in (None, folder) and (seen := self._living(folder, name)):
                yield name, seen

    def _living(self, folder: str, name: str) -> Seen | None:
        self._look()
        last = self._listed.get(f"{LEASES}/{folder}/{name}")
        if last is None or time.time() + self._bucket.clock_ahead - last.seconds > _LONGEST_SILENCE:
            return None
        if (seen := self._read.get(last.key)) is None or seen.etag != last.etag:
            seen = self._read[last.key] = _seen(self._bucket, last)
        return None if seen.is_free or seen.is_silent(self._bucket.clock_ahead) else seen

    def _look(self) -> None:
        if time.monotonic() - self._at > _LOOK_SECONDS:
            found = sorted(self._bucket.list(f"{LEASES}/"), key=lambda one: one.key)
            self._listed = {one.key.rpartition("/")[0]: one for one in found}
            self._at = time.monotonic()


class Claim:
    """Lease that this process holds, from its creation until it is released or taken."""

    def __init__(self, bucket: Bucket, folder: str, name: str, number: int, holder: Mapping[str, Any]) -> None:
        self.number = number
        """Number of the attempt."""
        self.lost = ""
        """Reason why this process must not write any more, once it has learnt of one."""
        self._bucket, self._folder, self._name = bucket, folder, name
        self._holder = dict(holder)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {folder} in the bucket", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(float(self._holder["seconds"]) / _BEATS):
            beats += 1
            with contextlib.suppress(BwlmError):  # the bucket is away: other launches cannot reach it either, or
                self._look()  # they take the lease, and the head refuses what this process pushes
                if not self.lost:
                    self._write(beat=beats)

    def _look(self) -> None:
        found = self._bucket.read(_key(self._folder, self._name, self.number + 1))
        if found is not None:
            taker = json.loads(found[0])
            self.lost = (
                f"{self._folder}: {taker.get('host')}:{taker.get('pid')} has begun attempt {self.number + 1}; attempt "
                f"{self.number}, of this process, had shown no sign of life for {self._holder['seconds']:g} seconds"
            )

    def _write(self, **more: Any) -> None:
        content = json.dumps(self._holder | more).encode()
        self._bucket.write(_key(self._folder, self._name, self.number), content)

    def release(self) -> None:
        """Let others have the lease. If the bucket is away, they wait until it has run out."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(BwlmError):
            self._write(released=True)


def take(
    bucket: Bucket,
    folder: str,
    name: str,
    holder: Mapping[str, Any],
    wait: float,
    give_up: Callable[[], bool],
    patient: bool = False,
) -> tuple[Claim, bool]:
    """Return the lease once it is free or its holder is silent, and whether another process was waited for.

    `holder` is what this process says of itself: at least `place`, a name of its working folder, and `seconds`, which
    the lease lasts without a sign of life. A holder with the same `place` is dead: the caller holds the lease of that
    folder. Raises `Interrupted` if `give_up` becomes true. A `patient` process waits for a bucket that is away, too.
    """
    taker = _Taker(bucket, folder, name, holder)
    while True:
        try:
            if claim := taker.try_once(wait):
                return claim, taker.waited
            taker.is_away = False
        except BucketAway as error:
            if not patient:
                raise
            taker.wait_for(error)
        if give_up():
            raise Interrupted(f"stopped on request while {taker.other} trained {folder}")
        time.sleep(wait)


@dataclass
class _Taker:
    """Process that waits for a lease, and what it has seen of its holder."""

    bucket: Bucket
    folder: str
    name: str
    holder: Mapping[str, Any]
    seen: Seen | None = None
    silence: float = 0.0
    """Seconds without a sign of life, by this process's own looks."""
    waited: bool = False
    is_away: bool = False

    def try_once(self, seconds: float) -> Claim | None:
        """Look at the lease, `seconds` after the last look, and take it if that may be."""
        seen = newest(self.bucket, self.folder, self.name)
        is_same = self.seen is not None and seen is not None and seen.etag == self.seen.etag
        self.seen, self.silence = seen, self.silence + seconds if is_same else 0.0
        if seen is None or _may_take(seen, self.holder, self.silence):
            return _create(self.bucket, self.folder, self.name, (seen.number if seen else 0) + 1, self.holder)
        self.waited = True
        return None

    def wait_for(self, error: BucketAway) -> None:
        """Warn that the bucket is away, once."""
        if not self.is_away:
            log.warning("%s: waiting for its lease until it does", error)
        self.is_away = True

    @property
    def other(self) -> str:
        """Holder of the lease, `host:pid`, as far as it is known."""
        holder = self.seen.holder if self.seen else {}
        return f"{holder.get('host')}:{holder.get('pid')}"


def take_at_once(bucket: Bucket, folder: str, name: str, holder: Mapping[str, Any]) -> Claim | Seen:
    """Return the lease, or who holds it, without waiting; a lease that has run out is taken at once."""
    while True:
        seen = newest(bucket, folder, name)
        if seen and not _may_take(seen, holder, silence=0.0) and not seen.is_silent(bucket.clock_ahead):
            return seen
        if claim := _create(bucket, folder, name, (seen.number if seen else 0) + 1, holder):
            return claim
        time.sleep(_BETWEEN)


def _create(bucket: Bucket, folder: str, name: str, number: int, holder: Mapping[str, Any]) -> Claim | None:
    # the mark tells this process's object from another's, should the answer to its creation be lost
    content = json.dumps({**holder, "lease": uuid.uuid4().hex}).encode()
    created = bucket.create(_key(folder, name, number), content)
    return Claim(bucket, folder, name, number, holder) if created else None


def _may_take(seen: Seen, holder: Mapping[str, Any], silence: float) -> bool:
    if seen.is_free or seen.holder.get("place") == holder["place"]:
        return True
    return silence >= float(seen.holder.get("seconds", holder["seconds"]))


def _key(folder: str, name: str, number: int) -> str:
    return f"{LEASES}/{folder}/{name}/{number:08d}.json"
