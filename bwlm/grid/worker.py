"""Code that runs in Ray's workers: a cell through Tune and Train, and its session."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from bwlm.cluster.environment import prepare_environment
from bwlm.cluster.placement import TRIAL_CPUS
from bwlm.cluster.signals import process_termination
from bwlm.config import ResourceSettings
from bwlm.errors import Interrupted, RunError
from bwlm.paths import storage_root, write_json
from bwlm.record.experiment import WORKER, ExperimentFolder
from bwlm.record.lease import LeaseLost
from bwlm.storage.opened import fetch, in_bucket, pull


class RaySession:
    """Session of a worker, for the training loop. A cell with one worker reports to Tune, with several to Train."""

    def __init__(
        self,
        steps: int,
        resources: ResourceSettings,
        lost_lease: Callable[[], bool] = lambda: False,
        evaluate_every: int = 0,
        after_step: Callable[[int, Callable[[bool], object]], object] = lambda step, announce: None,
    ) -> None:
        """Find this worker's rank and device.

        `steps` are the run's, `evaluate_every` are those between its validations, `lost_lease` tells if its lease is
        lost. `after_step` is called after each step, with a function that says whether tasks are being scored.
        """
        import ray.train
        import ray.train.torch
        import torch

        several = resources.workers > 1
        # in Train's local mode the trial itself is the worker, and Train has no context
        context = ray.train.get_context() if several else None
        self.rank = context.get_world_rank() if context else 0
        self.world = context.get_world_size() if context else 1
        if resources.gpus_per_worker:
            self.device = ray.train.torch.get_device() if several else torch.device("cuda", 0)
            # a cell that allocates more than its share of the GPU fails alone, not the cells beside it
            torch.cuda.set_per_process_memory_fraction(resources.gpus_per_worker, self.device)
        else:
            self.device = torch.device("cpu")
        self._steps = steps
        self._every = max(1, steps // 50)
        self._evaluate_every = evaluate_every
        self._lost_lease = lost_lease
        self._after_step = after_step

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Report every validation, the step before it, and about 50 further steps, the same on all ranks.

        The step before, so that the launch can tell that a validation runs. Each report costs milliseconds.
        """
        if step % self._every == 0 or "val_bpb" in metrics or self._is_validated(step + 1):
            self._send(step, metrics)
        self._after_step(step, partial(self.scoring, step))

    def scoring(self, step: int, begins: bool) -> None:
        """Report that tasks are being scored after a step, or not any more."""
        self._send(step, {"scoring": begins})

    def _send(self, step: int, metrics: Mapping[str, float | bool]) -> None:
        import ray.train
        import ray.tune

        send: Any = ray.tune.report if self.world == 1 else ray.train.report
        send({"step": step, **metrics})

    def _is_validated(self, step: int) -> bool:
        return step == self._steps or bool(self._evaluate_every and step % self._evaluate_every == 0)

    def stopping(self) -> bool:
        """Return true if this process was asked to end, or if another process has taken the run."""
        return process_termination().asked or self._lost_lease()


def trial_resources(resources: ResourceSettings) -> Any:
    """Return the resources that Tune reserves for a trial: the cell's, or its driver's if Train places workers."""
    from ray.tune import PlacementGroupFactory

    if resources.workers > 1:
        return PlacementGroupFactory([{"CPU": TRIAL_CPUS}])
    return PlacementGroupFactory([{"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}])


def train_cell(config: dict[str, Any]) -> None:
    """Train one cell through Ray Train: the trainable that Tune calls.

    A single worker runs in Train's local mode inside this (reused) actor, which saves the seconds that starting a
    worker group takes; several workers get a TorchTrainer of their own. Raises `RayActorError`, marked as a
    preemption, if the cell returns before its end, because it was asked to end or another process took it over, and
    at once in a process that was asked to end before.
    """

    prepare_environment()
    folder = ExperimentFolder(storage_root(config["storage"]), config["cell"])
    pull(folder.path)
    resources = ResourceSettings(**config["resources"])
    with process_termination() as termination:
        if resources.workers > 1:
            # not in the workers: if rank 0 waited for the lease, the others would time out at their barrier
            folder.wait_until_free(lambda: termination.asked)
        if not termination.asked:
            _trainer(config, resources).fit()
            if folder.status().ended:
                return
    # Tune does not count a preemption as a failure: it discards the process and starts the cell again
    raise RayActorError(error_msg=f"{folder.id}: its worker was stopped, or lost the run", preempted=True)


class _NamedByCell:
    """Actor of a trial, which has the id of its cell as its name in Ray's state and dashboard.

    A trial with one worker keeps the name of its function: its actor is used again for further cells.
    """

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        if config["resources"]["workers"] > 1:
            self._name = config["cell"]
        super().__init__(config, **options)  # type: ignore[call-arg]


train_cell.__mixins__ = (_NamedByCell,)  # type: ignore[attr-defined]  # Tune makes a class of the function and of these


def _trainer(config: dict[str, Any], resources: ResourceSettings) -> Any:
    import ray.train
    import ray.train.torch
    from ray.tune.integration.ray_train import TuneReportCallback

    several = resources.workers > 1
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=config,
        # the others wait so long for a worker that hangs: then the cell fails, and starts again
        torch_config=ray.train.torch.TorchConfig(timeout_s=config["stall_seconds"]) if several else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers if several else 0,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker if several else None,
        ),
        run_config=ray.train.RunConfig(
            name=config["cell"],
            storage_path=config["scratch"],
            failure_config=ray.train.FailureConfig(max_failures=0),  # Tune counts the retries
            callbacks=[TuneReportCallback()] if several else None,
        ),
    )


def train_worker(config: dict[str, Any]) -> None:
    """Train a cell as one of its workers. Warnings go to a file, from which the launch shows them."""
    prepare_environment()
    import torch
    import torch.distributed as dist

    from bwlm.grid.nearby import stream_nearby
    from bwlm.record.bucket import bring_run
    from bwlm.text.stream import stream_batches
    from bwlm.train.run import run_phase
    from bwlm.train.scoring import CheckpointScorer

    folder = ExperimentFolder(storage_root(config["storage"]), config["cell"])
    if in_bucket(folder.path):
        bring_run(folder)
        stream_nearby()
    resources = ResourceSettings(**config["resources"])
    torch.set_num_threads(resources.cpus_per_worker)
    print(f"trains {folder.id}", flush=True)  # to this worker's log in Ray's dashboard
    own = folder.config()
    evaluate_every = own.experiment.evaluation.every
    scorer = CheckpointScorer(folder, lambda: session.stopping())
    session = RaySession(own.steps, resources, lambda: folder.lost_lease, evaluate_every, scorer.step_over)
    # a process that waits for the lease stops when it is asked to end, unless other workers would wait for it in turn
    give_up = session.stopping if session.world == 1 else lambda: False
    writer = folder.lease(give_up=give_up) if session.rank == 0 else contextlib.nullcontext()
    with process_termination(), contextlib.suppress(Interrupted, LeaseLost), _warnings_to(folder.warnings), writer:
        if session.world > 1:
            dist.barrier()
        if session.rank == 0:
            _note_worker(folder)
        fetch(folder.checkpoints)  # rank 0 has brought them, but maybe to another machine
        scorer.resumed()
        end = run_phase(folder, session, stream_batches)
        if session.rank == 0 and end.state == "finished":
            # of several workers, only all together could report
            scorer.finished(*([partial(session.scoring, own.steps)] if session.world == 1 else []))
        if session.rank == 0 and end.ended and not folder.status().ended:
            # Tune counts this failure, and gives up after its retries
            raise RunError(f"{end.reason}; nor can its status: free space in {folder.path} or make it writable")


def _note_worker(folder: ExperimentFolder) -> None:
    """Write which process trains the run, and where its log is: a worker that is reused is not named for its cell."""
    log = Path("/proc/self/fd/1").resolve()  # Ray has put a file in the place of standard output
    with contextlib.suppress(OSError):  # a full disk: training meets it soon, and tells it
        noted = {"host": socket.gethostname(), "pid": os.getpid(), "log": str(log)}
        write_json(folder.path / WORKER, noted, folder.check_lease)


@contextlib.contextmanager
def _warnings_to(path: Path) -> Iterator[None]:
    """Append the warnings of `bwlm` to a file in this block: Ray does not show what its workers print."""
    handler = logging.FileHandler(path, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("bwlm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
