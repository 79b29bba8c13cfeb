"""The code of Ray's workers: a cell through Tune and Train, and its session."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from bwlm.cluster.capacity import TRIAL_CPUS
from bwlm.cluster.environment import prepare_environment
from bwlm.cluster.signals import process_termination
from bwlm.config import ResourceSettings
from bwlm.errors import Interrupted, RunError
from bwlm.record.lease import LeaseLost


class RaySession:
    """The loop's view of a Ray Train worker; a cell of one worker reports to Tune, one of several to Train."""

    def __init__(self, steps: int, resources: ResourceSettings, lost_lease: Callable[[], bool] = lambda: False) -> None:
        import ray.train
        import ray.train.torch
        import torch

        several = resources.workers > 1
        # in local mode the trial itself is the worker, and Train has no context to ask
        context = ray.train.get_context() if several else None
        self.rank = context.get_world_rank() if context else 0
        self.world = context.get_world_size() if context else 1
        if resources.gpus_per_worker:
            self.device = ray.train.torch.get_device() if several else torch.device("cuda", 0)
            # a cell that wants more than its part fails alone, and not those beside it
            torch.cuda.set_per_process_memory_fraction(resources.gpus_per_worker, self.device)
        else:
            self.device = torch.device("cpu")
        self._steps = steps
        self._every = max(1, steps // 50)
        self._lost_lease = lost_lease

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """A report costs milliseconds, so only some steps and every validation are reported: the same on all ranks."""
        if step % self._every and step != self._steps and "val_bpb" not in metrics:
            return
        import ray.train
        import ray.tune

        send: Any = ray.tune.report if self.world == 1 else ray.train.report
        send({"step": step, **metrics})

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
    """Tune's trainable: one cell through Ray Train, whatever its number of workers.

    One worker runs in Train's local mode inside this (reused) actor, which saves the seconds that starting a worker
    group takes; several workers get a TorchTrainer of their own. Raises a preemption if the cell comes back without an
    end, since it was asked to or another process took it over, and at once in a process that was asked to end before.
    """
    from bwlm.record.experiment import ExperimentFolder

    prepare_environment()
    folder = ExperimentFolder(Path(config["storage"]), config["cell"])
    resources = ResourceSettings(**config["resources"])
    with process_termination() as termination:
        if resources.workers > 1:
            # here, since a worker that waits lets the others run into their barrier's limit
            folder.wait_until_free(lambda: termination.asked)
        if not termination.asked:
            _trainer(config, resources).fit()
            if folder.status().ended:
                return
    # Tune counts this as no failure, discards the process and takes the cell up again
    raise RayActorError(error_msg=f"{folder.id}: its worker was asked to end, or lost it", preempted=True)


def _trainer(config: dict[str, Any], resources: ResourceSettings) -> Any:
    import ray.train
    import ray.train.torch
    from ray.tune.integration.ray_train import TuneReportCallback

    several = resources.workers > 1
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=config,
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

    from bwlm.record.experiment import ExperimentFolder
    from bwlm.text.stream import stream_batches
    from bwlm.train.run import run_phase

    folder = ExperimentFolder(Path(config["storage"]), config["cell"])
    resources = ResourceSettings(**config["resources"])
    torch.set_num_threads(resources.cpus_per_worker)
    session = RaySession(folder.config().steps, resources, lambda: folder.lost_lease)
    # a process that waits for the lease leaves when it is asked to end, unless other workers would wait for it in turn
    give_up = session.stopping if session.world == 1 else lambda: False
    writer = folder.lease(give_up=give_up) if session.rank == 0 else contextlib.nullcontext()
    with process_termination(), contextlib.suppress(Interrupted, LeaseLost), _warnings_to(folder.warnings), writer:
        if session.world > 1:
            dist.barrier()
        end = run_phase(folder, session, stream_batches)
        if session.rank == 0 and end.ended and not folder.status().ended:
            raise RunError(f"{end.reason}; this end cannot be noted in {folder.path}")  # Tune counts it, and gives up


@contextlib.contextmanager
def _warnings_to(path: Path) -> Iterator[None]:
    """Ray keeps what workers print to itself."""
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
