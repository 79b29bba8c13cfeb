"""Objects of a real S3 server: conditional writes, and what is repeated when the network fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.storage import objects
from bwlm.storage.objects import Bucket, BucketAway, Tag
from tests.s3_server import CUT, DENY, LOSE, PASS, REFUSE, SLOW, FaultyProxy, Request, Rule

pytestmark = pytest.mark.faults
RETRIES = objects._RETRIES
"""The real number, which the other tests do not wait for."""


@pytest.fixture
def bucket(address: str) -> Bucket:
    return Bucket(address)


def content_of(bucket: Bucket, key: str) -> bytes | None:
    found = bucket.read(key)
    return found[0] if found else None


def first(count: int, action: str, method: str = "PUT") -> Rule:
    """Rule: the first requests of a method meet a fault, the rest pass."""
    left = [count]

    def rule(request: Request) -> str:
        if request.method == method and left[0] > 0:
            left[0] -= 1
            return action
        return PASS

    return rule


def test_the_server_refuses_the_second_of_many_creations(bucket: Bucket) -> None:
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda n: bucket.create("one", str(n).encode()), range(64)))
    assert sum(won) == 1
    assert content_of(bucket, "one") == str(won.index(True)).encode()


def test_the_server_refuses_a_swap_of_what_has_changed(bucket: Bucket) -> None:
    tag = bucket.swap("head", b"first", None)
    newer = bucket.swap("head", b"second", tag)
    assert newer is not None
    assert bucket.swap("head", b"late", tag) is None
    assert bucket.swap("head", b"as if there were none", None) is None
    assert bucket.read("head") == (b"second", newer)


def test_a_server_that_creates_twice_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.check()
    assert not list(bucket.list(".probe/"))
    monkeypatch.setattr(bucket, "create", lambda key, content: True)
    with pytest.raises(UserError, match="creates an object twice"):
        bucket.check()


@pytest.mark.parametrize("fault", [REFUSE, CUT, LOSE])
def test_a_write_that_fails_is_repeated(bucket: Bucket, proxy: FaultyProxy, fault: str) -> None:
    proxy.rule = first(2, fault)
    bucket.write("data", content := os.urandom(300_000))
    assert content_of(bucket, "data") == content


@pytest.mark.parametrize("fault", [REFUSE, CUT, LOSE])
def test_a_conditional_write_whose_answer_is_lost_still_counts(bucket: Bucket, proxy: FaultyProxy, fault: str) -> None:
    """The server has carried it out, so it refuses the repetition: that is no other writer's."""
    proxy.rule = first(1, fault)
    assert bucket.create("lease", b"mine")
    assert not bucket.create("lease", b"another's")
    tag = bucket.swap("head", b"first", None)
    proxy.rule = first(1, fault)
    assert bucket.swap("head", b"second", tag)


def test_a_cut_upload_leaves_no_half_object(bucket: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    """Also in one of several parts of a large file."""
    large = tmp_path / "large"
    large.write_bytes(os.urandom(40 * 2**20))
    proxy.rule = lambda request: CUT if request.method == "PUT" else PASS
    with large.open("rb") as file, pytest.raises(BucketAway, match="does not answer"):
        bucket.write("large", file)
    assert bucket.read("large") is None
    proxy.rule = first(1, CUT)
    with large.open("rb") as file:
        bucket.write("large", file)
    assert bucket.download("large", large.stat().st_size, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == large.read_bytes()


def test_a_server_that_stays_away_is_one_error_in_bounded_time(
    bucket: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_RETRIES", RETRIES)
    began = time.monotonic()
    proxy.rule = lambda request: REFUSE
    with pytest.raises(BucketAway, match=r"storage: s3://.* does not answer \(503 Service Unavailable\)"):
        Bucket(bucket.address).read("data")
    assert 3 < time.monotonic() - began < 2 * objects.RETRY_SECONDS


def test_a_slow_server_is_waited_for(bucket: Bucket, proxy: FaultyProxy) -> None:
    proxy.rule = first(1, SLOW)
    bucket.write("data", b"late")
    assert content_of(bucket, "data") == b"late"


def impatient(address: str, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Bucket:
    """A client whose requests may take so many seconds."""
    monkeypatch.setattr(objects, "RETRY_SECONDS", objects.RETRY_SECONDS / objects.REQUEST_SECONDS * seconds)
    monkeypatch.setattr(objects, "REQUEST_SECONDS", seconds)
    return Bucket(address)


def test_a_request_without_an_answer_is_repeated(
    address: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = impatient(address, monkeypatch, 2.0)
    bucket.write("data", b"there")
    proxy.slow_seconds = 8.0
    proxy.rule = first(1, SLOW, "GET")
    assert content_of(bucket, "data") == b"there"


@pytest.mark.parametrize("size", [0, 14 * 2**20])
def test_a_large_file_needs_no_fast_link(
    size: int, address: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it takes longer than one request may, there and back."""
    bucket = impatient(address, monkeypatch, 4.0)
    content = os.urandom(size)
    proxy.rate = 2.5 * 2**20
    bucket.write("large", content)
    began = time.monotonic()
    assert bucket.download("large", size, tmp_path / "large")
    assert size == 0 or time.monotonic() - began > 4.0
    assert (tmp_path / "large").read_bytes() == content
    assert not bucket.download("missing", 1, tmp_path / "missing")


def test_a_bucket_that_is_not_there_is_named(proxy: FaultyProxy) -> None:
    with pytest.raises(UserError, match="there is no such bucket"):
        list(Bucket("s3://no-such-bucket/runs").list(""))
    with pytest.raises(UserError, match="there is no such bucket"):
        Bucket("s3://no-such-bucket/runs").check()


@pytest.mark.parametrize(
    ("is_denied", "right"),
    [
        (lambda request: request.method == "PUT", "to create objects (s3:PutObject)"),
        (lambda request: request.method == "GET" and not request.lists, "to get objects (s3:GetObject)"),
        (lambda request: request.lists, "to list objects (s3:ListBucket)"),
        (lambda request: request.method == "POST", "to delete objects (s3:DeleteObject)"),
    ],
)
def test_the_right_that_is_missing_is_named(
    bucket: Bucket, proxy: FaultyProxy, is_denied: Callable[[Request], bool], right: str
) -> None:
    proxy.rule = lambda request: DENY if is_denied(request) else PASS
    with pytest.raises(UserError, match=r"access is denied: check AWS_ACCESS_KEY_ID, .*; refused was: ") as caught:
        bucket.check()
    assert str(caught.value).endswith(right)


def test_a_server_that_ignores_if_match_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(key: str, content: bytes, tag: Tag | None) -> Tag:
        bucket.write(key, content)
        return "new", None

    monkeypatch.setattr(bucket, "swap", swap)
    with pytest.raises(UserError, match="does not replace an object on the condition"):
        bucket.check()
