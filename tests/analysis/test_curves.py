"""Learning curves and what a loss takes, of really trained runs and of figures worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bwlm.analysis.commands.compare import _sentences, at_best_rates, compare, differences, efficiency, single_curves
from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import Journal
from tests.analysis.storage import make_cell, write_losses


def curve(direction: str, seed: int, losses: list[float]) -> pd.DataFrame:
    steps = np.arange(1, len(losses) + 1)
    return pd.DataFrame(
        {
            "run": f"{direction}{seed}", "size": "d1", "direction": direction, "lr": 1.0, "seed": seed,
            "step": steps, "tokens": 100 * steps, "flops": 1e6 * steps, "seconds": 1.0 * steps, "averaged": 100.0,
            "loss": losses,
        }
    )  # fmt: skip


def test_tokens_to_reach_a_loss_by_hand() -> None:
    """The lowest loss that all reach is 1. Backward takes twice the steps with one seed and the same with the other:
    sqrt(2) in the geometric mean."""
    curves = [
        curve("forward", 0, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        curve("forward", 1, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        curve("backward", 0, [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.5, 1.0]),
        curve("backward", 1, [4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]),
    ]
    table = efficiency(pd.concat(curves, ignore_index=True))
    between = [[4.0, 3.0, 2.0, 1.0], [4.0, 2.5, 2.25, 1.0]]  # to come down to 2: after 3 steps, and 3.2
    later = efficiency(
        pd.concat([curve(name, 0, losses) for name, losses in zip(("forward", "backward"), between, strict=True)])
    )
    assert later.query("loss == 2.0")["tokens"].tolist() == pytest.approx([300, 320])
    assert sorted(set(table["loss"])) == [1.0, 2.0, 3.0]
    last = table[table["loss"] == 1.0].set_index("direction")
    assert last.loc["forward", "tokens"] == 400
    assert last.loc["backward", "tokens"] == 600
    assert last.loc["backward", "flops"] == 6e6
    assert last.loc["backward", "ratio"] == pytest.approx(math.sqrt(2))
    assert last.loc["backward", "ratio_low"] < 1 < last.loc["backward", "ratio_high"]
    assert last.loc["forward", "ratio"] == 1.0
    more = pd.concat([*curves, curve("backward", 2, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0])], ignore_index=True)
    with_unpaired = efficiency(more).query("loss == 1.0").set_index("direction")
    assert with_unpaired.loc["backward", ["seeds", "tokens"]].tolist() == [
        2,
        600,
    ]


def test_how_far_directions_are_apart_along_the_training_by_hand() -> None:
    """Over the seeds and steps that both have: 1.0, 0.5 and 0.0 apart with the three seeds, so mean 0.5 and
    t_{0.975, 2} 0.5 / sqrt 3 on either side."""
    forward = [curve("forward", seed, [4.0, 3.0, 2.0, 1.0]) for seed in range(5)]
    backward = [curve("backward", seed, [4.0 + 0.5 * (2 - seed)] * 3) for seed in range(3)]
    found = differences(pd.concat([*forward, *backward], ignore_index=True))
    assert found[["size", "direction", "against"]].drop_duplicates().to_numpy().tolist() == [
        ["d1", "backward", "forward"]
    ]
    assert found["tokens"].tolist() == [100, 200, 300]
    assert found["difference"].tolist() == pytest.approx([0.5, 1.5, 2.5])
    assert set(found["seeds"]) == {3}
    assert (found["high"] - found["difference"]).tolist() == pytest.approx([4.302653 * 0.5 / math.sqrt(3)] * 3)
    two = differences(pd.concat([*forward[:2], *backward[:2]], ignore_index=True))
    assert two["low"].isna().all()  # as with a verdict, two seeds say nothing of their spread
    assert two["difference"].tolist() == pytest.approx([0.75, 1.75, 2.75])
    assert differences(pd.concat(forward, ignore_index=True)).empty
    apart = [curve("forward", 0, [4.0, 3.0]), curve("backward", 1, [4.0, 3.0])]  # no seed is shared
    assert differences(pd.concat(apart, ignore_index=True)).empty


def test_a_direction_alone_is_told_what_it_needs_and_how_finely(folders: list[ExperimentFolder]) -> None:
    [alone] = compare([folder for folder in folders if folder.id == "f_s0"]).findings
    assert re.fullmatch(
        r"d2: forward needs [\d,]+ tokens and [\d.]+[KMGT] FLOPs to reach [\d.]+ nats per token "
        r"\(training loss, averaged over 512 tokens\): 1 seed",
        alone,
    )


def test_directions_that_share_no_seed_are_told_so() -> None:
    curves = pd.concat([curve("forward", 0, [4.0, 2.0]), curve("backward", 1, [4.0, 2.0])], ignore_index=True)
    told = _sentences(efficiency(curves))
    assert any("backward and forward share no seed" in line for line in told)
    assert "nan" not in "".join(told)


def test_curves_are_compared_at_the_rates_of_the_verdict() -> None:
    """Rate 2 has the lower training loss at the end, and rate 1 was the better one on held-out text."""
    one, two = (
        curve("forward", 0, [4.0, 3.0, end]).assign(lr=lr, run=f"r{lr}") for lr, end in ((1.0, 2.0), (2.0, 1.9))
    )
    curves = pd.concat([one, two, curve("backward", 0, [4.0, 3.0, 2.0])], ignore_index=True)
    assert set(at_best_rates(curves, {("d1", "forward"): 1.0})["run"]) == {"r1.0", "backward0"}
    assert set(at_best_rates(curves, {})["run"]) == {"r2.0", "backward0"}


def chains(storage: Path) -> list[ExperimentFolder]:
    """Base runs at two rates, each with its SFT and RL: rate 1 has the lower training loss, 2 what verdicts take."""
    found = []
    for direction in ("forward", "backward"):
        for lr in (1.0, 2.0):
            base = make_cell(storage, direction, lr=lr)
            write_losses(base, direction, [30.0 - lr + place % 3 for place in range(8)])
            base.write_status(Status("finished", "", base.config().steps))
            found.append(base)
            found += [make_cell(storage, direction, lr=lr, phase=phase) for phase in ("sft", "rl")]
            for folder in found[-3:]:
                journal = Journal(folder.path)
                for step in (1, 2):
                    metrics = {"train_loss": lr / step, "val_loss": 6.0, "val_loss_written": 0.75, "reward": 0.5}
                    journal.append(step, metrics | {"tokens": step, "flops": step, "step_seconds": 1.0})
                journal.close()
    return found


def test_phases_are_compared_by_what_their_losses_tell(tmp_path: Path) -> None:
    """Directions learn one text in base alone; SFT learns a part of its text; in RL a loss tells nothing."""
    folders = chains(tmp_path)
    found = compare(folders)
    assert set(found.table["size"]) == {"base d1"}
    assert found.notes == [
        "left out: 4 runs of RL, whose rewards `bwlm analyze rewards` shows",
        "4 runs of SFT: curves only, as each direction writes its own text there",
    ]
    curves = single_curves(folders)
    assert set(curves["size"]) == {"base d1", "sft d1"}
    assert curves.groupby("size")["val_loss"].unique().map(list).to_dict() == {"base d1": [6.0], "sft d1": [0.75]}
    alone = compare([folder for folder in folders if folder.id.startswith("g_forward_d1_lr1_s0-")])
    assert set(alone.table["direction"]) == {"forward"}
    assert alone.notes == ["left out: 1 run of RL, whose rewards `bwlm analyze rewards` shows"]
    with pytest.raises(UserError, match="in RL the loss does not show learning: use `bwlm analyze rewards`"):
        compare([folder for folder in folders if folder.id.endswith("-rl")])


def test_rates_are_the_verdicts_also_beside_other_phases(tmp_path: Path) -> None:
    """What rate 2 reaches at its end, not what rate 1 does."""
    assert compare(chains(tmp_path)).table["loss"].min() == 1.0
