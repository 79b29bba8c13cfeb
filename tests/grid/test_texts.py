"""Texts of a launch: how much there is, and whether it can give a verdict, is told before anything is trained."""

from __future__ import annotations

from pathlib import Path

from bwlm.grid.texts import prepare_texts
from bwlm.plan.load import load_grid
from bwlm.text.packing import run_here
from tests.conftest import WriteShards
from tests.grids import GridFile


def told(grid: Path, storage: Path) -> list[str]:
    lines: list[str] = []
    prepare_texts(load_grid(grid, [], str(storage)), storage, run_here, lines.append)
    return lines


def test_a_launch_tells_how_much_text_there_is(grid_file: GridFile, tmp_path: Path) -> None:
    lines = told(grid_file(), tmp_path / "storage")
    [amount] = [line for line in lines if line.startswith("text: ")]
    assert amount.startswith("text: 225 documents of ")
    assert ", 75 documents of " in amount
    assert not any("warning" in line for line in lines)


def test_a_validation_text_of_one_row_is_warned_of(
    grid_file: GridFile, write_shards: WriteShards, tmp_path: Path
) -> None:
    source = write_shards(tmp_path / "few", ["the cat sat on the mat"] * 2, ["a dog ran"])
    lines = told(grid_file(data={"source": str(source)}, tokenizer={"vocab_size": 268}), tmp_path / "storage")
    assert lines[-2] == "text: 2 documents of 28 tokens to train on, 1 document of 9 tokens for validation"
    assert lines[-1] == (
        "warning: the validation text fills one row of 64 tokens, which leaves none to compare directions on: "
        "give more text"
    )
