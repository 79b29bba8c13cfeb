"""A disk that is full while a checkpoint is saved: told, nothing lost, and the run goes on when there is room again."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bwlm.errors import RunError
from bwlm.record.checkpoint import KeepPolicy, Snapshot, checkpoint_steps, load_checkpoint, load_newest
from bwlm.record.experiment import Status
from bwlm.record.researchlog import ResearchLog, open_log
from bwlm.record.saver import CheckpointSaver
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.faults.checkpoints import is_of, names, same_bits, snapshot
from tests.runs import STEPS, NewRun, in_process, losses

ROOM = 100_000
"""Bytes that still fit"""


@contextmanager
def no_room_for_large_files() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond `ROOM`: the write fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Disk:
    folder: Path
    full: Callable[[], object]
    """A block in which there is room for `ROOM` bytes only"""


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "checkpoints"
    if request.param == "limit":
        yield Disk(folder, no_room_for_large_files)
        return
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted]).returncode:
        pytest.skip("mounting a small disk needs root")

    @contextmanager
    def full() -> Iterator[None]:
        filler = mounted / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(mounted).free - ROOM))
        yield
        filler.unlink()

    try:
        yield Disk(mounted / "checkpoints", full)
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)  # tensors are maps of files there


def large(step: int, part: str) -> Snapshot:
    """One of its files does not fit."""
    return replace(snapshot(step), **{part: {"large": torch.full((ROOM,), float(step))}})


@pytest.mark.parametrize("part", ["model", "optimizer", "rng"])
def test_a_full_disk_costs_the_save_and_nothing_else(part: str, disk: Disk) -> None:
    with CheckpointSaver(disk.folder, KeepPolicy(last=1)) as saver:
        saver.save(large(100, part))
        saver.wait()
        with disk.full():
            saver.save(large(200, part))
            with pytest.raises(RunError, match=rf"step_000200/{part}\.safetensors: cannot be written") as told:
                saver.wait()
            assert f"free space in {disk.folder}" in str(told.value)
            assert "goes on from step 100" in str(told.value)
            assert names(disk.folder) == ["step_000100"]
            newest = load_newest(disk.folder)
            assert newest is not None
            assert is_of(newest, large(100, part))
        saver.save(large(200, part))
    assert names(disk.folder) == ["step_000200"]
    assert is_of(load_checkpoint(disk.folder, 200), large(200, part))


def write_until_full(log: ResearchLog, norms: NDArray[np.floating], step: int) -> int:
    """The first step, from `step` on, that the disk does not take."""
    while True:
        try:
            log.write("gradients", step, norm=norms[step])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            return step
        step += 1


def test_a_full_disk_leaves_the_research_log_as_it_was(disk: Disk, capfd: pytest.CaptureFixture[str]) -> None:
    """HDF5 cannot close a file that it cannot write: it must not come to that."""
    disk.folder.mkdir()
    path, rng = disk.folder / "base.h5", np.random.default_rng(0)
    norms = rng.random((60, 1000))  # 4 kB a step, and nothing to compress
    log = ResearchLog(path)
    for step in range(1, 11):
        log.write("gradients", step, norm=norms[step])
    log.merge()
    with disk.full():
        log.write("gradients", 11, norm=norms[11])
        with pytest.raises(OSError, match=r"No space left|File too large"):
            log.merge()  # the copy does not fit
        accepted = write_until_full(log, norms, 12) - 1
        with h5py.File(path) as file:
            assert file["gradients/step"][:].tolist() == list(range(1, 11))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            log.close()
        assert names(disk.folder) == ["base.h5", "base.h5.tail"]
    with ResearchLog(path) as again:
        again.write("gradients", accepted + 1, norm=norms[accepted + 1])
    with open_log(path) as file:
        assert file["gradients/step"][:].tolist() == list(range(1, accepted + 2))
        assert np.array_equal(file["gradients/norm"][:], norms[1 : accepted + 2].astype(np.float32))
    assert "HDF5" not in capfd.readouterr().err


def test_a_writer_whose_disk_was_full_goes_on_when_there_is_room_again(disk: Disk) -> None:
    disk.folder.mkdir()
    path, norms = disk.folder / "base.h5", np.random.default_rng(0).random((60, 1000), np.float32)
    with ResearchLog(path) as log:
        with disk.full():
            refused = write_until_full(log, norms, 0)
        log.write("gradients", refused, norm=norms[refused])  # not behind half of an entry
    with h5py.File(path) as file:
        assert file["gradients/step"][:].tolist() == list(range(refused + 1))
        assert np.array_equal(file["gradients/norm"][:], norms[: refused + 1])


class FullAfter(LocalSession):
    """A disk that has no room for weights from the first step after the first checkpoint."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self.no_room = no_room_for_large_files()
        self.is_full = False

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            while checkpoint_steps(self._checkpoints) != [4]:
                time.sleep(0.005)
            self.no_room.__enter__()
            self.is_full = True


def test_a_run_whose_disk_was_full_goes_on_as_if_nothing_had_been(new_run: NewRun) -> None:
    calm, cut = new_run("calm"), new_run("cut", research_log__tokens=0, research_log__representations=0)
    run_phase(calm, LocalSession(), in_process)
    session = FullAfter(cut.checkpoints)
    try:
        status = run_phase(cut, session, in_process)
    finally:
        if session.is_full:
            session.no_room.__exit__(None, None, None)
    assert status.state == "failed"
    assert "step_000008/model.safetensors: cannot be written" in status.reason
    assert "goes on from step 4" in status.reason
    assert names(cut.checkpoints) == ["step_000004"]

    cut.write_status(Status())  # as a launch does that tries it again
    assert run_phase(cut, LocalSession(), in_process).state == "finished"
    assert losses(cut) == losses(calm)
    one, other = (load_checkpoint(folder.checkpoints, STEPS) for folder in (cut, calm))
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("model", "optimizer", "rng"))
