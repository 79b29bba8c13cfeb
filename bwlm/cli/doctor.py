"""`bwlm doctor`: checks of this machine, or of the nodes of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.terminal import Json, Storage, print_json, show_sentences
from bwlm.errors import UserError
from bwlm.progress import loading, working

if TYPE_CHECKING:
    from bwlm.plan.doctor import Check


def doctor(
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check every node of the cluster at RAY_ADDRESS, from a job or from a node."),
    ] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Check this machine: packages, storage, MLflow, processors, compiler. Exits with 1 if a check fails.

    A bucket is checked by real requests: objects are created, read, replaced, listed and deleted.

    With --cluster: whether its nodes have equal versions and code, share the storage, reach each other and agree on
    the time.

    Example: `bwlm doctor`
    """
    from bwlm.paths import storage_root

    root = storage_root(storage)
    checks = list[dict[str, object]]()
    for check in _of_cluster(root) if cluster else _of_machine(root):
        checks.append(check._asdict())
        if not as_json:
            show_sentences(_words(check))
    is_ok = all(check["is_ok"] for check in checks)
    if as_json:
        print_json({"is_ok": is_ok, "checks": checks})
    if not is_ok:
        raise typer.Exit(1)


def _words(check: Check) -> str:
    if check.is_ok:
        return f"ok      {check.name}: {check.found}"
    return f"failed  {check.name}: {check.found}" + (f": {check.fix}" if check.fix else "")


def _of_machine(root: Path) -> Iterator[Check]:
    with loading():
        from bwlm.plan.doctor import machine_checks
        from bwlm.record.mlflow_store import tracking_uri
    with working("checking this machine"):
        yield from machine_checks(root, partial(tracking_uri, root, None))


def _of_cluster(root: Path) -> Iterator[Check]:
    """Yield the checks of the cluster. Raises `UserError` if there is none."""
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError("RAY_ADDRESS is not set: run this as a job of the cluster, or on a node with RAY_ADDRESS=auto")
    with loading():
        from bwlm.cluster.doctor import Nodes
        from bwlm.cluster.session import ray_session
        from bwlm.plan.doctor import mlflow_check
        from bwlm.record.mlflow_store import tracking_uri
    with ray_session("bwlm doctor"), working("checking the cluster"):
        yield from Nodes().checks(root)
        yield mlflow_check(partial(tracking_uri, root, None))
