"""kill -9 at every boundary of a save, and at any moment of one: what is listed loads, and the run has not lost it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bwlm.record.checkpoint import checkpoint_steps, load_checkpoint, load_newest, write_checkpoint
from tests.faults.checkpoints import is_of, names, snapshot
from tests.faults.killed_saves import POLICY, SCENARIOS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes left that were killed at each boundary, by scenario."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-m", "tests.faults.killed_saves", str(folder)], cwd=REPOSITORY, check=True)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_9_at_every_boundary_of_a_save(scenario: str, killed: Path) -> None:
    before, saves = SCENARIOS[scenario]
    folders = sorted(path for path in (killed / scenario).iterdir() if path.is_dir())
    where = [path.with_suffix(".boundary").read_text() for path in folders[:-1]] + ["unharmed"]
    assert len(where) > 25 * len(saves)

    reached = []  # how far each killed process had come: 0 is what was there before
    for folder, boundary in zip(folders, where, strict=True):
        loaded = {step: load_checkpoint(folder, step) for step in checkpoint_steps(folder)}
        known = [*before, *saves]
        assert all(any(is_of(one, saved) for saved in known) for one in loaded.values()), boundary
        newest = load_newest(folder)
        stages = [stage for stage, saved in enumerate(saves, 1) if newest is not None and is_of(newest, saved)]
        reached.append(max(stages, default=0))
        if not stages and before:
            assert newest is not None, boundary
            assert is_of(newest, max(before, key=lambda saved: saved.step)), boundary
    # a process that lived longer never leaves less, and it is done only when the last save is
    assert reached == sorted(reached)
    assert {*reached} == {*range(len(saves) + 1)}
    assert reached[-1] == len(saves)

    for folder, boundary in zip(folders, where, strict=True):
        write_checkpoint(folder, snapshot(400), POLICY)
        assert names(folder) == ["step_000400"], boundary
        assert is_of(load_checkpoint(folder, 400), snapshot(400)), boundary


_SAVER = """
import sys
from pathlib import Path
import torch
from bwlm.record.checkpoint import KeepPolicy, Snapshot, load_newest
from bwlm.record.saver import CheckpointSaver
folder = Path(sys.argv[1])
newest = load_newest(folder)
step = newest.step if newest else 0
print("ready", flush=True)
with CheckpointSaver(folder, KeepPolicy(2)) as saver:
    while True:
        step += 1
        model = {f"w{i}": torch.full((100_000,), float(step)) for i in range(4)}
        saver.save(Snapshot(step, model, {"m": torch.full((10,), float(step))}, {}, {"progress": {"step": step}}))
"""


def test_kill_9_at_any_moment_leaves_one_that_loads(tmp_path: Path) -> None:
    """Also inside safetensors' own writer, which the boundaries above leave out."""
    rng, before = random.Random(0), 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _SAVER, str(tmp_path)], stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
            while not (steps := checkpoint_steps(tmp_path)) or steps[-1] <= before:
                assert saver.poll() is None
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            saver.send_signal(signal.SIGKILL)
        listed = checkpoint_steps(tmp_path)
        newest = load_newest(tmp_path)
        assert newest is not None
        assert newest.step == listed[-1] > before  # what is listed is whole
        assert all((tensor == newest.step).all() for tensor in newest.model.values())
        assert newest.meta["progress"] == {"step": newest.step}
        before = newest.step
