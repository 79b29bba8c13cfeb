"""Grid files on the tests' corpus, and what a finished grid left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry

BWLM = Path(sys.executable).parent / "bwlm"
GridFile = Callable[..., Path]


@pytest.fixture
def grid_file(corpus: Path, tmp_path: Path) -> GridFile:
    """Writes a grid of tiny cells with settings over the defaults; returns its path."""

    def write(name: str = "g", **settings: Any) -> Path:
        content: dict[str, Any] = {
            "name": name,
            "data": {"source": str(corpus)},
            "tokenizer": {"vocab_size": 400},
            "axes": {"direction": ["forward", "backward"], "depth": [1], "lr": [1.0], "seed": [0]},
            "model": {"sequence_length": 64, "head_dim": 32},
            "budget": {"steps": 12, "batch_tokens": 512},
            "evaluation": {"every": 6, "tokens": 2048},
            "checkpoint": {"every": 4},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | settings, sort_keys=False))
        return path

    return write


def private_environment(storage: Path) -> dict[str, str]:
    """For a command that starts its own Ray: no cluster of ours, storage of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return kept | {"BWLM_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}


def holder(folder: ExperimentFolder) -> int | None:
    """Process of the worker (of rank 0) that trains a cell now."""
    found = folder.lease_holder() if folder.exists() else None
    pid = found.rpartition(":")[2] if found else ""
    return int(pid) if pid.isdigit() else None


@contextmanager
def once_at_step(storage: Path, cell: str, step: int, act: Callable[[int], None]) -> Iterator[list[int]]:
    """Calls `act` with a cell's process, from a thread, once the cell is beyond a step; gives the step it was at."""
    folder = ExperimentFolder(storage, cell)
    acted: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not acted and not over.is_set():
            entry, pid = last_entry(folder.path), holder(folder)
            if entry and entry.step >= step and pid:
                act(pid)
                acted.append(entry.step)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield acted
    finally:
        over.set()
        watcher.join()


def reap(processes: list[psutil.Process]) -> None:
    """Ray's dashboard and agents outlive a driver that was killed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def runs(storage: Path) -> list[dict[str, Any]]:
    """`bwlm runs list --json`, in a process of its own as a script would call it."""
    shown = subprocess.run(
        [BWLM, "runs", "list", "--json", "--storage", storage], capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(shown.stdout)
    return found
