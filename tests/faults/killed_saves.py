"""Saves checkpoints in processes that end by SIGKILL at the first, the second, .. boundary of a save, until one lives.

    python -m tests.faults.killed_saves FOLDER

Leaves FOLDER/SCENARIO/000, FOLDER/SCENARIO/001, ..: one folder of checkpoints for each boundary, and the name of the
boundary in a file beside it. Disks change at system calls only, so a boundary stands before each call that changes one,
and inside and after each write. The processes are forks of this one, which has imported torch already.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bwlm.record import checkpoint
from bwlm.record.checkpoint import KeepPolicy, Snapshot, write_checkpoint
from bwlm.record.saver import CheckpointSaver
from tests.faults.checkpoints import snapshot

POLICY = KeepPolicy(last=1)

SCENARIOS: dict[str, tuple[list[Snapshot], list[Snapshot]]] = {
    "first": ([], [snapshot(100)]),
    "next": ([snapshot(100)], [snapshot(200)]),
    "again": ([snapshot(100)], [snapshot(100, generation=1)]),
    "after_a_cut": ([snapshot(100), snapshot(300)], [snapshot(200), snapshot(300, generation=1)]),
}
"""What is there before, and what is saved: by name."""

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}


class Boundaries:
    """Counts boundaries below a folder, and ends this process at one of them."""

    def __init__(self, deadly: int, folder: Path) -> None:
        self._left = deadly
        self._folder = str(folder)
        self._name = folder.with_suffix(".boundary")

    def pass_one(self, what: str) -> None:
        self._left -= 1
        if self._left == -1:
            self._name.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        sys.addaudithook(self._before_change)
        os.fsync = self._synced(os.fsync)
        checkpoint.save_file = self._in_parts
        io.open = self._opened(io.open)  # type: ignore[assignment]

    def _before_change(self, event: str, given: tuple[Any, ...]) -> None:
        """Python tells of each call before it makes it. Deletions name what they delete within an open folder."""
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        path = str(given[0])
        if (event in _CHANGES or writes) and (path.startswith(self._folder) or not path.startswith("/")):
            self.pass_one(f"before {event} {Path(path).name}")

    def _synced(self, call: Callable[..., None]) -> Callable[..., None]:
        def synced(descriptor: int) -> None:
            self.pass_one("before fsync")
            call(descriptor)

        return synced

    def _in_parts(self, tensors: Any, path: Path) -> None:
        """In place of safetensors' own writer, which is out of Python's sight: the same bytes."""
        content = safetensors.torch.save(tensors)
        with path.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            self.pass_one(f"half of {path.name}")
            file.write(content[len(content) // 2 :])
        self.pass_one(f"all of {path.name}")

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*given: Any, **options: Any) -> Any:
            file = call(*given, **options)
            if file.writable():
                self.pass_one(f"an empty {Path(given[0]).name}")
            return file

        return opened


def save_until_killed(folder: Path, deadly: int, saves: list[Snapshot]) -> None:
    Boundaries(deadly, folder).install()
    with CheckpointSaver(folder, POLICY) as saver:
        for saved in saves:
            saver.save(saved)


def run(folder: Path, before: list[Snapshot], saves: list[Snapshot]) -> None:
    template = folder / "template"
    template.mkdir(parents=True)
    for saved in before:
        write_checkpoint(template, saved, KeepPolicy(last=9))
    for deadly in count():
        place = folder / f"{deadly:03d}"
        shutil.copytree(template, place)
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(place, deadly, saves)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            shutil.rmtree(template)
            assert status == 0
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (before, saves) in SCENARIOS.items():
        run(Path(sys.argv[1]) / name, before, saves)
