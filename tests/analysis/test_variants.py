"""Variants of a phase over their seeds, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bwlm.analysis.report.variants import variants, variants_section
from bwlm.record.experiment import ExperimentFolder, Status
from tests.analysis.storage import make_cell
from tests.families import rewrite_config


def sft(
    storage: Path, frac: float, seed: int, loss: float, direction: str = "backward", parent: str = "p", **more: Any
) -> ExperimentFolder:
    folder = make_cell(storage, direction, seed, phase="sft", parent=parent, **{"optim.init_lr_frac": frac, **more})
    metrics = {"val_loss_written": loss, "val_loss": 9.0, "val_bpb": 2.0}
    folder.write_status(Status("finished", "", folder.config().steps, metrics))
    return folder


def test_a_variant_is_the_mean_of_its_seeds_and_the_better_one_comes_first(tmp_path: Path) -> None:
    """1, 2, 3 have the mean 2 and t_{0.975, 2} 1 / sqrt 3 = 2.4841 on either side; the pairs differ by 1, 2 and 3."""
    folders = [sft(tmp_path, 0.1, seed, loss) for seed, loss in enumerate([2.0, 4.0, 6.0])]
    folders += [sft(tmp_path, 0.5, seed, loss) for seed, loss in enumerate([1.0, 2.0, 3.0])]
    [found] = variants(folders)
    assert found.phase == "sft"
    assert found.header == [
        *("id", "direction", "depth", "init_lr_frac", "seeds"),
        *("loss of what it writes", "loss of all text", "bpb"),
    ]
    good, bad = (f"g_backward_d1_lr1_s*_optim.init_lr_frac{frac}-sft" for frac in (0.5, 0.1))
    assert found.rows == [
        [good, "backward", "1", "0.5", "3", "2.0000 ± 2.4841", "9.0000 ± 0.0000", "2.0000 ± 0.0000"],
        [bad, "backward", "1", "0.1", "3", "4.0000 ± 4.9683", "9.0000 ± 0.0000", "2.0000 ± 0.0000"],
    ]
    assert found.in_short() == [
        ["id", "seeds", "loss of what it writes", "loss of all text", "bpb"],
        [good, "3", "2.0000 ± 2.4841", "9.0000 ± 0.0000", "2.0000 ± 0.0000"],
        [bad, "3", "4.0000 ± 4.9683", "9.0000 ± 0.0000", "2.0000 ± 0.0000"],
    ]
    # mean 2, deviation 1: t = 2 sqrt 3, p = 2 P(T_2 > 3.4641) = 0.0742
    assert found.comparisons == [
        f"`{good}` → `{bad}`: loss of what it writes +2.0000 nats per token, "
        "95 % over 3 seeds -0.4841 .. +4.4841, p = 0.074"
    ]
    text = "\n".join(variants_section(folders))
    assert f"- {found.comparisons[0]}" in text
    assert "the paired t-test over the seeds that both have" in text.replace("\n", " ")


def test_more_than_one_pair_is_judged_together(tmp_path: Path) -> None:
    """Three pairs: the p of the clearest is multiplied by 3 (Holm)."""
    for frac, losses in ((0.1, [2.0, 4.0, 6.0]), (0.5, [1.0, 2.0, 3.0]), (0.9, [2.5, 4.0, 7.0])):
        folders = [sft(tmp_path, frac, seed, loss) for seed, loss in enumerate(losses)]
    folders = [ExperimentFolder(tmp_path, path.name) for path in sorted(tmp_path.iterdir())]
    [found] = variants(folders)
    assert len(found.comparisons) == 3
    assert "p = 0.22" in next(line for line in found.comparisons if "0.5-sft` →" in line and "0.1-sft`" in line)


def test_few_seeds_tell_nothing_and_directions_are_not_compared(tmp_path: Path) -> None:
    one = sft(tmp_path, 0.1, 0, 2.0)
    assert variants([one])[0].comparisons == []
    assert variants([one])[0].rows[0][0] == one.id
    assert "seeds" not in variants([one])[0].header
    assert variants([one, sft(tmp_path, 0.1, 0, 1.0, "forward")])[0].comparisons == []
    [found] = variants([one, sft(tmp_path, 0.5, 0, 1.0), sft(tmp_path, 0.5, 1, 1.5)])
    assert found.comparisons == ["variants with under 3 seeds in common: too few to tell which is better"]
    assert found.rows[0][-3:] == ["1.2500", "9.0000", "2.0000"]


def test_in_rl_the_higher_reward_is_the_better(tmp_path: Path) -> None:
    for lr, reward in ((1.0, 0.25), (2.0, 0.5)):
        folder = make_cell(tmp_path, "forward", lr=lr, phase="rl")
        metrics = {"val_loss_written": 1.0, "val_loss": 1.0, "val_bpb": 2.0, "val_reward": reward}
        folder.write_status(Status("finished", "", 1, metrics))
    [found] = variants([ExperimentFolder(tmp_path, path.name) for path in sorted(tmp_path.iterdir())])
    assert [row[-1] for row in found.rows] == ["0.5000", "0.2500"]
    assert [row[found.header.index("lr")] for row in found.rows] == ["2.0", "1.0"]


def test_runs_of_one_base_count_as_their_mean(tmp_path: Path) -> None:
    """Two bases with two runs each are two seeds; one run that is missing is missing in both variants."""
    for base in (0, 1):
        parent = make_cell(tmp_path, "backward", base).id
        for own in (5, 6):
            for frac in (0.1, 0.5):
                sft(tmp_path, frac, own, base + own + 10 * frac, parent=parent, base=base)
    runs = [ExperimentFolder(tmp_path, path.name) for path in sorted(tmp_path.glob("*-sft"))]
    for run in runs:
        identity = {name: value for name, value in run.config().identity.items() if name != "base"}
        rewrite_config(run, identity=identity)  # it was for the id alone
    [found] = variants(runs)
    assert [row[found.header.index("seeds")] for row in found.rows] == ["2", "2"]
    assert [row[found.header.index("loss of what it writes")] for row in found.rows] == ["7.0000", "11.0000"]
    assert found.comparisons == ["variants with under 3 seeds in common: too few to tell which is better"]
    [partly] = variants(runs[:-1])
    assert [row[partly.header.index("seeds")] for row in partly.rows] == ["2", "2"]


def test_another_past_is_another_variant(tmp_path: Path) -> None:
    """Bases of other lengths are no seeds, whatever they are called."""
    folders = []
    for number, steps in enumerate((5, 9, 13)):
        parent = make_cell(tmp_path, "backward", number, **{"optim.weight_decay": 0.1 * number}).id
        folder = ExperimentFolder(tmp_path, parent)
        rewrite_config(folder, identity=folder.config().identity | {"seed": 0, "steps": steps})
        folders.append(sft(tmp_path, 0.1, number, 2.0 + number, parent=parent, parent_recipe=f"{steps}"))
    [found] = variants(folders)
    assert [row[0] for row in found.rows] == [folder.id for folder in folders]
    assert found.header[3:5] == ["base weight_decay", "base steps"]
    assert "seeds" not in found.header


@pytest.mark.parametrize("name", ["data", "reversal", "model.sequence_length"])
def test_losses_of_other_text_are_not_compared(tmp_path: Path, name: str) -> None:
    folders = [sft(tmp_path, 0.1, seed, 2.0 + 0.1 * seed, **{name: "one"}) for seed in range(3)]
    folders += [sft(tmp_path, 0.1, seed, 1.0 + 0.1 * seed, **{name: "other"}) for seed in range(3)]
    [found] = variants(folders)
    assert len(found.rows) == 2
    assert found.comparisons == []


@pytest.mark.parametrize("state", ["failed", "stopped", "waiting"])
def test_only_what_has_finished_is_compared(tmp_path: Path, state: str) -> None:
    folder = sft(tmp_path, 0.1, 0, 2.0)
    folder.write_status(Status(state, "oh", 3))  # type: ignore[arg-type]
    assert variants([folder]) == []
    assert variants_section([folder]) == []
