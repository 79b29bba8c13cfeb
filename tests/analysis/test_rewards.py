"""What RL came to, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bwlm.analysis.rewards import rewards
from bwlm.errors import UserError
from bwlm.record.journal import Journal
from bwlm.record.lineage import ExperimentFolder
from tests.analysis.storage import make_cell


def rewarded(storage: Path, direction: str, seed: int, found: list[float], **at_step: float) -> ExperimentFolder:
    """A run with these rewards, and at `step_N` a validation's."""
    folder = make_cell(storage, direction, seed, phase="rl")
    journal = Journal(folder.path)
    for step, reward in enumerate(found, start=1):
        metrics = {"train_loss": 0.0, "reward": reward, "sample_tokens": 4.0, "finished": 0.5, "entropy": 1.0}
        validated = {"val_reward": at_step[name]} if (name := f"step_{step}") in at_step else {}
        journal.append(step, metrics | validated)
    journal.close()
    return folder


def test_rewards_at_both_ends_by_hand(tmp_path: Path) -> None:
    """The first and the last ten of twelve steps; the second run falls."""
    rising = [0.0] * 10 + [1.0] * 2
    folders = [
        rewarded(tmp_path, "forward", 0, rising, step_6=0.25, step_12=0.5),
        rewarded(tmp_path, "forward", 1, rising[::-1]),
        rewarded(tmp_path, "backward", 0, [0.5] * 3),
        make_cell(tmp_path, "forward", 2),
    ]
    found = rewards(folders)
    assert found.findings == [
        "forward: mean reward 0.100 over the first 10 steps, 0.100 over the last 10; it rose in 1 of 2 runs",
        "backward: mean reward 0.500 over the first 10 steps, 0.500 over the last 10; it rose in 0 of 1 runs",
    ]
    assert found.notes == ["left out: 1 run of other phases"]
    assert found.shown is not None
    shown = found.shown.set_index("run")
    assert shown.loc[folders[0].id, ["reward at first", "reward at last"]].tolist() == [0.0, 0.2]
    assert shown.loc[folders[1].id, ["reward at first", "reward at last"]].tolist() == [0.2, 0.0]
    assert shown.loc[folders[0].id, "validation"] == 0.5
    assert shown["finished"].tolist() == [0.5] * 3
    assert shown["steps"].tolist() == [12, 12, 3]
    assert len(found.table) == 27
    assert set(found.table["run"]) == {folder.id for folder in folders[:3]}


def test_runs_without_rewards_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of these runs is of phase rl and has rewards: name some that are"):
        rewards([make_cell(tmp_path, "forward"), make_cell(tmp_path, "forward", phase="rl")])
