"""Variants of a phase over their seeds, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bwlm.analysis.variants import variants, variants_section
from bwlm.record.lineage import ExperimentFolder, Status
from tests.analysis.storage import make_cell


def sft(storage: Path, frac: float, seed: int, loss: float, direction: str = "backward") -> ExperimentFolder:
    folder = make_cell(storage, direction, seed, phase="sft", **{"optim.init_lr_frac": frac})
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
    # mean 2, deviation 1: t = 2 sqrt 3, p = 2 P(T_2 > 3.4641) = 0.0742
    assert found.comparisons == [
        f"`{good}` less `{bad}`: loss of what it writes -2.0000 nats per token, "
        "95 % over 3 seeds -4.4841 .. +0.4841, p = 0.074"
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
    assert "p = 0.22" in next(line for line in found.comparisons if "0.5-sft` less" in line and "0.1-sft`" in line)


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


@pytest.mark.parametrize("state", ["failed", "stopped", "waiting"])
def test_only_what_has_finished_is_compared(tmp_path: Path, state: str) -> None:
    folder = sft(tmp_path, 0.1, 0, 2.0)
    folder.write_status(Status(state, "oh", 3))  # type: ignore[arg-type]
    assert variants([folder]) == []
    assert variants_section([folder]) == []
