"""A cell whose workers follow the nodes: one joins, is killed, or leaves with notice; and it stays the same run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from bwlm.analysis.report.sections import audit_section
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry, read_journal
from bwlm.record.starts import Start, starts_of, steps_lost
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.cluster.heads import BIN, ROOT, Head, second_node, started_head
from tests.runs import in_process, losses

STEPS, EVERY, THREADS = 220, 20, 2
CELL = "tiny_forward_d1_lr1_s0"

_SLOW = """
import os, time
if os.path.exists({mark!r}):
    import bwlm.record.journal as journal

    def append(self, step, metrics, at_once=journal.Journal.append):
        time.sleep(0.2 if os.path.exists({mark!r}) else 0)
        at_once(self, step, metrics)

    journal.Journal.append = append
"""
"""`sitecustomize` of the cluster's processes: steps take 0.2 s at least, on any machine, until the mark goes."""


class Elastic(NamedTuple):
    """A launch of one cell of one or two workers on a head that has room for one."""

    head: Head
    launch: subprocess.Popen[bytes]
    log: Path
    folder: ExperimentFolder
    mark: Path

    @property
    def step(self) -> int:
        entry = last_entry(self.folder.path)
        return entry.step if entry else 0

    @property
    def starts(self) -> list[Start]:
        return starts_of(self.folder.path)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not holds():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            assert self.launch.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def wait_for_workers(self, count: int, starts: int) -> None:
        """Wait until it has begun so many times, and trains with so many workers."""
        self.wait_until(lambda: len(self.starts) >= starts and self.step > self.starts[-1].step)
        assert self.starts[-1].workers == count

    def end(self) -> None:
        """Let it train at its own speed to the end."""
        self.mark.unlink()
        self.launch.wait(timeout=200)
        assert self.launch.returncode == 0, self.log.read_text()[-3000:]
        assert [entry.step for entry in read_journal(self.folder.path)] == list(range(1, STEPS + 1))

    def of_a_fixed_size(self, storage: Path) -> list[float]:
        """The losses of the same run with one worker from beginning to end."""
        config = self.folder.config()
        calm = ExperimentFolder(storage, CELL)
        calm.keep_tokenizer(Path(config.tokenizer))
        calm.create(replace(config))
        torch.set_num_threads(THREADS)
        try:
            run_phase(calm, LocalSession(), in_process)
        finally:
            torch.set_num_threads(1)
        return losses(calm)


@pytest.fixture
def elastic(corpus: Path, tmp_path: Path) -> Iterator[Elastic]:
    (mark := tmp_path / "slow").touch()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(_SLOW.format(mark=str(mark)))
    with started_head(cpus=THREADS + 1, PYTHONPATH=str(tmp_path / "path")) as head:
        sets = [f"data.source={corpus}", "tokenizer.vocab_size=400", "axes.direction=[forward]"]
        sets += [
            f"budget.steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "evaluation={every: 0, tokens: 1024}",
            "compute.precision=float32",
        ]
        sets += ["resources.workers={min: 1, max: 2}", f"resources.cpus_per_worker={THREADS}"]
        words = [BIN / "bwlm", "grid", "run", ROOT / "grids/tiny.yaml", "--storage", tmp_path / "storage"]
        words += [word for one in sets for word in ("--set", one)]
        environment, log = head.environment | {"RAY_ADDRESS": head.gcs}, tmp_path / "launch.log"
        with log.open("wb") as file:
            launch = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=file, stderr=file)
        try:
            yield Elastic(head, launch, log, ExperimentFolder(tmp_path / "storage", CELL), mark)
        finally:
            launch.kill()
            launch.wait()


@pytest.mark.faults
def test_a_cell_grows_with_a_node_and_goes_on_when_it_is_killed(elastic: Elastic, tmp_path: Path) -> None:
    """A node joins: no step is lost. Its raylet is killed: at most those since the last checkpoint."""
    elastic.wait_for_workers(1, starts=1)
    with second_node(elastic.head, tmp_path / "node.log", options=(f"--num-cpus={THREADS}",)) as node:
        elastic.wait_for_workers(2, starts=2)
        saved = EVERY * (elastic.starts[-1].step // EVERY + 1)
        elastic.wait_until(lambda: elastic.step > saved and checkpoint_steps(elastic.folder.checkpoints)[-1] == saved)
        [raylet] = [one for one in psutil.Process(node.pid).children(recursive=True) if one.name() == "raylet"]
        raylet.kill()
        elastic.wait_for_workers(1, starts=3)
    elastic.end()

    alone, grown, shrunk = elastic.starts
    assert (alone.lost, grown.lost, alone.step) == (0, 0, 0)
    assert 0 < shrunk.lost <= EVERY
    assert shrunk.step % EVERY == 0
    assert shrunk.step > grown.step, "two workers have trained steps that stay"
    expected, found = elastic.of_a_fixed_size(tmp_path / "calm"), losses(elastic.folder)
    assert found[: grown.step] == expected[: grown.step]
    assert found[grown.step] == pytest.approx(expected[grown.step], rel=1e-5)
    assert found[grown.step : grown.step + 10] == pytest.approx(expected[grown.step : grown.step + 10], rel=1e-3)
    [line] = [word for word in audit_section([elastic.folder])[1].splitlines() if "number of workers" in word]
    assert f"{CELL} (1, 2 from step {grown.step}, 1 from step {shrunk.step})" in line
    words = [BIN / "bwlm", "runs", "show", CELL, "--storage", tmp_path / "storage"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"2 resumes, {shrunk.lost} step" in shown


@pytest.mark.slow
def test_a_node_that_leaves_with_notice_costs_no_step(elastic: Elastic, tmp_path: Path) -> None:
    """SIGTERM to `ray start`, as a machine that is preempted or a pod that is deleted gets it: Ray drains the node."""
    elastic.wait_for_workers(1, starts=1)
    with second_node(elastic.head, tmp_path / "node.log", options=(f"--num-cpus={THREADS}",)) as node:
        elastic.wait_for_workers(2, starts=2)
        node.terminate()
        elastic.wait_for_workers(1, starts=3)
    elastic.end()
    assert [start.workers for start in elastic.starts] == [1, 2, 1]
    assert steps_lost(elastic.starts) == 0
