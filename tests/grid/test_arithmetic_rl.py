"""Reward teaches: the shipped grid on `builtin:arithmetic`, forwards and backwards, over its seeds. Minutes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from bwlm.grid.launch import run_plan
from bwlm.plan.load import load_grid
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal

GRID = Path(__file__).parents[2] / "grids" / "arithmetic_rl.yaml"
FIRST, LAST = 5, 10
"""Steps over which rewards are averaged at the beginning and at the end."""
RISE = 0.08


def rewards(folder: ExperimentFolder) -> tuple[float, float]:
    """Mean reward of the first samples of a run, which its parent's weights wrote, and of its last."""
    found = [entry.metrics["reward"] for entry in read_journal(folder.path)]
    return float(np.mean(found[:FIRST])), float(np.mean(found[-LAST:]))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_mean_reward_rises_in_both_directions_with_every_seed(tmp_path: Path) -> None:
    """A forward model learns to answer, a time-reversed one to ask what has the given answer."""
    plan = load_grid(GRID, ["launch.concurrency=2"], str(tmp_path))
    assert run_plan(plan, tmp_path, lambda _: None).complete
    rises: dict[str, list[float]] = defaultdict(list)
    for cell in plan.cells:
        if cell.experiment.phase == "rl":
            begin, end = rewards(ExperimentFolder(tmp_path, cell.id))
            assert 0 < begin < 0.9, f"{cell.id}: SFT left nothing to learn, or nothing to learn from"
            assert end > begin + RISE, cell.id
            rises[cell.experiment.direction].append(end - begin)
    assert {direction: len(found) for direction, found in rises.items()} == {"forward": 3, "backward": 3}
