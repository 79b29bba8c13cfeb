"""The power goes between any two changes of a launch's own files: the same command finishes the grid from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bwlm.grid import training
from bwlm.grid.cells import PlannedCell
from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Plan
from bwlm.record.journal import read_journal
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.faults.night import check_tracking
from tests.grids import GridFile
from tests.runs import in_process

pytestmark = pytest.mark.usefixtures("ray_cluster")

CELLS = ["g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"]
CHANGES = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "link", "symlink")
"""Functions of `os` that change a name in a folder."""


class Recorder:
    """Copies of a storage, each as it was before one of the changes that this process made."""

    def __init__(self, storage: Path, folder: Path) -> None:
        self.copies: list[Path] = []
        self._storage, self._folder = storage, folder
        self._is_recording = False
        self._seen: set[tuple[Any, ...]] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, self._recorded(getattr(os, name)))
            self._is_recording = True
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._is_recording = self._is_recording, False
        try:
            yield
        finally:
            self._is_recording = before

    def _recorded(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*names: Any, **options: Any) -> Any:
            if self._is_recording and any(str(name).startswith(f"{self._storage}/") for name in names):
                with self.paused():
                    self._copy()
            return change(*names, **options)

        return recorded

    def _copy(self) -> None:
        if not self._storage.exists():
            return
        files = [path for path in sorted(self._storage.rglob("*")) if path.is_file()]
        state = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        if state not in self._seen:
            self._seen.add(state)
            self.copies.append(self._folder / f"{len(self.copies):03d}")
            shutil.copytree(self._storage, self.copies[-1], symlinks=True)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder of `tmp_path / "storage"`. Cells are trained in this process, and what they write is not recorded."""
    recorder = Recorder(tmp_path / "storage", tmp_path / "copies")

    def train_cells(plan: Plan, cells: list[PlannedCell], *_: Any) -> None:
        with recorder.paused():
            for planned in cells:
                with planned.folder.lease(give_up=lambda: False):
                    run_phase(planned.folder, LocalSession(), in_process)

    monkeypatch.setattr(training, "train_cells", train_cells)
    return recorder


@pytest.mark.faults
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_command_finishes_the_grid(
    every: int, grid_file: GridFile, tmp_path: Path, recorder: Recorder
) -> None:
    path, storage = grid_file(), tmp_path / "storage"
    with recorder.recording():
        calm = run_plan(load_grid(path, []), storage, lambda _: None)
    assert calm.complete
    expected = {cell: losses(storage, cell) for cell in CELLS}
    assert len(recorder.copies) > 100, "a launch makes many changes, or they were not seen"
    # each copy stays where it is: this process still has the database of the first storage open
    for copy in recorder.copies[every // 2 :: every]:
        result = run_plan(load_grid(path, []), copy, lambda _: None)
        assert result.complete, copy.name
        assert {cell: losses(copy, cell) for cell in CELLS} == expected, copy.name
        assert [cell.metrics["val_bpb"] for cell in result.cells] == [cell.metrics["val_bpb"] for cell in calm.cells]
        check_tracking(copy)
        assert (copy / "grids/g/RESEARCH_REPORT.md").exists()


def losses(storage: Path, cell: str) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(storage / cell)]
