"""Addresses of storages in a bucket, and the folders that stand for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.paths import storage_root
from bwlm.remote import address_of, is_bucket, working_folder, working_root


def test_a_path_tells_its_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLM_SCRATCH", str(tmp_path))
    root = storage_root("s3://lab/runs of/2026/")
    assert root == tmp_path / "s3%3A%2F%2Flab%2Fruns%20of%2F2026"
    assert working_root(root / "run" / "checkpoints") == root
    assert address_of(root / "run") == "s3://lab/runs of/2026"
    assert storage_root("gs://lab") != storage_root("s3://lab")
    monkeypatch.delenv("BWLM_SCRATCH")
    assert working_folder("s3://lab").parent == Path.home() / ".cache" / "bwlm" / "storage"


def test_any_other_path_is_its_own_address(tmp_path: Path) -> None:
    assert working_root(tmp_path / "runs") is None
    assert address_of(tmp_path / "runs") == str(tmp_path / "runs")
    assert working_root(Path("/a/ftp%3A%2F%2Fhost/runs")) is None


@pytest.mark.parametrize(
    "address", ["runs", "file:///runs", "https://host/runs", "s3:/lab/runs", "s3://", "s3:///runs"]
)
def test_what_is_no_bucket(address: str) -> None:
    assert not is_bucket(address)


@pytest.mark.parametrize("address", ["s3://lab/../runs", "s3://lab/a//b", "s3://lab/./runs", f"s3://lab/{'n' * 250}"])
def test_addresses_that_no_object_can_have(address: str) -> None:
    with pytest.raises(UserError, match=r"^storage: "):
        working_folder(address)
