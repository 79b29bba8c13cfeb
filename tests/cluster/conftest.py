"""One head for all tests of jobs: as docs/cluster.md starts it, with ports and folders of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.heads import Head, started_head


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    with started_head(cpus=4) as started:
        yield started
