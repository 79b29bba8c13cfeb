"""Launches of a grid: which of them run, what they have used, and the request that they stop.

    grids/<grid>/launches/<name>.lease    lease of the launch's driver, while it runs
    grids/<grid>/launches/<name>.json     what the launch used and trained until now, rewritten every few seconds
    grids/<grid>/stop.json                names of the launches that were asked to stop

All of it lies on the shared storage, so that any process on any machine can read it, also while Ray is down. A request
names launches. So it stops no later launch, whatever became of those that it names. In a bucket the lease is an object
(`bwlm/storage/claim.py`), and the other two are files of the grid's folder, which each launch pushes and brings here.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import read_json, write_json
from bwlm.record.lease import Holder, Lease, living_holder, take_at_once
from bwlm.storage.opened import living_leases, push, remove, shared

LAUNCHES = "launches"
"""Folder of a grid's launches inside the grid's folder."""
STOP = "stop.json"
_NAME = re.compile(r"\d{14}-[0-9a-f]{8}")
"""Names of launches."""


@dataclass
class Usage:
    """Time, hardware and FLOPs that one launch used."""

    began: float = 0.0
    """Start of the launch, in seconds since the epoch."""
    seconds: float = 0.0
    """Wall time of the launch."""
    worker_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Seconds for which CPUs were reserved for workers, summed over the CPUs."""
    gpu_seconds: float = 0.0
    """Seconds for which GPUs, or parts of them, were reserved for workers, summed over the GPUs."""
    flops: float = 0.0
    """FLOPs of the steps and validations that it trained."""
    pace_seconds: float = 0.0
    """Wall time since a cell reported its first step."""
    pace_flops: float = 0.0
    """FLOPs trained in that time."""
    end: str = ""
    """Outcome of the launch, in words; '' while it runs, and if it was killed."""

    def cost(self, gpu_hour: float, cpu_hour: float) -> float:
        """Return the price of the reserved GPUs and CPUs, by prices per hour."""
        return (self.gpu_seconds * gpu_hour + self.cpu_seconds * cpu_hour) / 3600


@dataclass(frozen=True)
class LaunchEntry:
    """Launch of a grid as its files tell it."""

    name: str
    usage: Usage
    holder: Holder | None
    """Process of the launch; None if it has ended, or shows no sign of life."""


@dataclass(frozen=True)
class LaunchRecord:
    """Files of this process's launch, in the folder `home` of its grid."""

    home: Path
    name: str
    """Milliseconds since the epoch when it began, and a text that is different for each launch."""

    def write(self, usage: Usage) -> None:
        """Write what the launch used until now, also to a bucket. Raises `BucketAway` if that does not answer."""
        path = self.home / LAUNCHES / f"{self.name}.json"
        write_json(path, asdict(usage))
        push(path)

    def exchange(self) -> None:
        """Bring here from a bucket what other launches used, and a request to stop. Raises as `write`."""
        if folder := shared(self.home):
            folder.fetch(f"{LAUNCHES}/*", STOP)

    def asked_to_stop(self) -> str | None:
        """Return the process that asked this launch to stop, `host:pid`; None if none did."""
        names, by = _request(self.home)
        return by if self.name in names else None


@contextmanager
def recorded_launch(home: Path) -> Iterator[LaunchRecord]:
    """Yield the record of a launch of the grid in the folder `home`, and hold its lease, until the block ends.

    A launch that writes no usage leaves nothing, and no folder that was made for it.
    """
    made = [folder for folder in (home / LAUNCHES, home, *home.parents) if not folder.exists()]
    (home / LAUNCHES).mkdir(parents=True, exist_ok=True)
    _discard_dead(home)
    record = LaunchRecord(home, f"{time.time_ns() // 10**6:014}-{uuid.uuid4().hex[:8]}")
    path = home / LAUNCHES / f"{record.name}.lease"
    lease = take_at_once(path)
    assert isinstance(lease, Lease), "another launch has the same name"
    try:
        yield record
    finally:
        path.unlink(missing_ok=True)
        lease.release()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: it holds a grid
                folder.rmdir()


def _discard_dead(home: Path) -> None:
    """Delete the leases of launches that died, and a request that no living launch is named in."""
    living = {entry.name for entry in launches_of(home) if entry.holder}
    for path in (home / LAUNCHES).glob("*.lease"):
        if path.stem not in living:
            path.unlink(missing_ok=True)
    if (home / STOP).exists() and not living.intersection(_request(home)[0]):
        remove(home / STOP)
        (home / STOP).unlink(missing_ok=True)


def _request(home: Path) -> tuple[list[str], str]:
    """Return the names of the launches that were asked to stop, and the process that asked."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):
        request = read_json(home / STOP)
        return list(request["launches"]), str(request["by"])
    return [], ""


def launches_of(home: Path) -> list[LaunchEntry]:
    """Return the launches of the grid in the folder `home`, the oldest first."""
    here = {path.stem for path in (home / LAUNCHES).glob("[!.]*")}
    elsewhere = {name for name, _ in living_leases(home) if _NAME.fullmatch(name)}
    return [_entry(home / LAUNCHES, name) for name in sorted(here | elsewhere)]


def living_launches(home: Path) -> list[LaunchEntry]:
    """Return the launches whose driver runs now."""
    return [entry for entry in launches_of(home) if entry.holder]


def _entry(folder: Path, name: str) -> LaunchEntry:
    usage, known = Usage(), {one.name for one in fields(Usage)}
    with contextlib.suppress(UserError, AttributeError, TypeError):
        usage = Usage(**{key: value for key, value in read_json(folder / f"{name}.json").items() if key in known})
    return LaunchEntry(name, usage, living_holder(folder / f"{name}.lease"))


def total_of(usages: list[Usage]) -> Usage:
    """Return the sum of what launches used; it began with the first."""
    sums = {one.name: sum(getattr(usage, one.name) for usage in usages) for one in fields(Usage) if one.name != "end"}
    return Usage(**sums | {"began": min((usage.began for usage in usages), default=math.nan)})


def ask_to_stop(home: Path, by: str) -> list[LaunchEntry]:
    """Ask every launch of a grid to stop, and return those that run.

    Silent ones are asked too: a frozen process reads the request when it wakes.
    """
    asked = launches_of(home)
    if asked:
        write_json(home / STOP, {"launches": [entry.name for entry in asked], "by": by, "time": time.time()})
        push(home / STOP)
    return [entry for entry in asked if entry.holder]
