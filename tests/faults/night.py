"""A grid on a cluster of two nodes, the faults that hit it, and what must hold after each of them.

The losses of a run that met a fault are compared, bit for bit, with those of the same run in one quiet process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry, read_journal
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.cluster.heads import ROOT, Head, Node, join_node, ray_job, start_head
from tests.grids import holder
from tests.runs import in_process

_SECONDS = 240.0
"""Longest wait for anything."""


_CLOCK = """
import time
right, right_ns = time.time, time.time_ns
def offset():
    try:
        with open({!r}) as file:
            return int(file.read() or 0)
    except FileNotFoundError:
        return 0
def shifted(): return right() + offset()
def shifted_ns(): return right_ns() + 10**9 * offset()
time.time, time.time_ns = shifted, shifted_ns
"""
"""A module that Python loads as it starts: the clock is ahead by the seconds that a file holds."""


class Fault(NamedTuple):
    """Fault that has just happened."""

    kind: str
    cells: list[str]
    """Cells that it hit."""
    time: float
    """When it happened, in seconds since the epoch."""
    losses: dict[str, list[float]]
    """Training losses up to then of the cells that trained, by step."""


class Night:
    """The cluster, the job that leads the grid, and the storage."""

    def __init__(self, head: Head, storage: Path, settings: list[str]) -> None:
        home = Path(head.environment["HOME"])
        self._clock_file = home / "clock"
        (home / "sitecustomize.py").write_text(_CLOCK.format(str(self._clock_file)))
        self.head = head._replace(environment=head.environment | {"PYTHONPATH": str(home)})
        self.storage, self._settings, self._logs = storage, settings, home
        self.head_node = start_head(self.head, cpus=1)
        self.other = self._join()
        self._finished: dict[str, str] = {}
        self._jobs: list[str] = []
        self.submit()

    # ---- the cluster and the job ----

    def _join(self) -> Node:
        return join_node(self.head, self._logs / "node.log", options=("--num-cpus=3",))

    def submit(self) -> None:
        self._jobs.append(f"night-{len(self._jobs)}")
        command = ["bwlm", "grid", "run", str(ROOT / "grids/tiny.yaml"), "--storage", str(self.storage)]
        command += [word for one in self._settings for word in ("--set", one)]
        # without --working-dir: two nodes of one machine share the folder below which Ray unpacks it, and each does so
        done = ray_job(self.head, "submit", "--no-wait", "--submission-id", self._jobs[-1], "--", *command)
        assert done.returncode == 0, done.stdout + done.stderr

    def switch(self, *settings: str) -> None:
        """Stop the job, whose cells save, and submit the grid with other settings."""
        ray_job(self.head, "stop", self._jobs[-1])
        self._settings = [self._settings[0], *settings]  # the text stays
        self.submit()

    def close(self) -> None:
        self.other.stop()
        self.head_node.stop()

    def log(self) -> str:
        """The last lines of the job."""
        return ray_job(self.head, "logs", self._jobs[-1]).stdout[-3000:]

    # ---- the cells ----

    def cells(self) -> list[ExperimentFolder]:
        return [ExperimentFolder(self.storage, path.parent.name) for path in self.storage.glob("*/config.json")]

    def training(self) -> dict[str, int]:
        """Cells that train now, and the step of each."""
        found = {}
        for folder in self.cells():
            entry = last_entry(folder.path)
            if entry and folder.lease_holder() and not folder.status().ended:
                found[folder.id] = entry.step
        return found

    def has_work(self) -> bool:
        """Return whether cells are left to train, or are not made yet."""
        cells = self.cells()
        return not cells or any(not folder.status().ended for folder in cells)

    def wait_for(self, holds: Callable[[], Any], seconds: float = _SECONDS) -> Any:
        """Return what `holds` returns, once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return found

    def _amid(self, cells: int, after: int, before: int) -> dict[str, int]:
        """Cells in the middle of their steps, each beyond a checkpoint, once there are so many; and their processes."""

        def found() -> dict[str, int] | None:
            amid = {}
            for id, step in self.training().items():
                folder = ExperimentFolder(self.storage, id)
                if after < step < before and checkpoint_steps(folder.checkpoints) and (pid := holder(folder)):
                    amid[id] = pid
            return amid if len(amid) >= cells else None

        amid: dict[str, int] = self.wait_for(found)
        return amid

    def _processes(self) -> list[psutil.Process]:
        return [*self.head_node.processes(), *self.other.processes()]

    # ---- faults ----

    def hit(self, kind: str, cells: int = 1, after: int = 60, before: int = 10**9) -> Fault:
        """Wait until cells are amid their training, and let a fault happen: a method of this class without its `_`."""
        amid, now = self._amid(cells, after, before), time.time()
        losses = {id: losses_of(self.storage / id) for id in amid}
        act: Callable[[dict[str, int]], list[str]] = getattr(self, f"_{kind}")
        return Fault(kind, act(amid), now, losses)

    def _worker(self, amid: dict[str, int]) -> list[str]:
        return [_signal(amid, signal.SIGKILL)]

    def _notice(self, amid: dict[str, int]) -> list[str]:
        return [_signal(amid, signal.SIGTERM)]

    def _data_task(self, amid: dict[str, int]) -> list[str]:
        """Kill a task that makes batches, whichever cell it is for: Ray Data tries it again."""

        def task() -> psutil.Process | None:
            return next((one for one in self._processes() if _title(one).startswith("ray::MapBatches")), None)

        process: psutil.Process = self.wait_for(task)
        process.kill()
        return []

    def _trial(self, amid: dict[str, int]) -> list[str]:
        """Kill the actor that drives the workers of a cell, which has several."""
        drivers = [one for one in self._processes() if _title(one).startswith("ray::ImplicitFunc")]
        for process in drivers:
            process.kill()
        return list(amid)

    def _hung(self, amid: dict[str, int]) -> list[str]:
        """Freeze a worker beside the one that writes: the others wait for it in their next collective."""
        workers = [one for one in self._processes() if _title(one).startswith("ray::RayTrainWork")]
        next(one for one in workers if one.pid not in amid.values()).suspend()
        return list(amid)

    def _clock(self, amid: dict[str, int]) -> list[str]:
        """Set the clock of all processes an hour forward, two hours back, and right again: nothing starts again."""
        for hours in (1, -1, 0):
            self._clock_file.write_text(str(3600 * hours))
            steps = self.training()
            self.wait_for(lambda steps=steps: self.training().keys() - steps or self.training() != steps)
        return []

    def _node(self, amid: dict[str, int]) -> list[str]:
        """Kill a node with all that runs there; another one joins later."""
        there = {one.pid for one in self.other.processes()}
        self.other.kill()
        self.other = self._join()
        return [id for id, pid in amid.items() if pid in there]

    def _driver(self, amid: dict[str, int]) -> list[str]:
        """Kill the job's driver; the same submit goes on."""
        driver = next(one for one in self.head_node.processes() if _words(one)[2:4] == ["grid", "run"])
        driver.kill()
        self.wait_for(lambda: "failed" in ray_job(self.head, "status", self._jobs[-1]).stdout.lower())
        self.submit()
        return list(amid)

    def _head(self, amid: dict[str, int]) -> list[str]:
        """Kill the head, and with it what the other node does for it; a new cluster gets the same submit."""
        self.head_node.kill()
        self.other.kill()
        self.head_node = start_head(self.head, cpus=1)
        self.other = self._join()
        self.submit()
        return list(amid)

    # ---- what holds after each ----

    def recovered(self, fault: Fault) -> dict[str, float]:
        """Seconds from the fault until each cell that it hit has done a step in another process."""
        return {id: self.wait_for(lambda id=id: self._trained_anew(id, fault)) - fault.time for id in fault.cells}

    def _trained_anew(self, id: str, fault: Fault) -> float | None:
        """When a process that took the cell after the fault did its first step; the fault's time if the cell ended."""
        folder = ExperimentFolder(self.storage, id)
        if folder.status().ended:
            return fault.time
        since = json.loads((folder.path / "lease.json").read_text())["since"]
        if since < fault.time:
            return None
        return next((entry.time / 1000 for entry in read_journal(folder.path) if entry.time > 1000 * since), None)

    def check(self, fault: Fault, calm: Path) -> None:
        """Cells train on with the losses of a calm run, finished ones are as they were, MLflow has each run once."""
        for id, before in fault.losses.items():
            self.wait_for(partial(self._is_beyond, id, len(before)))
            check_losses(self.storage, calm, id)
        self.check_finished()
        check_tracking(self.storage)

    def _is_beyond(self, id: str, steps: int) -> bool:
        folder = ExperimentFolder(self.storage, id)
        return folder.status().ended or len(losses_of(folder.path)) > steps

    def check_repeated(self, fault: Fault) -> None:
        """Steps that the cells did before the fault have the same losses once they were done again."""
        for id in fault.cells:
            self.wait_for(lambda id=id: len(losses_of(self.storage / id)) >= len(fault.losses[id]))
            assert losses_of(self.storage / id)[: len(fault.losses[id])] == fault.losses[id]

    def check_finished(self) -> None:
        """Check that no finished cell was touched since it was looked at first."""
        now = {folder.id: _digest(folder) for folder in self.cells() if folder.status().state == "finished"}
        for id, before in self._finished.items():
            assert now[id] == before, f"{id} had finished, and was written to"
        self._finished = now


def check_losses(storage: Path, calm: Path, id: str) -> None:
    """Each step once, with the loss of the same run in one quiet process, which is trained where it is not yet."""
    expected = losses_of(train_calmly(ExperimentFolder(storage, id), calm).path)
    found = losses_of(storage / id)
    assert found == expected[: len(found)]


def losses_of(folder: Path) -> list[float]:
    """Training losses of a run by step, each of which stands once in its journal."""
    entries = list(read_journal(folder))
    assert [entry.step for entry in entries] == list(range(1, len(entries) + 1))
    return [entry.metrics["train_loss"] for entry in entries]


def train_calmly(folder: ExperimentFolder, calm: Path) -> ExperimentFolder:
    """The same run, trained in this process from its first step to its last."""
    twin = ExperimentFolder(calm, folder.id)
    if not twin.exists():
        config = folder.config()
        twin.keep_tokenizer(Path(config.tokenizer))
        twin.create(config)
    assert run_phase(twin, LocalSession(), in_process).state == "finished"
    return twin


def check_tracking(storage: Path) -> None:
    """No run and no step stands twice in MLflow."""
    with sqlite3.connect(storage / "mlflow.db") as store:
        names = "select count(*) from runs group by name having count(*) > 1"
        assert store.execute(names).fetchall() == []
        steps = "select count(*) from metrics where key = 'train/loss' group by run_uuid, step having count(*) > 1"
        assert store.execute(steps).fetchall() == []


def _digest(folder: ExperimentFolder) -> str:
    """Digest of what a finished run keeps of its training."""
    digest = hashlib.sha256()
    for path in _kept(folder.path):
        digest.update(f"{path.name} {path.stat().st_mtime_ns}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in ("config.json", "status.json", "metrics.jsonl"))
    yield from sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file())


def _signal(amid: dict[str, int], number: signal.Signals) -> str:
    """Send a signal to the process of one of the cells; the cell."""
    cell, pid = next(iter(amid.items()))
    os.kill(pid, number)
    return cell


def _title(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
