"""One S3 server for the tests of this folder, a fresh prefix for each test, and working folders as of two machines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bwlm.remote import working_folder
from bwlm.storage import objects
from bwlm.storage.folder import SharedFolder, bucket_at
from bwlm.storage.opened import board_of
from tests.s3_server import BUCKET, CREDENTIALS, FaultyProxy, faulty_proxy, s3_server

Machine = Callable[[str], Path]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as url:
        yield url


@pytest.fixture(autouse=True)
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of repetitions instead of half a minute."""
    monkeypatch.setattr(objects, "_RETRIES", 3)


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the server, by which this process reaches it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with faulty_proxy(s3) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket_at.cache_clear()
        board_of.cache_clear()
        yield server
    bucket_at.cache_clear()
    board_of.cache_clear()


@pytest.fixture
def address(proxy: FaultyProxy) -> str:
    """An empty storage in the bucket."""
    return f"s3://{BUCKET}/storage-{next(_numbers)}"


@pytest.fixture
def machine(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """(name) -> the working folder of the storage on a machine of that name; this process is on it from then on."""

    def on(name: str) -> Path:
        monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path / name))
        root = working_folder(address)
        root.mkdir(parents=True, exist_ok=True)
        return root

    return on


@pytest.fixture
def folder_on(machine: Machine) -> Callable[[str], SharedFolder]:
    """(name) -> the folder `run` on a machine of that name."""
    return lambda name: SharedFolder(machine(name), "run")
