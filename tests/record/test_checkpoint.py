"""Checkpoints: bit for bit, whole or not at all, checked before they are loaded, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bwlm.errors import RunError
from bwlm.record.checkpoint import (
    Tensors,
    checkpoint_steps,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    step_folder,
)

ALL = ["model.safetensors", "optimizer.safetensors", "meta.json"]


def tensors(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, generator=generator).bfloat16(),
        "steps": torch.tensor(step),
        "empty": torch.zeros(0),
    }


def save(folder: Path, step: int, keep: int = 9) -> None:
    meta = {"progress": {"step": step, "smooth_loss": 0.1 + step}}
    save_checkpoint(folder, step, tensors(step), {"exp_avg": tensors(step)["a"]}, meta, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    model = tensors(7) | {"transposed": torch.arange(6.0).reshape(2, 3).T, "special": torch.tensor([-0.0, 1e-45])}
    save_checkpoint(tmp_path, 7, model, {"m": tensors(8)["a"]}, {"progress": {"smooth_loss": 0.1 + 0.2}}, keep=1)
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 7
    assert loaded.meta["progress"] == {"smooth_loss": 0.1 + 0.2}
    assert loaded.model.keys() == model.keys()
    for name, tensor in model.items():
        assert loaded.model[name].dtype == tensor.dtype
        assert loaded.model[name].shape == tensor.shape
        assert loaded.model[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
    assert loaded.optimizer["m"].equal(tensors(8)["a"])


def test_a_step_lies_where_the_design_says(tmp_path: Path) -> None:
    save(tmp_path, 400)
    assert names(tmp_path) == ["step_000400"]
    assert names(tmp_path / "step_000400") == sorted(ALL)
    meta = json.loads((tmp_path / "step_000400" / "meta.json").read_text())
    for name in ALL[:2]:
        assert meta["sha256"][name] == hashlib.sha256((tmp_path / "step_000400" / name).read_bytes()).hexdigest()


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (100, 200, 300, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert checkpoint_steps(tmp_path) == [999_999, 1_000_000]
    assert names(tmp_path) == ["step_1000000", "step_999999"]


def test_no_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "absent") == []
    assert load_newest(tmp_path / "absent") is None


# ---- damage ----


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.8, 0.99])
def test_a_flipped_bit_costs_that_checkpoint_and_is_told(
    name: str, place: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step_000002" / name, place)
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.model["a"].equal(tensors(1)["a"])
    assert f"step_000002/{name}" in caplog.text
    with pytest.raises(RunError, match=name):
        load_checkpoint(tmp_path, 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("left", [0, 7, -2])
def test_a_file_cut_off_costs_that_checkpoint(
    name: str, left: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step_000002" / name
    path.write_bytes(path.read_bytes()[:left])
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert name in caplog.text


@pytest.mark.parametrize("name", ALL[:2])
def test_a_file_that_is_gone_costs_that_checkpoint(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step_000002" / name).unlink()
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(tmp_path / "step_000001" / "model.safetensors", 0.5)
    assert load_newest(tmp_path) is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"sha256": {}}', '{"sha256": {"model.safetensors": 5}}', "null"])
def test_a_meta_that_vouches_for_nothing_is_refused(content: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_000001" / "meta.json").write_text(content)
    with pytest.raises(RunError, match=r"meta\.json"):
        load_checkpoint(tmp_path, 1)


def test_what_is_not_committed_is_never_listed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002")
    (tmp_path / "step_000002" / "meta.json").unlink()
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".step_000003.0a1b2c3d.tmp")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000004.bak")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_last")
    assert checkpoint_steps(tmp_path) == [1]


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".step_000002.0a1b2c3d.tmp")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000000")
    (tmp_path / "step_000000" / "meta.json").unlink()
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001.mine")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000001.mine", "step_000003"]


def test_a_save_that_fails_leaves_nothing_and_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(content: Tensors, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bwlm.record.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000001"]
    assert load_checkpoint(tmp_path, 1).model["a"].equal(tensors(1)["a"])


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step_000002" / "model.safetensors", 0.5)
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path, 2).model["a"].equal(tensors(2)["a"])


def test_a_run_taken_up_from_an_older_checkpoint_does_not_keep_the_damaged_newer_one(tmp_path: Path) -> None:
    """It would count among the newest, and push out the good one that was just saved."""
    save(tmp_path, 100, keep=1)
    save(tmp_path, 250, keep=2)
    flip(tmp_path / "step_000250" / "model.safetensors", 0.5)
    save(tmp_path, 200, keep=1)
    assert checkpoint_steps(tmp_path) == [200]


# ---- pickles ----


class _Payload:
    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (self._mark, os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("vouched", [False, True])
def test_a_planted_pickle_is_refused_and_does_not_run(vouched: bool, tmp_path: Path) -> None:
    folder, mark = tmp_path / "checkpoints", tmp_path / "mark"
    save(folder, 1)
    save(folder, 2)
    planted = pickle.dumps(_Payload(mark))
    os.close(pickle.loads(planted))
    assert mark.exists()  # the payload works
    mark.unlink()
    path = folder / "step_000002"
    (path / "model.safetensors").write_bytes(planted)
    if vouched:  # whoever can plant a file can write its hash
        meta = json.loads((path / "meta.json").read_text())
        meta["sha256"]["model.safetensors"] = hashlib.sha256(planted).hexdigest()
        meta.pop("checksum")
        meta["checksum"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_checkpoint(folder, 2)
    loaded = load_newest(folder)
    assert loaded is not None
    assert loaded.step == 1
    assert not mark.exists()


# ---- kill -9 ----

_SAVER = """
import sys
from pathlib import Path
import torch
from bwlm.record.checkpoint import load_newest, save_checkpoint
folder = Path(sys.argv[1])
newest = load_newest(folder)
step = newest.step if newest else 0
print("ready", flush=True)
while True:
    step += 1
    model = {f"w{i}": torch.full((100_000,), float(step)) for i in range(4)}
    save_checkpoint(folder, step, model, {"m": torch.full((10,), float(step))}, {"progress": {"step": step}}, keep=2)
"""


def test_kill_9_while_saving_leaves_one_that_loads(tmp_path: Path) -> None:
    rng, before = random.Random(0), 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", _SAVER, str(tmp_path)], stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
            while not (steps := checkpoint_steps(tmp_path)) or steps[-1] <= before:
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
    assert step_folder(tmp_path, before).is_dir()
