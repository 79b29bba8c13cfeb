"""Grids that score their cells on tasks, on a real Ray cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.evaluate.tasks import request
from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from tests.evaluate.tasks.test_stored import row, write
from tests.grids import GridFile

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    request.read_tasks.cache_clear()
    return write(tmp_path / "arc", [row(n) for n in range(6)])


def scores_of(storage: Path, cell: str) -> list[str]:
    return sorted(path.name for path in (storage / cell / "evaluations").rglob("arc_easy*.json"))


def test_a_grid_scores_its_cells_and_those_that_finished_before(grid_file: GridFile, arc: Path, tmp_path: Path) -> None:
    """One cell has two workers. Tasks that are asked for later are scored without training anything again."""
    tasks = {"arc_easy": {"path": str(arc)}}
    evaluation = {"every": 6, "tokens": 2048, "tasks": ["arc_easy"], "max_examples": 3}
    also = {"evaluation": evaluation, "tasks": tasks, "checkpoint": {"every": 6}}
    path, storage, said = grid_file(**also), tmp_path / "storage", list[str]()
    one, other = (f"g_{direction}_d1_lr1_s0" for direction in ("forward", "backward"))
    names = ["arc_easy.n3.json"] * 2 + ["arc_easy@6.n3.json"] * 2
    with_two = ["resources.workers=2", "axes.direction=[forward]"]
    assert run_plan(load_grid(path, with_two), storage, said.append).complete
    assert scores_of(storage, one) == names
    assert not (storage / one / "warnings.log").exists()
    unscored = ["evaluation.tasks=[]"]
    assert run_plan(load_grid(path, unscored), storage, said.append).complete
    assert not scores_of(storage, other)
    trained = {cell: (storage / cell / "metrics.jsonl").read_bytes() for cell in (one, other)}
    with_gpus = ["resources.gpus_per_worker=1"]  # as if trained elsewhere: scores need none
    result = run_plan(load_grid(path, with_gpus), storage, said.append)
    assert result.complete
    assert "scoring 1 finished cell on tasks" in said
    assert scores_of(storage, other) == names
    assert {cell: (storage / cell / "metrics.jsonl").read_bytes() for cell in (one, other)} == trained
    assert run_plan(load_grid(path, []), storage, said.append).was_over


def test_a_cell_whose_checkpoints_are_gone_keeps_no_other_from_being_scored(
    grid_file: GridFile, arc: Path, tmp_path: Path
) -> None:
    path, storage, said = grid_file(tasks={"arc_easy": {"path": str(arc)}}), tmp_path / "storage", list[str]()
    one, other = (f"g_{direction}_d1_lr1_s0" for direction in ("forward", "backward"))
    assert run_plan(load_grid(path, []), storage, said.append).complete
    shutil.rmtree(storage / one / "checkpoints")
    assert run_plan(load_grid(path, ["evaluation.tasks=[arc_easy]"]), storage, said.append).complete
    assert len(scores_of(storage, other)) == 2
    assert [line for line in said if line.startswith(f"tasks: {one}: no checkpoint in ")]


def test_tasks_that_cannot_be_read_stop_a_launch_before_anything_is_made(grid_file: GridFile, tmp_path: Path) -> None:
    path = grid_file(evaluation={"tasks": ["arc_easy"]}, tasks={"arc_easy": {"path": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match="gone"):
        run_plan(load_grid(path, []), tmp_path / "storage", lambda _: None)
    assert not (tmp_path / "storage").exists()
