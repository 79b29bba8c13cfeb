"""What is noted of a cell when it ends, where the disk takes no note."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest

from bwlm.grid.scheduling import CellStates
from bwlm.record.lineage import ExperimentFolder, Status
from bwlm.train.termination import Termination
from tests.analysis.storage import make_cell


class Heard:
    def __init__(self) -> None:
        self.ends: list[tuple[str, Status]] = []

    def ended(self, cell: str, status: Status) -> None:
        self.ends.append((cell, status))


def test_an_end_that_cannot_be_noted_does_not_end_the_other_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: ExperimentFolder, status: Status) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, heard = make_cell(tmp_path, "forward"), Heard()
    states = CellStates(tmp_path, cast(Any, heard), Termination())
    monkeypatch.setattr(ExperimentFolder, "write_status", full)
    states._close(folder, Status(), Status("failed", "crashed", 3))
    assert heard.ends == [(folder.id, Status("failed", "crashed", 3))]
    assert f"{folder.path}: cannot be written (No space left on device): free space there" in caplog.text
