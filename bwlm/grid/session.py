"""Where cells run: the Ray cluster, what it has room for, and the session that a training loop talks to."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# glibc gives freed tensors back to the kernel at once and faults them in again: 1.4x on small CPU models.
# Read when a process starts, so it reaches the workers that Ray starts from here.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "100000000000")
os.environ.setdefault("MALLOC_TOP_PAD_", "268435456")
# a worker trains each cell in a new thread, and with heaps of their own the memory of each would be kept
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
# segments that can grow fragment less of a GPU's memory; as in nanochat
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# torch.compile's own default lies in /tmp; this one is shared by all cells and outlives a reboot
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "bwlm" / "inductor"))

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bwlm.config import Experiment, ResourceSettings
from bwlm.errors import Interrupted, UserError
from bwlm.grid.spec import available_cores
from bwlm.model.compute import (
    Compute,
    DeviceType,
    Hardware,
    Wanted,
    choose_compute,
    count_gpus,
    look_at_hardware,
    why_not_compile,
)
from bwlm.model.shape import GPTConfig
from bwlm.train.termination import Termination

_SPARE_CPUS = 1.0
"""Logical CPUs left for Ray Data's tasks: without one, a cell waits for its first batch for ever."""

_TRIAL_CPUS = 0.1
"""What the trial that drives several workers asks for itself."""


def cpus_of_cell(resources: ResourceSettings) -> float:
    """Logical CPUs that one cell holds while it runs."""
    return resources.workers * resources.cpus_per_worker + (_TRIAL_CPUS if resources.workers > 1 else 0)


@dataclass(frozen=True)
class Room:
    """How many cells run at once, and on what."""

    concurrency: int
    dashboard: str | None
    cluster: str
    """`this machine` or the address of a cluster."""


@contextlib.contextmanager
def cluster(needs: Collection[ResourceSettings], concurrency: int | None, cells: int) -> Iterator[Room]:
    """Connects to the cluster at RAY_ADDRESS, or starts a private one on this machine for the time of the block.

    `needs` are the resources of the cells, each kind once. Raises `UserError` if the cluster can never place one of
    them, or not as many at once as `concurrency` asks for: Ray itself would wait for ever without a word.
    """
    if ray.is_initialized():
        yield _room_on_cluster(needs, concurrency, cells, None)
        return
    for noisy in ("ray.data", "ray._private.authentication"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            context = _connect(address)
            yield _room_on_cluster(needs, concurrency, cells, context.dashboard_url)
        else:
            # no node of a cluster that is this machine is ever drained: one process less for each group of workers.
            # Not at import, which a real cluster's workers do too
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # a trial driver sleeps: it needs a logical CPU share to be placed, but no core of this machine
            cores = available_cores() + _TRIAL_CPUS
            chosen = _concurrency(needs, concurrency, cells, cores, count_gpus(), "this machine")
            # Ray Data's tasks and the trial drivers need logical CPUs of their own, or nothing would ever start
            logical = math.ceil(chosen * (max(map(cpus_of_cell, needs)) + _TRIAL_CPUS) + _SPARE_CPUS)
            context = _start(logical)
            yield Room(chosen, context.dashboard_url, "this machine")
    finally:
        ray.shutdown()


def _start(logical_cpus: int) -> Any:
    """A cluster that is this machine."""
    try:
        return _init(address="local", num_cpus=logical_cpus, include_dashboard=True)
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no class for it, and no setting for its 30 seconds
            raise
        raise UserError(
            "Ray did not start within 30 s, so this machine is busy with something else: run the same command once it "
            "is less so, or on a cluster (RAY_ADDRESS)"
        ) from None


def _connect(address: str) -> Any:
    """Joins a cluster, or says in one line why that cannot work: Ray would try for minutes."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS: {address} takes jobs only: use `ray job submit`, or RAY_ADDRESS=auto on the cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        check_answers(host, int(port), f"RAY_ADDRESS: {address}", "start the cluster, or unset RAY_ADDRESS")
    try:
        return _init(address=address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: {address}: {str(error).splitlines()[0]}") from None


def _init(**options: Any) -> Any:
    """`ray.init`, which replaces the handler of SIGTERM: a command's own one stays."""
    ours = signal.getsignal(signal.SIGTERM)
    context = ray.init(**options, logging_level="warning", log_to_driver=False)
    if callable(ours) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)
    return context


def check_answers(host: str, port: int, what: str, mend: str) -> None:
    """Raises `UserError` within seconds if nothing listens at an address."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise UserError(f"{what} does not answer ({error.strerror or error}): {mend}") from None


def _room_on_cluster(
    needs: Collection[ResourceSettings], concurrency: int | None, cells: int, dashboard: str | None
) -> Room:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(node.get("CPU", 0) for node in nodes) - _SPARE_CPUS
    gpus = sum(node.get("GPU", 0) for node in nodes)
    for resources in needs:
        places = sum(_places(node, resources) for node in nodes)
        if places < resources.workers:
            raise UserError(
                f"resources.workers: {resources.workers} workers of {resources.cpus_per_worker} CPUs and "
                f"{resources.gpus_per_worker} GPUs asked for, but the cluster has room for {int(places)}: "
                "lower resources or add nodes"
            )
    chosen = _concurrency(needs, concurrency, cells, cpus, gpus, "the cluster")
    unused = gpus and not any(resources.gpus_per_worker for resources in needs)
    hint = f", whose {int(gpus)} GPUs no cell asks for (resources.gpus_per_worker)" if unused else ""
    return Room(chosen, dashboard, f"{ray.get_runtime_context().gcs_address}{hint}")


def _places(node: dict[str, float], resources: ResourceSettings) -> float:
    """Workers that fit on one node."""
    places = node.get("CPU", 0) // resources.cpus_per_worker
    return min(places, node.get("GPU", 0) // resources.gpus_per_worker) if resources.gpus_per_worker else places


def _concurrency(
    needs: Collection[ResourceSettings], wanted: int | None, cells: int, cpus: float, gpus: float, where: str
) -> int:
    """Cells at once: as many of the largest kind as fit, so that none of them ever waits for room."""
    fits = min(_fitting(resources, cpus, gpus, where) for resources in needs)
    if wanted is not None and wanted > fits:
        raise UserError(f"launch.concurrency: {wanted} cells at once, but {where} has room for {fits}: lower it")
    return max(1, min(wanted or fits, cells))


def _fitting(resources: ResourceSettings, cpus: float, gpus: float, where: str) -> int:
    fits = int(cpus // cpus_of_cell(resources))
    need = f"{resources.workers} x {resources.cpus_per_worker} CPUs"
    if resources.gpus_per_worker:
        fits = min(fits, int(gpus // (resources.workers * resources.gpus_per_worker)))
        need += f" and {resources.gpus_per_worker} GPUs"
    if fits < 1:
        raise UserError(
            f"resources.workers: a cell needs {need}, but {where} has {int(cpus)} CPUs and {int(gpus)} GPUs to give: "
            "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker, or take a larger cluster"
        )
    return fits


def plan_compute(experiment: Experiment, shape: GPTConfig, steps: int) -> Compute:
    """How a run will compute on its workers; what its settings leave open is chosen for the hardware."""
    asked, resources = experiment.compute, experiment.resources
    wanted = Wanted(
        None if asked.precision == "auto" else asked.precision,
        None if asked.attention == "auto" else asked.attention,
        asked.fused_loss,
        asked.compile,
        asked.device_batch_size,
    )
    hardware, peak = _worker_hardware("cuda" if resources.gpus_per_worker else "cpu", resources.cpus_per_worker)
    rows = experiment.budget.batch_tokens // shape.sequence_length // resources.workers
    chosen = compiled_if_it_can(choose_compute(wanted, hardware, peak, shape, rows, steps), experiment)
    return replace(chosen, reasons=chosen.reasons | {"allocator": _allocator()})


def compiled_if_it_can(compute: Compute, experiment: Experiment) -> Compute:
    """The same, but not compiled where the compiler of the workers fails. Raises `UserError` if compiling was set."""
    device: DeviceType = "cuda" if experiment.resources.gpus_per_worker else "cpu"
    if not compute.compile or not (broken := _why_not_compile(device)):
        return compute
    if experiment.compute.compile:
        raise UserError(
            f"compute.compile: true, but torch.compile fails here ({broken}): install it, or leave the choice open"
        )
    reason = f"off: torch.compile fails here ({broken})"
    return replace(compute, compile=False, reasons=compute.reasons | {"compile": reason})


def _allocator() -> str:
    if os.environ.get("RAY_ADDRESS"):
        return "as the environment of the cluster's nodes sets it (docs/performance.md)"
    kept = (
        "freed memory stays in the process" if os.environ["MALLOC_MMAP_MAX_"] == "0" else "as the environment sets it"
    )
    return f"{kept} (MALLOC_TRIM_THRESHOLD_={os.environ['MALLOC_TRIM_THRESHOLD_']})"


@cache
def _worker_hardware(device: DeviceType, threads: int) -> tuple[Hardware, float]:
    """What a worker finds, and its peak in FLOP/s: on this machine, or on a node of the cluster that has it."""
    if not os.environ.get("RAY_ADDRESS"):
        return look_at_hardware(device, threads)
    look = ray.remote(look_at_hardware).options(num_cpus=threads, num_gpus=1 if device == "cuda" else 0)
    found: tuple[Hardware, float] = ray.get(look.remote(device, threads))
    return found


@cache
def _why_not_compile(device: DeviceType) -> str:
    """A compiler that is there may still fail, and a long run must not die of a choice that nobody made."""
    if not os.environ.get("RAY_ADDRESS"):
        return why_not_compile(device)
    look = ray.remote(why_not_compile).options(num_cpus=1, num_gpus=1 if device == "cuda" else 0)
    return str(ray.get(look.remote(device)))


@cache
def process_termination() -> Termination:
    """Of this worker process: one that was asked to end takes no further cell."""
    return Termination()


def ask_to_end(holder: str) -> None:
    """Sends SIGTERM to the worker `host:pid`, on whatever node of the cluster it is."""
    host, _, pid = holder.rpartition(":")
    if host == socket.gethostname():
        _terminate(pid)
        return
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == host:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ray.remote(_terminate).options(num_cpus=0, scheduling_strategy=there).remote(pid)


def _terminate(pid: str) -> None:
    with contextlib.suppress(psutil.Error, ValueError):  # a holder that has not yet written down who it is
        process = psutil.Process(int(pid))
        if process.name().startswith("ray::"):  # a number that was given away again is not ours to end
            process.terminate()


class RaySession:
    """The loop's view of a Ray Train worker; a cell of one worker reports to Tune, one of several to Train."""

    def __init__(self, steps: int, resources: ResourceSettings) -> None:
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
        else:
            self.device = torch.device("cpu")
        self._steps = steps
        self._every = max(1, steps // 50)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """A report costs milliseconds, so only some steps and every validation are reported: the same on all ranks."""
        if step % self._every and step != self._steps and "val_bpb" not in metrics:
            return
        import ray.train
        import ray.tune

        send: Any = ray.tune.report if self.world == 1 else ray.train.report
        send({"step": step, **metrics})

    def stopping(self) -> bool:
        return process_termination().asked


def trial_resources(resources: ResourceSettings) -> Any:
    """What Tune reserves for a trial: the cell itself, or only its driver where Train places the workers."""
    from ray.tune import PlacementGroupFactory

    if resources.workers > 1:
        return PlacementGroupFactory([{"CPU": _TRIAL_CPUS}])
    return PlacementGroupFactory([{"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}])


def train_cell(config: dict[str, Any]) -> None:
    """Tune's trainable: one cell through Ray Train, whatever its number of workers.

    One worker runs in Train's local mode inside this (reused) actor, which saves the seconds that starting a worker
    group takes; several workers get a TorchTrainer of their own. Raises a preemption if the cell comes back without an
    end, and at once in a process that was asked to end before.
    """
    from bwlm.record.lineage import ExperimentFolder

    folder = ExperimentFolder(Path(config["storage"]), config["cell"])
    resources = folder.config().experiment.resources
    with process_termination() as termination:
        if resources.workers > 1:
            # here, since a worker that waits lets the others run into their barrier's limit
            folder.wait_until_free(lambda: termination.asked)
        if not termination.asked:
            _trainer(config, resources).fit()
            if folder.status().ended:
                return
    # Tune counts this as no failure, discards the process and takes the cell up again
    raise RayActorError(error_msg=f"{folder.id}: its worker was asked to end", preempted=True)


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
    """What every worker of a cell runs. Its warnings go to a file, from which the launch tells them."""
    import torch
    import torch.distributed as dist

    from bwlm.record.lineage import ExperimentFolder
    from bwlm.text.stream import stream_batches
    from bwlm.train.base import run_base

    folder = ExperimentFolder(Path(config["storage"]), config["cell"])
    run = folder.config()
    torch.set_num_threads(run.experiment.resources.cpus_per_worker)
    session = RaySession(run.steps, run.experiment.resources)
    # a process that waits for the lease leaves when it is asked to end, unless other workers would wait for it in turn
    give_up = session.stopping if session.world == 1 else lambda: False
    writer = folder.lease(give_up=give_up) if session.rank == 0 else contextlib.nullcontext()
    with process_termination(), contextlib.suppress(Interrupted), writer, _warnings_to(folder.warnings):
        if session.world > 1:
            dist.barrier()
        run_base(folder, session, stream_batches)


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
