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
from bwlm.cluster.placement import driver_bundle, worker_bundle
from bwlm.cluster.signals import process_termination
from bwlm.config import ResourceSettings
from bwlm.errors import Interrupted, RunError
from bwlm.grid.elastic import ElasticGroup, train_elastic
from bwlm.paths import storage_root, write_json
from bwlm.record.experiment import WORKER, ExperimentFolder
from bwlm.record.lease import LeaseLost
from bwlm.storage.opened import fetch, in_bucket, pull


class RaySession:
    """Session of a worker, for the training loop. A worker of a group reports to Train, a single one to Tune."""

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

        # in Train's local mode the trial itself is the worker, and Train has no context
        context = ray.train.get_context() if resources.drives_group else None
        self._in_group = context is not None
        self.rank = context.get_world_rank() if context else 0
        self.world = context.get_world_size() if context else 1
        if resources.gpus_per_worker:
            self.device = ray.train.torch.get_device() if context else torch.device("cuda", 0)
            # a cell that allocates more than its share of the GPU fails alone, not the cells beside it
            torch.cuda.set_per_process_memory_fraction(resources.gpus_per_worker, self.device)
        else:
            self.device = torch.device("cpu")
        self._steps = steps
        self._every = max(1, steps // 50)
        self._evaluate_every = evaluate_every
        self._lost_lease = lost_lease
        self._after_step = after_step

    def begin(self) -> None:
        """Report that the workers of this group are there; a single worker is there as soon as its trial."""
        if self._in_group:
            import ray.train

            ray.train.report({"workers": self.world})

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

        send: Any = ray.train.report if self._in_group else ray.tune.report
        send({"step": step, "workers": self.world, **metrics})

    def _is_validated(self, step: int) -> bool:
        return step == self._steps or bool(self._evaluate_every and step % self._evaluate_every == 0)

    def stopping(self) -> bool:
        """Return true if this process was asked to end, if its node leaves, or if another process has taken the run."""
        return process_termination().asked or self._lost_lease() or (self._in_group and _node_leaves())


def _node_leaves() -> bool:
    """Return whether Train has heard that a node of this group of workers is drained.

    Train's own function for it asks rank 0 through an actor, which takes longer than many a step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def trial_resources(resources: ResourceSettings) -> Any:
    """Return the resources that Tune reserves for a trial: the cell's, or its driver's if Train places workers."""
    from ray.tune import PlacementGroupFactory

    return PlacementGroupFactory([driver_bundle(resources) or worker_bundle(resources)])


def train_cell(config: dict[str, Any]) -> None:
    """Train one cell through Ray Train: the trainable that Tune calls.

    A single worker runs in Train's local mode inside this (reused) actor, which saves the seconds that starting a
    worker group takes; others get a TorchTrainer of their own. Raises `RayActorError`, marked as a preemption, if the
    cell returns before its end: it was asked to end, another process took it over, or its number of workers follows
    the nodes. Raises it at once in a process that was asked to end before.
    """

    prepare_environment()
    folder = ExperimentFolder(storage_root(config["storage"]), config["cell"])
    pull(folder.path)
    resources = ResourceSettings(**config["resources"])
    with process_termination() as termination:
        if resources.drives_group:
            # not in the workers: if rank 0 waited for the lease, the others would time out at their barrier
            folder.wait_until_free(lambda: termination.asked)
        if not termination.asked:
            if resources.is_elastic:
                group = ElasticGroup(resources, config["sizes"], config["at_once"])
                train_elastic(folder, group, partial(_fit, config))
            else:
                _fit(config, resources.fewest)
            if folder.status().ended:
                return
    # Tune does not count a preemption as a failure: it discards the process and starts the cell again
    raise RayActorError(error_msg=f"{folder.id}: its worker was stopped, or lost the run", preempted=True)


def _fit(config: dict[str, Any], workers: int) -> None:
    _trainer(config, ResourceSettings(**config["resources"]), workers).fit()


class _NamedByCell:
    """Actor of a trial, which has the id of its cell as its name in Ray's state and dashboard.

    A trial with one worker keeps the name of its function: its actor is used again for further cells.
    """

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        if ResourceSettings(**config["resources"]).drives_group:
            self._name = config["cell"]
        super().__init__(config, **options)  # type: ignore[call-arg]


train_cell.__mixins__ = (_NamedByCell,)  # type: ignore[attr-defined]  # Tune makes a class of the function and of these


def _trainer(config: dict[str, Any], resources: ResourceSettings, workers: int) -> Any:
    import ray.train
    import ray.train.torch
    from ray.tune.integration.ray_train import TuneReportCallback

    in_group = resources.drives_group
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=config,
        # the others wait so long for a worker that hangs: then the cell fails, and starts again
        torch_config=ray.train.torch.TorchConfig(timeout_s=config["stall_seconds"]) if in_group else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if in_group else 0,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker if in_group else None,
        ),
        run_config=ray.train.RunConfig(
            name=config["cell"],
            storage_path=config["scratch"],
            # Tune counts the retries. A group of a size that follows the nodes does not wait for room that has gone
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0 if resources.is_elastic else -1
            ),
            callbacks=[TuneReportCallback()] if in_group else None,
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
        session.begin()
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
