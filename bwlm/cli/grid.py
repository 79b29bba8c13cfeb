"""`bwlm grid`: plan, run and watch a grid of cells."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.app import App
from bwlm.cli.launch import launch, show_places, warnings_of
from bwlm.cli.terminal import AcceptCode, Json, Set, Storage, print_json, say, show, show_sentences, show_table
from bwlm.errors import UserError
from bwlm.format import first_of
from bwlm.phases import PHASES
from bwlm.progress import loading, working

if TYPE_CHECKING:
    from bwlm.grid.cells import PlannedCell
    from bwlm.grid.launch import LaunchResult
    from bwlm.plan.spec import Plan

grid_app = App(help="Plan, run and watch a grid of cells.", no_args_is_help=True)

GridFile = Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Grid file.", show_default=False)]


def _load(grid: Path, settings: list[str] | None, storage: str | None) -> tuple[Plan, Path]:
    from bwlm.paths import storage_root
    from bwlm.plan.load import load_grid

    plan = load_grid(grid, settings or [], storage)
    return plan, storage_root(storage or plan.launch.storage)


@grid_app.command("plan")
def grid_plan(
    grid: GridFile,
    seed_noise: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="How much the gap varies over seeds (standard deviation, nats per token), from a pilot study. The "
            "plan then prints the smallest gap in nats.",
            show_default=False,
        ),
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print each cell with its parameters, tokens, FLOPs, log size and state; then the smallest gap that can be seen.

    A gap is the difference in loss between two directions. How small a gap can be seen depends on the number of seeds.

    Warns of memory, disk space and GPUs that the cells need and this machine does not have.

    Example: `bwlm grid plan grids/demo.yaml --set budget.steps=100 --seed-noise 0.006`
    """
    if seed_noise is not None and not 0 < seed_noise < math.inf:
        raise UserError(f"--seed-noise: {seed_noise} is not a positive number of nats per token")
    plan, root = _load(grid, set_, storage)
    from tasks.sources import check_sources

    for cell in plan.cells:
        check_sources(cell.experiment)
    from bwlm.format import short_number

    with loading():  # scipy takes a second: mistakes are reported first
        from bwlm.plan.power import detectable, detectable_words
    seen, warnings = detectable(plan, seed_noise), warnings_of(plan, root)
    if as_json:
        return print_json(_status_document(plan, root) | {"detectable": seen, "warnings": warnings})
    cells = _status_document(plan, root)["cells"]
    costs = ("params", "tokens", "flops", "log_bytes")
    rows = [[c["id"], *(short_number(c[cost]) for cost in costs), c["state"]] for c in cells]
    header = ["cell", "params", "tokens", "FLOPs", "log (bytes)", "state"]
    show_table(header, rows, f"{plan.name}: {len(cells)} cells", names=("cell",))
    show_sentences(*_reasons(cells))
    total = sum(c["flops"] for c in cells)
    left = sum(c["flops"] for c in cells if not c["done"] and c["reason"] != _STOPPED_ABOVE)
    show(f"{short_number(total)} FLOPs in all, {short_number(left)} to do; storage {root}")
    show_sentences(detectable_words(seen), *(f"warning: {line}" for line in warnings))
    return None


@grid_app.command("status")
def grid_status(grid: GridFile, set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show state, step and metrics of each cell of a grid.

    Example: `bwlm grid status grids/demo.yaml --json`
    """
    from bwlm.grid.cells import find_cells
    from bwlm.record.catalog.rows import FIGURES, cell_columns, load_readable

    plan, root = _load(grid, set_, storage)
    planned = find_cells(plan, root)
    known, left_out = load_readable(p.folder for p in planned if p.folder.exists())
    for line in left_out:
        say(line)
    if as_json:
        return print_json(_status_document(plan, root))
    shown = ["state", *FIGURES]
    rows = [[c.id, *cell_columns(c, shown)] for c in known]
    show_table(["id", *shown], rows, plan.name, names=("id",), least=("loss",))
    show(f"{sum(c.state == 'finished' for c in known)} of {len(planned)} cells finished")
    return None


@grid_app.command("run")
def grid_run(
    grid: GridFile,
    set_: Set = None,
    storage: Storage = None,
    accept_code: AcceptCode = False,
    as_json: Json = False,
) -> None:
    """Train every cell that is not finished, then compare the directions. The same command resumes.

    Example: `bwlm grid run grids/demo.yaml`
    """
    plan, root = _load(grid, set_, storage)
    result = launch(plan, root, accept_code)
    if as_json:
        print_json(_status_document(plan, root))
    else:
        _show_result(plan, root, result, _submit_line(grid, set_ or [], root))
    if not result.complete:
        raise typer.Exit(1)


@grid_app.command("schema")
def grid_schema() -> None:
    """Print the JSON Schema of a grid file.

    Example: `bwlm grid schema > grid.schema.json`
    """
    from bwlm.plan.spec import Grid

    print_json(Grid.model_json_schema())


_STOPPED_ABOVE = "not trained: the scheduler stopped a run early from which it descends"


def _status_document(plan: Plan, root: Path) -> dict[str, Any]:
    from bwlm.grid.cells import find_cells, without_parent
    from bwlm.record.researchlog_size import bytes_of_log

    planned = find_cells(plan, root)
    out = without_parent(planned)
    cells = [
        {
            "id": p.cell.id, "params": p.cell.parameters, "tokens": p.cell.tokens, "flops": p.cell.flops,
            "log_bytes": bytes_of_log(p.cell.experiment, p.cell.shape, p.cell.steps),
            "state": p.status.state, "reason": _STOPPED_ABOVE if p.cell.id in out else _reason(p),
            "done": p.is_done, "step": p.status.step, "steps": p.cell.steps, "metrics": p.status.metrics,
        }
        for p in planned
    ]  # fmt: skip
    return {"grid": plan.name, "cells": cells}


def _reasons(cells: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each reason of a planned grid's cells, with the cells that it holds for."""
    holds_for: dict[str, list[str]] = {}
    for cell in cells:
        holds_for.setdefault(cell["reason"], []).append(cell["id"])
    return [f"{first_of(ids)}: {reason}" for reason, ids in holds_for.items() if reason]


def _reason(planned: PlannedCell) -> str:
    """Return why a cell ended as it did, or why `grid run` would refuse it."""
    if planned.changed:
        return f"exists with other settings ({'; '.join(planned.changed)})"
    return planned.other_code or planned.status.reason


def _show_result(plan: Plan, root: Path, result: LaunchResult, submit: str) -> None:
    from bwlm.analysis.commands.gap import gap_caption
    from bwlm.analysis.report.study import dropped_cells, dropped_words
    from bwlm.analysis.report.variants import variants
    from bwlm.analysis.runs.findings import BEST_HEADER, best_columns, find
    from bwlm.cli.analyze import show_gaps
    from bwlm.record.catalog.rows import AXES, CELL_HEADER, cell_columns
    from bwlm.record.experiment import ExperimentFolder

    folders = [ExperimentFolder(root, cell.id) for cell in result.cells]
    with working("comparing the directions"):
        findings = find(folders)
    bases = [cell_columns(cell) for cell in result.cells if PHASES[cell.phase].is_first]
    if bases:
        show_table(CELL_HEADER, bases, f"{plan.name}: cells", names=AXES, least=("loss",))
    for one in variants(folders):
        show("")
        show_table(one.header, one.rows, f"{plan.name}: {one.phase}", names=one.settings)
        show_sentences(*one.comparisons)
    if findings.best:
        show("")
        best = [best_columns(rate) for rate in findings.best]
        show_table(BEST_HEADER, best, "Best learning rate (chosen on the tuning half)", names=("size", "direction"))
    if findings.gaps:
        show("")
        show_gaps(findings.gaps, gap_caption(findings))
    show("")
    show_sentences(*(f"no result: {line}" for line in findings.skipped))
    show_sentences(*findings.at_edge, *dropped_words(dropped_cells(root, plan.name)))
    show_places(result)
    show(f"dashboard  {_dashboard_hint(result, submit)}")


def _submit_line(grid: Path, overrides: list[str], root: Path) -> str:
    """Return the command that runs the same grid as a job; a job's own default storage is another one."""
    words = ["jobs/run_grid.py", str(grid), *(word for one in overrides for word in ("--set", one))]
    words += ["--storage", str(root.absolute())]
    return f"ray job submit --working-dir . --runtime-env jobs/env.yaml -- python {shlex.join(words)}"


def _dashboard_hint(result: LaunchResult, submit: str) -> str:
    if os.environ.get("RAY_ADDRESS"):
        return f"http://{result.dashboard}" if result.dashboard else os.environ["RAY_ADDRESS"]
    where = f"http://{result.dashboard} while it ran; " if result.dashboard else ""
    head = f"export PATH={Path(sys.executable).parent}:$PATH RAY_AUTH_MODE=token; ray get-auth-token --generate"
    return f"{where}one that stays, at http://127.0.0.1:8265: {head}; ray start --head && {submit}"
