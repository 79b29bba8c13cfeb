"""Launches: the common part of `bwlm grid run` and `bwlm train`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bwlm.cli.terminal import say, show
from bwlm.paths import check_writable
from bwlm.progress import loading
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.grid.launch import LaunchResult
    from bwlm.plan.spec import Plan


def launch(plan: Plan, root: Path, accept_code: bool) -> LaunchResult:
    """Run a plan with its progress on stderr; return the result."""
    check_writable(root)
    for line in warnings_of(plan, root):
        say(f"warning: {line}")
    with loading():  # after the plan was read, so that a mistake in it is told at once
        from bwlm.grid.launch import run_plan

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        say(f"storage: {address_of(root)}")
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints to stdout, which is for the result alone
        return run_plan(plan, root, say, accept_code)


def warnings_of(plan: Plan, root: Path) -> list[str]:
    """Return what the cells that are not done may lack on this machine, a line each."""
    from bwlm.grid.cells import find_cells
    from bwlm.plan.limits import plan_warnings
    from bwlm.plan.machine import machine_of

    cells = [planned.cell for planned in find_cells(plan, root) if not planned.is_done]
    return list(plan_warnings(cells, plan.launch, root, machine_of(cells)))


def show_places(result: LaunchResult) -> None:
    """Print where the report is, and the command that opens MLflow."""
    from bwlm.record.mlflow_store import ui_command

    bin_folder = Path(sys.executable).parent
    is_on_path = shutil.which("mlflow") == str(bin_folder / "mlflow")
    command = ui_command(result.tracking_uri, Path() if is_on_path else bin_folder)
    show(f"report  {result.report}", f"MLflow  {command}")
    if result.dashboard and os.environ.get("RAY_ADDRESS"):  # the cluster stays
        show(f"Ray     http://{result.dashboard}")
