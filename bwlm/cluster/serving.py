"""Models as a deployment of Ray Serve: the app of `bwlm serve`, in as many processes of a cluster as its load needs.

Each replica loads the models and builds the app for itself, so it has slots and places of its own, and answers 429 when
they are taken. Serve gives a replica more requests than it has places: so it is always the app that refuses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, ProxyLocation
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bwlm.chat.access import Access
from bwlm.chat.served import ServedModel
from bwlm.chat.server import build_app
from bwlm.cluster.autoscaling import find_autoscaler
from bwlm.cluster.capacity import resources_of_nodes, room_on
from bwlm.cluster.environment import prepare_environment
from bwlm.cluster.session import ray_session
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.plan.machine import available_cores
from bwlm.progress import working

APP = "bwlm"
REPLICA = "x-bwlm-replica"
"""Header of each response: the replica that it comes from."""

_BESIDE = 100
"""Requests of a replica that hold no place: they are refused, read a page, or are still being sent."""
_WAITING = 500
"""Requests that the proxy keeps until a replica takes them."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Replicas:
    """Numbers of a deployment: of its processes, and of what each does at once."""

    least: int
    most: int
    threads: int
    slots: int
    """Requests that each decodes at once: while there are more, replicas are added."""
    places: int
    """Requests that each admits."""
    grace: float
    """Seconds that streams may go on once a replica is to end."""


@serve.ingress()  # without an app: each replica builds its own
class Replica:
    """Process of the deployment, with its models."""

    def __init__(self, load: Callable[[], Sequence[ServedModel]], access: Access) -> None:
        prepare_environment()
        self._models, self._access = load(), access

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Serve runs it, with its engines, in the event loop of the replica."""
        return _Named(build_app(self._models, self._access), serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise an exception if an engine cannot go on: Serve then starts another replica."""
        for model in self._models:
            model.running().check()


class _Named:
    """ASGI app whose responses name the replica that they come from."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self._app, self._replica = app, replica.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLICA.encode(), self._replica)]
            await send(message)

        await self._app(scope, receive, named)


def serve_replicas(
    load: Callable[[], Sequence[ServedModel]],
    access: Access,
    replicas: Replicas,
    host: str,
    port: int,
    tell: Callable[[], None],
) -> int | None:
    """Serve on the cluster at RAY_ADDRESS, or on a private one here, until a signal comes; return its number.

    `tell` is called once replicas answer. Raises `UserError` if the cluster has no room, or
    serves something else already, or if no replica starts.
    """
    with ray_session(APP, available_cores()):
        gpus = _check_room(replicas)
        with _started(deployment(load, access, replicas, gpus), host, port):
            tell()
            return _until_signal()


def deployment(load: Callable[[], Sequence[ServedModel]], access: Access, replicas: Replicas, gpus: int) -> Any:
    """Return the application for `serve.run`."""
    return serve.deployment(
        Replica,
        name=APP,
        ray_actor_options={"num_cpus": replicas.threads, "num_gpus": gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.least, max_replicas=replicas.most, target_ongoing_requests=replicas.slots
        ),
        max_ongoing_requests=replicas.places + _BESIDE,
        max_queued_requests=_WAITING,  # Serve's own answer to more has the status of the app's
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        graceful_shutdown_timeout_s=replicas.grace,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
    ).bind(load, access)


def _check_room(replicas: Replicas) -> int:
    """Return the GPUs of a replica: one, if a node has any.

    That is of the nodes that there are; if they have no room, of those that the autoscaler could start. Raises
    `UserError` if too few replicas fit on these either.
    """
    nodes = resources_of_nodes()
    if room_on(nodes, _needs(replicas, nodes)) < replicas.least and (autoscaler := find_autoscaler()):
        if not autoscaler.node_types:
            return int(_needs(replicas, nodes).gpus_per_worker)
        nodes = autoscaler.grown(nodes)
    needs = _needs(replicas, nodes)
    if (room := room_on(nodes, needs)) < replicas.least:
        raise UserError(
            f"--replicas {replicas.least}: each needs {replicas.threads} CPUs and {needs.gpus_per_worker:g} GPUs, and "
            f"the cluster has room for {room}: lower --replicas or --threads, or add nodes"
        )
    return int(needs.gpus_per_worker)


def _needs(replicas: Replicas, nodes: Collection[dict[str, float]]) -> ResourceSettings:
    gpus = any(node.get("GPU") for node in nodes)
    return ResourceSettings(workers=replicas.least, cpus_per_worker=replicas.threads, gpus_per_worker=int(gpus))


@contextlib.contextmanager
def _started(application: Any, host: str, port: int) -> Iterator[None]:
    """Run an application for the time of the block. Raises `UserError` if that cannot be."""
    if serve.status().proxies:
        raise UserError("Ray Serve runs on this cluster already: end it (`serve shutdown`), or use another cluster")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with working("starting replicas"):
            _start(application, host, port)
        yield
    finally:
        # the call that ends Serve ends with its actor, which Ray reports on stdout as a failure
        with working("ending streams"), contextlib.redirect_stdout(io.StringIO()):
            _end()


def _start(application: Any, host: str, port: int) -> None:
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    except RuntimeError as error:
        raise UserError(f"--port {port}: {_last_line(str(error))} on the head: choose another port or --host") from None
    try:
        serve.run(application, name=APP)
    except RuntimeError:
        told = serve.status().applications[APP].deployments[APP].message
        raise UserError(f"no replica started: {_last_line(told)}") from None


def _last_line(trace: str) -> str:
    """Return the error at the end of a stack trace, without its class."""
    return re.sub(r"^[\w.]+(Error|Exception): ", "", trace.strip().splitlines()[-1]).rstrip(".")


def _end() -> None:
    """End the application, whose streams have their time, and then Serve, which would cut them off."""
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
    while APP in serve.status().applications:
        time.sleep(_LOOK_SECONDS / 10)
    serve.shutdown()


def _until_signal() -> int | None:
    """Return the signal that came; None if the application was ended by somebody else."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not came and APP in serve.status().applications:
            time.sleep(_LOOK_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return came[0] if came else None
