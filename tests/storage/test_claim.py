"""Leases in a bucket: one holder at a time, by the server's word and by signs of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bwlm.errors import Interrupted
from bwlm.storage import claim as claims
from bwlm.storage.claim import Board, Claim, Seen, newest, take, take_at_once
from bwlm.storage.objects import Bucket, BucketAway, Listed
from tests.s3_server import PASS, REFUSE, FaultyProxy

pytestmark = pytest.mark.faults


@pytest.fixture
def bucket(address: str) -> Bucket:
    return Bucket(address)


def holder(place: str, seconds: float = 60.0) -> dict[str, Any]:
    return {"host": place, "pid": 1, "place": place, "seconds": seconds}


def never() -> bool:
    return False


def test_of_many_at_once_one_gets_each_number(bucket: Bucket) -> None:
    """Each holds it for a moment; no two at once, and the numbers go up by one."""
    inside, numbers = threading.Lock(), list[int]()

    def hold(n: int) -> None:
        claim, _ = take(bucket, "run", "lease", holder(f"m{n}"), 0.02, never)
        assert inside.acquire(blocking=False), "two hold it"
        numbers.append(claim.number)
        inside.release()
        claim.release()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, range(8)))
    assert numbers == list(range(1, 9))


def test_a_living_holder_is_waited_for_and_a_silent_one_is_not(bucket: Bucket) -> None:
    first, waited = take(bucket, "run", "lease", holder("one", 0.6), 0.05, never)
    assert not waited
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped on request while one:1 trained run"):
        take(bucket, "run", "lease", holder("two"), 0.05, lambda: time.monotonic() - began > 2)
    assert not first.lost
    first._over.set()  # no more signs of life, as of a frozen process
    first._thread.join()
    second, waited = take(bucket, "run", "lease", holder("two"), 0.05, never)
    assert (second.number, waited) == (2, True)
    second.release()


def test_a_process_that_died_here_is_not_waited_for(bucket: Bucket) -> None:
    """Whoever asks holds the lock of that working folder: its last holder is gone."""
    first, _ = take(bucket, "run", "lease", holder("one"), 0.05, never)
    again, waited = take(bucket, "run", "lease", holder("one"), 0.05, never)
    assert (again.number, waited) == (2, False)
    for claim in (first, again):
        claim.release()


def test_at_once_or_not_at_all(bucket: Bucket) -> None:
    first = take_at_once(bucket, "run", "launch", holder("one"))
    assert isinstance(first, Claim)
    seen = take_at_once(bucket, "run", "launch", holder("two"))
    assert isinstance(seen, Seen)
    assert seen.holder["host"] == "one"
    first.release()
    second = take_at_once(bucket, "run", "launch", holder("two"))
    assert isinstance(second, Claim)
    assert second.number == 2
    second.release()


@pytest.mark.parametrize("wrong", [-7200.0, 7200.0])
def test_the_clock_of_this_machine_decides_nothing(
    wrong: float, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take_at_once(bucket, "run", "lease", holder("one"))
    assert isinstance(first, Claim)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong)
    assert isinstance(take_at_once(bucket, "run", "lease", holder("two")), Seen)
    assert Board(bucket).living("run", "lease") is not None
    first.release()


def test_a_patient_process_waits_for_a_bucket_that_is_away(
    bucket: Bucket, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.rule = lambda request: REFUSE
    with pytest.raises(BucketAway):
        take(bucket, "run", "lock", holder("one"), 0.02, never)
    assert Board(bucket).living("run", "lease") is None

    def comes_back() -> bool:
        if len(caplog.records) and len(proxy.seen) > 12:
            proxy.rule = lambda request: PASS
        return False

    claim, waited = take(bucket, "run", "lease", holder("one"), 0.02, comes_back, patient=True)
    assert (claim.number, waited) == (1, False)
    assert caplog.text.count("does not answer") == 1
    claim.release()


def test_a_list_of_runs_asks_once_for_all_leases(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    held, over = (take_at_once(bucket, name, "lease", holder("one")) for name in ("a", "b"))
    assert isinstance(held, Claim)
    assert isinstance(over, Claim)
    over.release()
    listed: list[str] = []
    listing = Bucket.list

    def counted(self: Bucket, prefix: str) -> Iterator[Listed]:
        listed.append(prefix)
        return listing(self, prefix)

    monkeypatch.setattr(Bucket, "list", counted)
    board = Board(bucket)
    assert [name for name in ("a", "b", "c") if board.living(name, "lease")] == ["a"]
    assert [prefix for prefix in listed if prefix.startswith(claims.LEASES)] == [f"{claims.LEASES}/"]
    held.release()
    seen = newest(bucket, "a", "lease")
    assert seen is not None
    assert seen.is_free
