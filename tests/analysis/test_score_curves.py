"""`bwlm analyze scores ID@all`: accuracy over checkpoints, as a table, a chart and sentences."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from bwlm.analysis.commands.score_curves import score_curves
from bwlm.analysis.runs.task_scores import Wanted
from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.proportions import wilson
from tests.analysis.test_report_tasks import ITEMS, cell, score
from tests.shell import Shell, check_mistake
from tests.shell import shell as shell

BOTH = Wanted(readings=("forward", "backward"))
RIGHT = {"forward": {5: 10, 10: 30, 20: 20}, "backward": {5: 0, 10: 8, 20: 12}}
"""Items that are right, by reading and step; the run ends at step 20."""


def scored(storage: Path, direction: str = "forward", seed: int = 0) -> ExperimentFolder:
    folder = cell(storage, direction, seed)
    last = folder.config().steps
    for step in RIGHT["forward"]:
        right = {reading: of[step] for reading, of in RIGHT.items()}
        score(
            folder,
            "arc_easy",
            lambda reading, rule, right=right: [float((n + seed) % ITEMS < right[reading]) for n in range(ITEMS)],  # type: ignore[misc]
            None if step == last else step,
        )
    return folder


def test_a_point_for_each_checkpoint_and_reading_by_hand(tmp_path: Path) -> None:
    """Also where all is wrong: the beginning of a curve is there."""
    folder = scored(tmp_path)
    assert folder.config().steps == 20
    found = score_curves([folder], BOTH)
    points = found.table.set_index(["reading", "step"])
    assert list(points.index) == [(reading, step) for reading in ("forward", "backward") for step in (5, 10, 20)]
    for (reading, step), point in points.iterrows():  # type: ignore[misc]
        right = RIGHT[reading][step]
        assert point["accuracy"] == right / ITEMS
        assert (point["interval_low"], point["interval_high"]) == pytest.approx(wilson(right, ITEMS))
        assert (point["seeds"], point["items"], point["chance"]) == (1, ITEMS, 0.25)
    assert found.findings == [
        "arc_easy, forward, read forward: 0.2500 at step 5, 0.5000 (95 % 0.3520 .. 0.6480) at step 20, "
        "highest 0.7500 at step 10",
        "arc_easy, forward, read backward (crossed): 0.0000 at step 5, 0.3000 (95 % 0.1807 .. 0.4543) at step 20",
    ]


def test_seeds_are_averaged_and_their_spread_widens_the_band(tmp_path: Path) -> None:
    folders = [scored(tmp_path, direction, seed) for direction in ("forward", "bidirectional") for seed in range(3)]
    table = score_curves(folders, BOTH).table
    assert set(table["seeds"]) == {3}
    assert set(table["direction"]) == {"forward", "bidirectional"}
    own = score_curves(folders, Wanted()).table
    both = own[own["direction"] == "bidirectional"].set_index("step")["accuracy"]
    assert both[10] == pytest.approx((30 + 8) / 2 / ITEMS)


def test_runs_without_scores_and_other_names_are_told(tmp_path: Path, shell: Shell) -> None:
    folder = cell(tmp_path, "forward", 0)
    with pytest.raises(UserError, match="no scores of this kind: make some with bwlm eval"):
        score_curves([folder], BOTH)
    scored(tmp_path / "other")
    with pytest.raises(UserError, match="no run has a result 'mmlu'"):
        score_curves([ExperimentFolder(tmp_path / "other", folder.id)], Wanted(("mmlu",), ("forward",)))
    answer = shell("analyze", "scores", f"{folder.id}@20", "--storage", str(tmp_path))
    check_mistake(answer, f"a curve is over all checkpoints: write {folder.id}@all")


def test_the_command_writes_chart_and_table(tmp_path: Path, shell: Shell) -> None:
    folder = scored(tmp_path)
    shown = shell(
        "analyze", "scores", f"{folder.id}@all", "--storage", str(tmp_path), "--output", "c.svg", "--output", "c.csv"
    )
    assert shown.code == 0, shown.err
    assert "highest 0.7500 at step 10" in shown.out
    table = pd.read_csv(shell.folder / "c.csv")
    assert list(table["step"]) == [5, 10, 20] * 2
    picture = (shell.folder / "c.svg").read_text()
    assert "forward, read backward (crossed)" in picture
    assert 'stroke-dasharray="7,4"' in picture
    assert picture.count("step of the checkpoint") >= 1
    answer = shell.json("analyze", "scores", f"{folder.id}@all", "--storage", str(tmp_path), "--readings", "own")
    assert [row["accuracy"] for row in answer["table"]] == [0.25, 0.75, 0.5]
    shutil.rmtree(folder.evaluation("base", "forward"))
    alone = shell.json("analyze", "scores", f"{folder.id}@all", "--storage", str(tmp_path))
    assert [row["reading"] for row in alone["table"]] == ["backward"] * 3
