"""Objects of a bucket below one prefix, by the library obstore: read, written, listed, created, swapped.

Two writes are conditional, and the server decides them: `create` makes an object that is not there yet, `swap`
replaces one that has not changed since it was read. Everything that must not be lost to another writer rests on them.

obstore repeats a request that failed: a time-out, a cut connection, 503. What fails for longer raises `BucketAway`.
Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ..).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from bwlm.errors import RunError, UserError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

T = TypeVar("T")
Tag = tuple[str, str | None]
"""ETag of an object's content, and the version that Google's store compares instead of it."""

REQUEST_SECONDS = 30.0
"""Seconds that one request may take, with the content that it carries."""
RETRY_SECONDS = 60.0
"""Seconds in which a request that failed is repeated; more than one may take, so one without an answer is too."""
_RETRIES = 12
_PIECE = 5 * 2**20
"""Bytes that one request carries of a large file: the least that S3 takes as a part, so that a slow link is enough."""
_PARTS = 10_000
"""Parts of an upload, at most. Those of a file that would have more are larger."""
_PARTS_AT_ONCE = 2
_S3_VERBS = {"create": "Put"}
"""Words that S3 has in the names of its rights where Google has others."""
_DELETED_AT_ONCE = 1000
"""Objects that a server deletes in one request, at most."""


class BucketAway(RunError):
    """Bucket that does not answer now; what was written before is there."""


class AccessDenied(UserError):
    """Request that the bucket refuses to whoever has these credentials."""


@dataclass(frozen=True)
class Listed:
    """Object as a listing shows it."""

    key: str
    etag: str
    """ETag: another one, whenever the content has changed."""
    seconds: float
    """Time of the last write, in seconds since the epoch, by the server's clock."""
    size: int
    """Bytes."""


class Bucket:
    """Client of the objects below an address such as `s3://bucket/prefix`."""

    def __init__(self, address: str) -> None:
        from obstore.store import from_url

        self.address = address
        self._store = from_url(address, client_options=_client_options(), retry_config=_retries())

    def read(self, key: str) -> tuple[bytes, Tag] | None:
        """Return an object's content and tag; None if there is none."""
        import obstore

        def get() -> tuple[bytes, Tag]:
            found = obstore.get(self._store, key)
            return bytes(found.bytes()), _tag(found.meta)

        return self._try(get)

    def download(self, key: str, size: int, target: Path) -> bool:
        """Write an object's content, of so many bytes, to a file; return False if there is no such object.

        Of an empty one nothing is asked.
        """
        import obstore

        def get() -> bool:
            with target.open("wb") as file:
                for start in range(0, size, _PIECE):
                    file.write(obstore.get_range(self._store, key, start=start, end=min(start + _PIECE, size)))
            return True

        return bool(self._try(get))

    def write(self, key: str, content: bytes | IO[bytes]) -> None:
        """Write an object; it appears whole, or not at all."""
        import obstore

        size = len(content) if isinstance(content, bytes) else os.fstat(content.fileno()).st_size
        part = max(_PIECE, math.ceil(size / _PARTS))
        self._try(lambda: obstore.put(self._store, key, content, chunk_size=part, max_concurrency=_PARTS_AT_ONCE))

    def create(self, key: str, content: bytes) -> bool:
        """Write an object that is not there yet; return False if it is there. Of several writers one succeeds."""
        return self._conditional(key, content, "create") is not None

    def swap(self, key: str, content: bytes, tag: Tag | None) -> Tag | None:
        """Replace an object whose tag is still `tag`, or make it if that is None; return the new tag, None if refused.

        `content` must differ from the content of all other writers: a server that carried the request out, but whose
        answer was lost, refuses it when it is repeated.
        """
        return self._conditional(key, content, "create" if tag is None else _condition(tag))

    def _conditional(self, key: str, content: bytes, mode: Any) -> Tag | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put() -> Tag | None:
            try:
                return _tag(obstore.put(self._store, key, content, mode=mode, use_multipart=False))
            except (AlreadyExistsError, PreconditionError):
                there = self.read(key)
                return there[1] if there is not None and there[0] == content else None

        return self._try(put)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no fault."""
        import obstore

        left = list(keys)
        for start in range(0, len(left), _DELETED_AT_ONCE):
            some = left[start : start + _DELETED_AT_ONCE]
            self._try(lambda some=some: obstore.delete(self._store, some))  # type: ignore[misc]

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield the objects whose keys begin with a folder's name, in the order of their keys."""
        import obstore

        found = self._try(lambda: obstore.list(self._store, prefix).collect()) or []
        for one in found:
            yield Listed(one["path"], str(one["e_tag"]), one["last_modified"].timestamp(), one["size"])

    @cached_property
    def clock_ahead(self) -> float:
        """Seconds by which the server's clock is ahead of this machine's; 0 if nothing can be written there."""
        key = f".probe/{uuid.uuid4().hex}"
        try:
            self.write(key, b"")
            ahead = [one.seconds - time.time() for one in self.list(".probe/") if one.key == key]
            self.delete([key])
        except (RunError, UserError):
            return 0.0
        return ahead[0] if ahead else 0.0

    def check(self) -> None:
        """Raise `UserError` unless everything works here that a launch does, each by a real request.

        Objects must be created, read, replaced, listed and deleted, and the server must keep two writers apart. The
        error names the right that is missing.
        """
        key = f".probe/{uuid.uuid4().hex}"
        try:
            self._check_conditions(key)
            with self._needs("list"):
                is_listed = any(one.key == key for one in self.list(".probe/"))
            with self._needs("delete"):
                self.delete([key])
            if not is_listed or self.read(key) is not None:
                raise UserError(f"storage: {self.address}: a new object is not listed, or a deleted one still there")
        finally:
            with contextlib.suppress(RunError, UserError):
                self.delete([key])

    def _check_conditions(self, key: str) -> None:
        """Raise `UserError` unless the server refuses a second creation, and a swap of what has changed."""
        with self._needs("create"):
            first = self.create(key, b"first")
        with self._needs("get"):  # once it is created, a refusal makes `create` read it
            second = self.create(key, b"second")
            found = self.read(key)
        if not first or second:
            raise UserError(
                f"storage: {self.address}: this server creates an object twice (it ignores If-None-Match), so two "
                "launches could train one run: use a server that refuses the second"
            )
        swapped = self.swap(key, b"third", found[1]) if found else None
        if found is None or swapped is None or self.swap(key, b"late", found[1]):
            raise UserError(
                f"storage: {self.address}: this server does not replace an object on the condition that it is "
                "unchanged (If-Match), so a late writer could undo a run: use a server that does"
            )

    @contextlib.contextmanager
    def _needs(self, action: str) -> Iterator[None]:
        """Name the right that the block needs if access is denied."""
        try:
            yield
        except AccessDenied as error:
            s3 = "s3:ListBucket" if action == "list" else f"s3:{_S3_VERBS.get(action, action.title())}Object"
            right = f"storage.objects.{action}" if self.address.startswith("gs://") else s3
            raise UserError(f"{error}; refused was: to {action} objects ({right})") from None

    def _try(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns, or None for an object that is not there; name every other failure."""
        from obstore.exceptions import BaseError

        try:
            return action()
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._named(error) from None
            return None
        except BaseError as error:
            raise self._named(error) from None

    def _named(self, error: Exception) -> RunError | UserError:
        text = str(error)
        where = f"storage: {self.address}"
        if "NoSuchBucket" in text or "bucket does not exist" in text:
            return UserError(f"{where}: there is no such bucket: make it, or correct the address")
        if "169.254.169.254" in text or "metadata.google" in text:
            return UserError(f"{where}: no credentials: set {_credentials(self.address)}")
        if re.search(r"\b(401|403)\b|AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId", text):
            return AccessDenied(f"{where}: access is denied: check {_credentials(self.address)} and their rights")
        return BucketAway(f"{where} does not answer ({_reason(text)})")


def _tag(meta: Any) -> Tag:
    return str(meta["e_tag"]), meta["version"]


def _condition(tag: Tag) -> dict[str, str]:
    etag, version = tag
    return {"e_tag": etag} | ({"version": version} if version else {})


def _retries() -> RetryConfig:
    shortest, longest = timedelta(milliseconds=500), timedelta(seconds=5)
    return {
        "max_retries": _RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        "backoff": {"init_backoff": shortest, "max_backoff": longest},
    }


def _client_options() -> ClientConfig:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=5),
        "allow_http": endpoint.startswith("http://"),
    }


def _credentials(address: str) -> str:
    if address.startswith("gs://"):
        return "GOOGLE_APPLICATION_CREDENTIALS"
    return "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"


def _reason(text: str) -> str:
    """Return the cause in an error of obstore, whose text goes on with requests and Rust structures."""
    if status := re.search(r"status code: (\d{3} [\w ]+)", text):
        return status[1].strip()
    causes = ("error sending request", "timed out", "connection closed", "error decoding response body")
    named = next((cause for cause in causes if cause in text), None)
    return named or text.splitlines()[0][:120]
