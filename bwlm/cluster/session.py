"""Ray sessions: a private cluster on this machine, or the cluster at RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

import bwlm
from bwlm.cluster.capacity import (
    Capacity,
    capacity_of_cluster,
    choose_concurrency,
    cpus_of_cell,
    most_at_once,
)
from bwlm.cluster.placement import SPARE_CPUS, TRIAL_CPUS
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.model.compute import count_gpus
from bwlm.plan.machine import available_cores
from bwlm.plan.spec import LaunchSettings
from bwlm.progress import working

log = logging.getLogger(__name__)


def check_room(needs: Collection[ResourceSettings], launch: LaunchSettings, cells: int) -> None:
    """Raise `UserError` at once for what `open_cluster` would refuse, as far as it shows before Ray starts."""
    if ray.is_initialized():
        most_at_once(needs, launch.concurrency, cells)
    elif address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
    else:
        _check_temporary_folder()
        _concurrency_here(needs, launch, cells)


def _concurrency_here(needs: Collection[ResourceSettings], launch: LaunchSettings, cells: int) -> int:
    """Return the number of cells that this machine runs at once."""
    # a trial that drives workers sleeps: it needs a share of a logical CPU to be placed, but no core
    cores = available_cores() + TRIAL_CPUS
    return choose_concurrency(needs, launch.concurrency, cells, cores, count_gpus(), "this machine")


@contextlib.contextmanager
def open_cluster(
    needs: Collection[ResourceSettings], launch: LaunchSettings, cells: int, job: str
) -> Iterator[Capacity]:
    """Connect to the cluster at RAY_ADDRESS, or starts a private one on this machine for the time of the block.

    `needs` are the resources of the cells, each kind once; `job` is the name of the launch in Ray's dashboard. Yields
    the capacity. Raises `UserError` if Ray does not start or the address does not answer, if the cluster can never
    place a cell, or if it cannot place `launch.concurrency` cells at once: Ray itself would wait for ever without a
    word.
    """
    concurrency = launch.concurrency
    if ray.is_initialized():
        yield capacity_of_cluster(needs, concurrency, cells, None)
    elif os.environ.get("RAY_ADDRESS"):
        with ray_session(job) as context:
            yield capacity_of_cluster(needs, concurrency, cells, context.dashboard_url)
    else:
        # a private cluster never drains its node, so Train needs no watcher process for each group of workers.
        # Set here and not at import: the workers of a real cluster import this module too
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        chosen = _concurrency_here(needs, launch, cells)
        # Ray Data's tasks and the trials need logical CPUs besides the workers', or nothing would ever start
        logical = math.ceil(chosen * (max(map(cpus_of_cell, needs)) + TRIAL_CPUS) + SPARE_CPUS)
        with ray_session(job, logical, launch.ray_start_seconds) as context:
            yield Capacity(chosen, context.dashboard_url, "this machine")


@contextlib.contextmanager
def ray_session(job: str, logical_cpus: int = 1, start_seconds: float = 60.0) -> Iterator[Any]:
    """Connect to the cluster at RAY_ADDRESS, or start a private one of so many CPUs, for the time of the block.

    Yields Ray's context. Raises `UserError` if Ray does not start or the address does not answer.
    """
    for noisy in ("ray.data", "ray._private.authentication"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    try:
        with working(f"connecting to Ray at {address}" if address else "starting Ray"):
            context = _connect(address, job) if address else _start(logical_cpus, start_seconds, job)
        yield context
    finally:
        with working("stopping Ray"):
            ray.shutdown()


def _start(logical_cpus: int, seconds: float, job: str) -> Any:
    """Start a cluster on this machine; if Ray gives up after its own 30 s, try again until `seconds` are over.

    Raises `UserError` if Ray does not start.
    """
    _check_temporary_folder()
    began = time.monotonic()
    while True:
        try:
            return _init(job, address="local", num_cpus=logical_cpus, include_dashboard=True)
        except Exception as error:  # Ray has no exception class for a failed start
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise UserError(f"Ray does not start on this machine: {_first_line(error)}: {_RAY_SETTINGS}") from None
        waited = time.monotonic() - began
        if waited >= seconds:
            raise UserError(
                f"Ray did not start within {waited:.0f} s, so this machine is busy with something else: raise "
                "launch.ray_start_seconds, run the same command again later, or use a cluster (RAY_ADDRESS)"
            )
        log.warning("Ray's node has not answered for %.0f s: this machine is busy; trying again", waited)


_RAY_SETTINGS = "check HOME, the environment variables that begin with RAY_, free memory and /dev/shm"
_SOCKET_PATH = 107
"""Longest path of a socket on Linux, in bytes."""
_BELOW_TEMPORARY = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"


def _check_temporary_folder() -> None:
    """Raise `UserError` that names the variable where Ray could not put its sockets: its own error is a crash."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    folder = Path(os.environ[name]) if name else Path("/tmp")
    what = f"{name or 'the temporary folder'}: {folder}"
    if not folder.is_dir():
        raise UserError(f"{what} is not a folder: make it, or set RAY_TMPDIR=/tmp")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{what} is not writable: set RAY_TMPDIR to a folder that is")
    if len(os.fsencode(folder)) + len(_BELOW_TEMPORARY) > _SOCKET_PATH:
        longest = _SOCKET_PATH - len(_BELOW_TEMPORARY)
        raise UserError(f"{what} is too long for Ray's sockets (over {longest} bytes): set RAY_TMPDIR=/tmp")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _connect(address: str, job: str) -> Any:
    """Join a cluster. Raises `UserError` with one line if that cannot work: Ray itself would try for minutes."""
    _check_address(address)
    try:
        _check_token(address)
        return _init(job, address=address, runtime_env=_environment_of(address))
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"RAY_ADDRESS: {address}: {_first_line(error)}: {_TOKEN}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"RAY_ADDRESS: {address}: {_first_line(error)}: check it, or unset RAY_ADDRESS") from None


def _environment_of(address: str) -> dict[str, Any]:
    """Return what the processes of a launch must know: where their cluster is.

    Train's cleaner of placement groups looks for a cluster on its machine. If it finds two, it gives up, and the room
    of a cell whose trial was killed stays taken for ever.
    """
    return {"env_vars": {"RAY_ADDRESS": address}} if re.fullmatch(r"[^/]+:\d+", address) else {}


def _check_address(address: str) -> None:
    """Raise `UserError` if nothing listens at the address, or no cluster that can be joined."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS: {address} takes jobs only: use `ray job submit`, or RAY_ADDRESS=auto on the cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        check_answers(host, int(port), f"RAY_ADDRESS: {address}", "start the cluster, or unset RAY_ADDRESS")


def _check_token(address: str) -> None:
    """Raise `UserError` where the cluster asks for another token: Ray itself would ask again for minutes.

    The check asks the cluster for its id, as Ray itself does first. Raises Ray's `AuthenticationError` if this process
    must show a token and has none.
    """
    if address == "auto":
        addresses = ray._private.services.find_gcs_addresses()
        if len(addresses) != 1:
            return  # Ray's own error says what is missing
        [gcs] = addresses
    else:
        gcs = address
    if "://" in gcs:
        return  # a Ray Client server, which has no such call
    header = AuthenticationTokenLoader.instance().get_token_for_http_header()
    metadata = [(name.lower(), value) for name, value in header.items()]
    with grpc.insecure_channel(gcs) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=_ANSWER_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(
                    f"RAY_ADDRESS: {address}: the cluster refuses this process without its token: {_TOKEN}"
                ) from None


_ANSWER_SECONDS = 10.0
_TOKEN = "export RAY_AUTH_MODE=token, and copy the head's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN"


def _init(job: str, **options: Any) -> Any:
    """Call `ray.init`, and keep this process's SIGTERM handler, which `ray.init` replaces.

    Ray's workers import from the working folder of this call first. In a user's folder, a `tasks.py` or `numpy.py`
    would shadow the modules that bwlm imports, so the call is made in the folder that holds this package.
    """
    ours = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(Path(bwlm.__file__).parents[1]):
        # the name that a submitted job was given has precedence, in Ray
        named = ray.job_config.JobConfig(metadata={"job_name": job})
        context = ray.init(**options, job_config=named, logging_level="warning", log_to_driver=False)
    if callable(ours) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)
    return context


def check_answers(host: str, port: int, what: str, mend: str) -> None:
    """Raise `UserError` within seconds if nothing listens at an address."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise UserError(f"{what} does not answer ({error.strerror or error}): {mend}") from None
