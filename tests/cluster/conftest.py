"""One head for all tests of jobs: as docs/cluster.md starts it, with ports and folders of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import Head, new_head, start_head


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="bwj-", dir="/tmp"))
    try:
        head = new_head(folder)
        node = start_head(head, cpus=4)
        try:
            yield head
        finally:
            node.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
