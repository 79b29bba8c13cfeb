"""A worker of a cell: it uses what was reserved for it, waits no longer than it is asked to, and keeps no memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from bwlm.config import ResourceSettings
from bwlm.errors import RunError
from bwlm.grid import hardware, worker
from bwlm.grid.hardware import plan_compute
from bwlm.grid.worker import train_worker
from bwlm.model.compute import Compute, Hardware
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.lease import LeaseLost
from bwlm.record.run_config import shape_of
from bwlm.train import run
from tests.runs import NewRun


def test_a_worker_that_waits_for_its_run_leaves_when_it_is_asked_to_end(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_run()
    monkeypatch.setattr(worker.RaySession, "stopping", lambda self: True)
    with folder.lease():
        train_worker({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})
    assert folder.status().state == "waiting"
    assert f"trains {folder.id}\n" in capsys.readouterr().out  # for its log in Ray's dashboard


def test_a_worker_whose_run_was_taken_leaves_its_end_to_the_taker(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back as one that was asked to end: Tune counts no failure, and takes the cell up again."""
    folder, stopping = new_run(), []

    def loses_it(taken: ExperimentFolder, session: Any, stream: Any) -> Status:
        stopping.append(session.stopping())
        (folder.path / "lease.json").write_text('{"host": "elsewhere", "pid": 7}')
        with pytest.raises(LeaseLost, match="elsewhere:7 writes to it"):
            taken.check_lease()
        stopping.append(session.stopping())  # so that all its ranks end
        taken.write_status(Status("failed", "an end of its own", 3))
        return Status("failed")

    monkeypatch.setattr(run, "run_phase", loses_it)
    train_worker({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})
    assert stopping == [False, True]
    assert folder.status().state == "waiting"
    assert not list(folder.path.glob(".*.tmp"))

    class Trainer:
        def fit(self) -> None:
            return

    monkeypatch.setattr(worker, "_trainer", lambda *_: Trainer())
    with pytest.raises(RayActorError) as raised:
        worker.train_cell({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})
    assert raised.value.preempted


def test_a_worker_uses_what_its_launch_reserved(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch may have written other resources into the run's folder meanwhile."""
    folder, seen = new_run(resources={"workers": 3, "cpus_per_worker": 5, "gpus_per_worker": 1}), list[Any]()

    def run_phase(folder: ExperimentFolder, session: Any, stream: Any) -> Status:
        seen.append((session.world, session.device.type, torch.get_num_threads()))
        return Status("stopped")

    before = torch.get_num_threads()
    monkeypatch.setattr(run, "run_phase", run_phase)
    config = {"storage": str(folder.path.parent), "cell": folder.id, "resources": {"cpus_per_worker": 2}}
    try:
        train_worker(config)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, "cpu", 2)]


def test_a_part_of_a_gpu_has_its_part_of_the_memory(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth 20 needs 1.2 MB a token: a tenth of an H200 holds 7 GB of them, a whole one more than a pass takes."""
    gpu = Hardware("cuda", "NVIDIA H200", native_bfloat16=True, compiler="", memory=141e9)
    monkeypatch.setattr(hardware, "_worker_hardware", lambda device, threads: (gpu, 989e12))
    experiment = new_run().config().experiment
    large = experiment.model_copy(
        update={"depth": 20, "budget": experiment.budget.model_copy(update={"batch_tokens": 2**20})}
    )

    def planned(part: float) -> Compute:
        resources = ResourceSettings(gpus_per_worker=part)
        return plan_compute(large.model_copy(update={"resources": resources}), shape_of(large), 10)

    time = experiment.model.sequence_length
    assert (planned(1).micro_rows * time, planned(0.1).micro_rows * time) == (2**15, 2**12)
    assert planned(0.1).reasons["device"] == "0.1 of a NVIDIA H200"

    limited = list[tuple[float, str]]()
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: limited.append((part, str(device)))
    )
    worker.RaySession(10, ResourceSettings(gpus_per_worker=0.1))
    assert limited == [(0.1, "cuda:0")]


@pytest.mark.parametrize(("every", "told"), [(0, [100, 149, 150]), (40, [39, 40, 79, 80, 100, 119, 120, 149, 150])])
def test_the_step_before_a_validation_is_reported(every: int, told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a person sees that a validation runs, also where steps are reported seldom."""
    heard: list[int] = []
    monkeypatch.setattr("ray.tune.report", lambda result: heard.append(result["step"]))
    session = worker.RaySession(150, ResourceSettings(), evaluate_every=every)
    session._every = 100
    for step in range(1, 151):
        session.report(step, {"val_bpb": 1.0} if step == 150 or (every and step % every == 0) else {})
    assert heard == told


def test_an_end_that_cannot_be_noted_is_raised_for_tune_to_count(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the cell would be taken for one that was asked to end, and begin again for ever."""
    folder = new_run()
    monkeypatch.setattr(run, "run_phase", lambda *_: Status("failed", "disk full", 3))
    with pytest.raises(RunError, match="disk full; nor can its status: free space in "):
        train_worker({"storage": str(folder.path.parent), "cell": folder.id, "resources": {}})


def test_a_stopped_cell_has_time_to_write_its_records() -> None:
    """In a worker, whose environment a cluster sets, not the launch: past 2 s Tune would drop the next cell."""
    code = (
        "import os, bwlm.grid.worker as worker\n"
        "worker.ResourceSettings = None  # the next step after the environment fails\n"
        "try: worker.train_cell({'storage': '.', 'cell': 'c', 'resources': {}})\n"
        "except TypeError: print(os.environ['TUNE_FUNCTION_THREAD_TIMEOUT_S'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TUNE_")}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(shown.stdout) >= 600


def test_a_worker_keeps_no_memory_for_each_thread_that_trained_in_it(ray_cluster: str) -> None:
    """Tune runs each cell in a new thread of a process that stays."""
    assert ray_cluster
    before, after = ray.get(ray.remote(_memory_after_threads).options(num_cpus=1).remote())
    assert after - before < _TOUCHED, "each thread's heap was kept"


_TOUCHED = 64 * 2**20


def _memory_after_threads() -> tuple[int, int]:
    """Resident bytes after the first and after the last of five threads that touched memory, freed it and live on."""
    import threading

    import psutil
    import torch

    over = threading.Event()

    def train(freed: threading.Event) -> None:
        kept = [torch.ones(2**18) for _ in range(_TOUCHED // 2**20)]
        del kept
        freed.set()
        over.wait()

    resident = []
    for _ in range(5):
        freed = threading.Event()
        threading.Thread(target=train, args=(freed,), daemon=True).start()
        freed.wait()
        resident.append(psutil.Process().memory_info().rss)
    over.set()
    return resident[0], resident[-1]
