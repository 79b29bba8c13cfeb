"""Real processes, real kills: with as many workers a run goes on bit for bit, with others it stays the same run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.record.checkpoint import checkpoint_steps, load_checkpoint, step_folder
from bwlm.record.experiment import ExperimentFolder
from tests.runs import STEPS, NewRun, losses, weights_digest

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"checkpoint": {"every": 2, "keep": 9}, "optim": {"weight_decay": 0.1}}


def train(folder: ExperimentFolder, world: int, deadly: int | None = None) -> None:
    step = [] if deadly is None else [str(deadly)]
    command = [sys.executable, "-m", "tests.train.worlds", str(folder.path.parent), folder.id, str(world), *step]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("compute", [{}, {"precision": "bfloat16", "attention": "blocked"}], ids=["plain", "fast"])
def test_killed_and_taken_up_it_is_the_same_run_to_the_last_bit(
    new_run: NewRun, world: int, compute: dict[str, str]
) -> None:
    calm, cut = (new_run(name, **SETTINGS, compute=compute) for name in ("calm", "cut"))
    train(calm, world)
    train(cut, world, deadly=STEPS // 2)
    train(cut, world)
    assert losses(cut) == losses(calm)
    assert weights_digest(cut) == weights_digest(calm)
    one, other = (load_checkpoint(folder.checkpoints, STEPS) for folder in (cut, calm))
    assert one.rng.keys() == {f"rank{rank}/cpu" for rank in range(world)}
    assert all(one.rng[name].equal(other.rng[name]) for name in one.rng)


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_last_bit(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the compiler's cache is another one: its kernels do not depend on when they were made."""
    compute = {"precision": "bfloat16", "attention": "blocked", "compile": True}
    calm, cut = (new_run(name, **SETTINGS, compute=compute) for name in ("calm", "cut"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    train(calm, 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    train(cut, 1, deadly=STEPS // 2)
    train(cut, 1)
    assert losses(cut) == losses(calm)
    assert weights_digest(cut) == weights_digest(calm)


def test_a_run_of_two_workers_goes_on_with_one_or_four(new_run: NewRun) -> None:
    """The first resumed loss within 1e-5, the tenth within 1e-3: the same rows at the same steps, summed elsewhere."""
    calm = new_run("calm", **SETTINGS)
    train(calm, 2)
    for world in (1, 4):
        other = new_run(f"world{world}", **SETTINGS)
        train(other, 2, deadly=5)
        for late in checkpoint_steps(other.checkpoints)[1:]:  # whole or not when the kill came
            shutil.rmtree(step_folder(other.checkpoints, late))
        assert checkpoint_steps(other.checkpoints) == [2]
        train(other, world)
        expected, found = losses(calm), losses(other)
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], rel=1e-5)
        assert found[2:] == pytest.approx(expected[2:], rel=1e-3)
        state = [load_checkpoint(folder.checkpoints, STEPS).optimizer for folder in (calm, other)]
        assert state[0].keys() == state[1].keys()


def test_workers_share_the_work_of_muon(new_run: NewRun) -> None:
    """Two ranks, sharded, train what one trains alone."""
    alone, shared = new_run("alone", **SETTINGS), new_run("shared", **SETTINGS)
    train(alone, 1)
    train(shared, 2)
    assert losses(shared)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-3)
