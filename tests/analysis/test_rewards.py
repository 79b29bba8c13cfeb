"""What RL came to, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bwlm.analysis.commands.rewards import rewards
from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import Journal
from tests.analysis.storage import make_cell


def rewarded(storage: Path, direction: str, seed: int, found: list[float], **more: float) -> ExperimentFolder:
    """A run with these rewards, at `step_N` a validation's, and settings of its identity."""
    at_step = {name: value for name, value in more.items() if name.startswith("step_")}
    settings = {name: value for name, value in more.items() if name not in at_step}
    folder = make_cell(storage, direction, seed, phase="rl", **settings)  # type: ignore[arg-type]
    journal = Journal(folder.path)
    for step, reward in enumerate(found, start=1):
        metrics = {"train_loss": 0.0, "reward": reward, "sample_tokens": 4.0, "finished": 0.5, "entropy": 1.0}
        validated = {"val_reward": at_step[name]} if (name := f"step_{step}") in at_step else {}
        journal.append(step, metrics | validated)
    journal.close()
    return folder


def test_rewards_at_both_ends_by_hand(tmp_path: Path) -> None:
    """The first and the last ten of 24 steps; the second run falls."""
    rising = [0.0] * 16 + [1.0] * 8
    folders = [
        rewarded(tmp_path, "forward", 0, rising, step_6=0.25, step_24=0.5),
        rewarded(tmp_path, "forward", 1, rising[::-1]),
        rewarded(tmp_path, "backward", 0, [0.5] * 20),
        make_cell(tmp_path, "forward", 2),
    ]
    found = rewards(folders)
    assert found.findings == [
        "forward: mean reward 0.400 over the first 10 steps, 0.400 over the last 10; it rose in 1 of 2 runs",
        "backward: mean reward 0.500 over the first 10 steps, 0.500 over the last 10; it rose in 0 of 1 run",
    ]
    assert found.notes == ["left out: 1 run of other phases"]
    assert found.shown is not None
    shown = found.shown.set_index("run")
    assert shown.loc[folders[0].id, ["reward at first", "reward at last"]].tolist() == [0.0, 0.8]
    assert shown.loc[folders[1].id, ["reward at first", "reward at last"]].tolist() == [0.8, 0.0]
    assert shown.loc[folders[0].id, "validation"] == 0.5
    assert shown["finished"].tolist() == [0.5] * 3
    assert shown["steps"].tolist() == [24, 24, 20]
    assert len(found.table) == 68
    assert set(found.table["run"]) == {folder.id for folder in folders[:3]}


def test_a_short_run_has_its_halves(tmp_path: Path) -> None:
    """What lies in the middle belongs to neither end, and nothing to both."""
    [told] = rewards([rewarded(tmp_path, "forward", 0, [0.0, 0.25, 1.0, 0.5, 0.75])]).findings
    assert told == "forward: mean reward 0.125 over the first 2 steps, 0.625 over the last 2; it rose in 1 of 1 run"


def test_what_differs_in_more_than_the_seed_is_a_series_of_its_own(tmp_path: Path) -> None:
    folders = [rewarded(tmp_path, "forward", 0, [0.0, 1.0], **{"rl.temperature": temp}) for temp in (0.5, 1.0)]
    found = rewards(folders)
    assert [line.partition(":")[0] for line in found.findings] == [
        "forward, d1 rl.temperature=0.5",
        "forward, d1 rl.temperature=1.0",
    ]
    panels = found.chart.to_dict()["facet"]["sort"]
    assert panels == ["forward, d1 rl.temperature=0.5", "forward, d1 rl.temperature=1.0"]


def test_runs_without_rewards_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of phase rl among these has logged a reward: name one"):
        rewards([make_cell(tmp_path, "forward"), make_cell(tmp_path, "forward", phase="rl")])
