"""`bwlm grid run --extend`: cells are added beside those of the last launch, and none of these is lost or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bwlm.errors import UserError
from bwlm.grid.extend import check_extends
from bwlm.plan.load import load_grid
from bwlm.record.grids import GRID_FILE, grid_folder, write_cells
from tests.grids import GridFile
from tests.shell import Shell, check_mistake


@pytest.fixture
def launched(grid_file: GridFile, tmp_path: Path) -> Path:
    """A storage in which a grid of two directions was launched, as its folder tells it."""
    storage = tmp_path / "storage"
    plan = load_grid(grid_file(), [])
    write_cells(storage, "g", [cell.id for cell in plan.cells])
    assert plan.grid_text is not None
    (grid_folder(storage, "g") / GRID_FILE).write_text(plan.grid_text)
    return storage


@pytest.mark.parametrize(
    ("setting", "new"),
    [
        ("axes.seed=[0,1]", ["g_forward_d1_lr1_s1", "g_backward_d1_lr1_s1"]),
        ("axes.lr=[0.5,1.0]", ["g_forward_d1_lr0.5_s0", "g_backward_d1_lr0.5_s0"]),
        ("axes.depth=[2,1]", ["g_forward_d2_lr1_s0", "g_backward_d2_lr1_s0"]),
        ("axes.direction=[forward,backward,bidirectional]", ["g_bidirectional_d1_lr1_s0"]),
        ("also=[{direction: [permuted], depth: [1], lr: [1.0], seed: [5]}]", ["g_permuted_d1_lr1_s5"]),
        ("launch.concurrency=2", []),
        ("checkpoint.every=2", []),
    ],
)
def test_new_values_are_new_cells(setting: str, new: list[str], launched: Path, grid_file: GridFile) -> None:
    assert check_extends(load_grid(grid_file(), [setting]), launched) == new


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["axes.seed=[1,2]"], "2 cells of its last launch would be left out (g_forward_d1_lr1_s0 and 1 more): keep"),
        (
            ["axes.direction=[forward]"],
            "1 cell of its last launch would be left out (g_backward_d1_lr1_s0): keep",
        ),
        (["axes.model.document_mask=[true,false]"], "2 cells of its last launch would be left out"),
        (
            ["budget.steps=20", "axes.seed=[0,1]"],
            "g_forward_d1_lr1_s0 would have other settings (steps: 12 -> 20): put them back, or give the grid another",
        ),
        (["model.sequence_length=32"], "would have other settings (model.sequence_length: 64 -> 32)"),
        (["data.source=docs"], " -> docs)"),
        (["budget.steps=20", "evaluation.tokens=512"], "(evaluation.tokens: 2048 -> 512; steps: 12 -> 20)"),
    ],
)
def test_no_cell_of_the_last_launch_may_be_lost_or_changed(
    settings: list[str], told: str, launched: Path, grid_file: GridFile
) -> None:
    """Also of cells that have not begun, so that no folder says what they were."""
    with pytest.raises(UserError) as caught:
        check_extends(load_grid(grid_file(), settings), launched)
    assert str(caught.value).startswith("g: --extend: ")
    assert told in str(caught.value)


def test_a_grid_that_was_never_run_is_told(launched: Path, grid_file: GridFile, shell: Shell) -> None:
    arguments = ("grid", "run", str(grid_file("h")), "--extend", "--storage", str(launched))
    check_mistake(shell(*arguments), "h: --extend: no grid of this name was run in ")


def test_the_command_refuses_before_it_starts_and_says_what_is_new(
    launched: Path, grid_file: GridFile, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("here it starts")

    monkeypatch.setattr("bwlm.grid.launch.run_plan", refuse)
    command = ("grid", "run", str(grid_file()), "--storage", str(launched), "--extend")
    check_mistake(
        shell(*command, "--set", "axes.seed=[1]"), "g: --extend: 2 cells of its last launch would be left out"
    )
    answer = shell(*command, "--set", "axes.seed=[0,1]")
    assert answer.err == "extends g: 2 new cells beside 2\nbwlm: here it starts\n"
