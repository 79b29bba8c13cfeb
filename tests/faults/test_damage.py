"""One flipped bit, a file cut off or gone, a planted pickle: never loaded, never run, and told by name."""

from __future__ import annotations

import hashlib
import logging
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bwlm.errors import RunError
from bwlm.record.checkpoint import FILES, KeepPolicy, load_checkpoint, load_newest, load_weights, write_checkpoint
from tests.faults.checkpoints import ALL, flip, is_of, rewrite_meta, snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", snapshot(step), KeepPolicy(9))
    return tmp_path / "checkpoints"


def check_that_the_older_one_is_taken(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError, match=rf"step_000002/{name}"):
        load_checkpoint(folder, 2)
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(folder)
    assert loaded is not None
    assert is_of(loaded, snapshot(1))
    assert f"step_000002/{name}" in caplog.text
    assert "trying the checkpoint before it" in caplog.text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0])
def test_a_flipped_bit_costs_that_checkpoint_and_its_file_is_named(
    name: str, place: float, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(folder / "step_000002" / name, place)
    check_that_the_older_one_is_taken(folder, name, caplog)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("left", [0, 7, -2])
def test_a_file_cut_off_costs_that_checkpoint(
    name: str, left: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "step_000002" / name
    path.write_bytes(path.read_bytes()[:left])
    check_that_the_older_one_is_taken(folder, name, caplog)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_costs_that_checkpoint(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "step_000002" / name).unlink()
    check_that_the_older_one_is_taken(folder, name, caplog)


def test_files_of_two_checkpoints_are_not_mixed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "step_000001" / "optimizer.safetensors").replace(folder / "step_000002" / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"step_000002/optimizer\.safetensors: damaged"):
        load_checkpoint(folder, 2)


def test_weights_load_without_the_files_beside_them(folder: Path) -> None:
    flip(folder / "step_000002" / "optimizer.safetensors", 0.5)
    weights, _ = load_weights(folder, 2)
    assert weights["a"].equal(snapshot(2).model["a"])
    flip(folder / "step_000002" / "model.safetensors", 0.5)
    with pytest.raises(RunError, match=r"step_000002/model\.safetensors: damaged"):
        load_weights(folder, 2)


@pytest.mark.parametrize("content", ["{}", "[]", '{"sha256": {}}', "null", "5", "[" * 100_000, '{"step": NaN}', "\x00"])
def test_a_meta_that_is_not_one_of_ours_is_refused(
    content: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "step_000002" / "meta.json").write_text(content)
    check_that_the_older_one_is_taken(folder, "meta.json", caplog)


def test_headers_that_nobody_wrote_are_refused_or_harmless(folder: Path) -> None:
    """Whoever can write a file can write its hash: then safetensors alone stands between it and memory."""
    path = folder / "step_000002" / "model.safetensors"
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(content)
        vouch(folder / "step_000002", "model.safetensors")
        try:
            load_weights(folder, 2)
        except RunError:
            refused += 1
    assert refused > 150


# ---- pickles ----


def vouch(path: Path, name: str) -> None:
    """Writes the hash of a file into meta.json."""
    meta = (path / "meta.json").read_text()
    hashes = {other: hashlib.sha256((path / other).read_bytes()).hexdigest() for other in FILES}
    assert hashes[name] not in meta
    rewrite_meta(path / "meta.json", sha256=hashes)


class _Payload:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._mark,)


def plant_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload(mark)))
    pickle.loads(path.read_bytes())


def plant_torch_file(path: Path, mark: Path) -> None:
    named = path.with_suffix(".pt")  # torch looks at the name
    torch.save({"a": _Payload(mark)}, named)
    torch.load(named, weights_only=False)
    named.replace(path)


@pytest.mark.parametrize("plant", [plant_pickle, plant_torch_file])
@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_planted_pickle_is_refused_and_does_not_run(
    name: str,
    vouched: bool,
    plant: Callable[[Path, Path], None],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mark = tmp_path / "mark"
    plant(folder / "step_000002" / name, mark)
    assert mark.exists()  # the payload works
    mark.unlink()
    if vouched and name != "meta.json":
        vouch(folder / "step_000002", name)
    check_that_the_older_one_is_taken(folder, name, caplog)
    if name == "model.safetensors":
        with pytest.raises(RunError, match=r"model\.safetensors"):
            load_weights(folder, 2)
    assert not mark.exists()
