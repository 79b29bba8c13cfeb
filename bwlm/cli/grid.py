"""`bwlm grid`: plan, run and watch a grid of cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.app import App
from bwlm.cli.launch import launch, show_places, warnings_of
from bwlm.cli.terminal import (
    AcceptCode,
    Json,
    Set,
    Storage,
    number_option,
    print_json,
    say,
    show,
    show_sentences,
    show_table,
)
from bwlm.errors import UserError, nearest
from bwlm.format import first_of
from bwlm.phases import PHASES
from bwlm.progress import loading, working
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.grid.cells import PlannedCell
    from bwlm.grid.launch import LaunchResult
    from bwlm.plan.spec import Plan

grid_app = App(help="Plan, run and watch a grid of cells.", no_args_is_help=True)

GridFile = Annotated[
    Path,
    typer.Argument(metavar="GRID.yaml", help="Grid file, or the name of a grid that was run.", show_default=False),
]


def _load(grid: Path, settings: list[str] | None, storage: str | None) -> tuple[Plan, Path]:
    from bwlm.plan.load import load_grid
    from bwlm.storage.opened import open_storage

    plan = load_grid(_grid_file(grid, open_storage(storage)), settings or [], storage)
    return plan, open_storage(storage or plan.launch.storage)


def _grid_file(grid: Path, root: Path) -> Path:
    """Return the grid file, or the copy that a launch kept of it if `grid` is the name of a grid.

    Raises `UserError` if it is neither, with the nearest file or name.
    """
    from bwlm.record.grids import GRID_FILE, grid_folder, grid_names

    if grid.exists():
        return grid
    if str(grid) in (names := grid_names(root)):
        return grid_folder(root, str(grid)) / GRID_FILE
    files = map(str, grid.parent.glob("*.yaml"))
    raise UserError(
        f"{grid}: no such file, and no grid of this name in {address_of(root)}{nearest(str(grid), [*files, *names])}"
    )


@grid_app.command("plan")
def grid_plan(
    grid: GridFile,
    seed_noise: Annotated[
        float | None,
        number_option(
            "How much the gap varies over seeds (standard deviation, nats per token), from a pilot study. The "
            "plan then prints the smallest gap in nats.",
            metavar="NATS",
            show_default=False,
        ),
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print each cell with its parameters, tokens, FLOPs, log size and state; the time; the smallest gap that is seen.

    The time follows from the speed of runs in this storage that finished on this machine.

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
    from bwlm.plan.estimate import time_words

    with loading():  # scipy takes a second: mistakes are reported first
        from bwlm.plan.power import detectable, detectable_words
    seen, warnings, time = detectable(plan, seed_noise), warnings_of(plan, root), _time_of(plan, root)
    document = _status_document(plan, root)
    if as_json:
        return print_json(document | {"detectable": seen, "time": time, "warnings": warnings})
    cells = document["cells"]
    costs = ("params", "tokens", "flops", "log_bytes")
    rows = [[c["id"], *(short_number(c[cost]) for cost in costs), _state(c)] for c in cells]
    header = ["cell", "params", "tokens", "FLOPs", "log (bytes)", "state"]
    show_table(header, rows, f"{plan.name}: {len(cells)} cells", names=("cell",))
    show_sentences(*_reasons(cells), *_text_words(plan))
    total = sum(c["flops"] for c in cells)
    left = sum(c["flops"] for c in cells if not (c["done"] or c["changed"]) and c["reason"] != _STOPPED_ABOVE)
    show(f"{short_number(total)} FLOPs in all, {short_number(left)} to do; storage {address_of(root)}")
    show_sentences(
        *filter(None, [time_words(time), detectable_words(seen)]), *(f"warning: {line}" for line in warnings)
    )
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
    rows = {c.id: [c.id, *cell_columns(c, shown)] for c in known}
    rows |= {p.cell.id: [p.cell.id, p.status.state, *[""] * len(FIGURES)] for p in planned if not p.folder.exists()}
    in_order = [rows[p.cell.id] for p in planned if p.cell.id in rows]
    show_table(["id", *shown], in_order, plan.name, names=("id",), least=("loss",))
    if not any(p.folder.exists() for p in planned):
        show(
            f"no cell of {plan.name} has begun in {address_of(root)}{'' if root.exists() else ', which does not exist'}"
        )
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
        _show_result(plan, root, result)
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
            "changed": p.changed, "other_text": p.other_text, "done": p.is_done,
            "step": p.status.step, "steps": p.cell.steps, "metrics": p.status.metrics,
        }
        for p in planned
    ]  # fmt: skip
    return {"grid": plan.name, "cells": cells}


def _time_of(plan: Plan, root: Path) -> dict[str, Any]:
    """Return how long the cells take that a launch would train."""
    from bwlm.grid.cells import find_cells, without_parent
    from bwlm.plan.estimate import estimate_time
    from bwlm.plan.machine import machine_of

    planned = find_cells(plan, root)
    out = without_parent(planned)
    left = [p for p in planned if not (p.is_done or p.changed or p.cell.id in out)]
    machine = machine_of([p.cell for p in left])
    return estimate_time([(p.cell, p.status.step) for p in left], plan.launch, root, machine)


def _state(cell: dict[str, Any]) -> str:
    """Return a cell's state for the table, and whether a launch may refuse it."""
    if cell["changed"]:
        return "other settings"
    return f"{cell['state']}, on other text" if cell["other_text"] else str(cell["state"])


def _text_words(plan: Plan) -> list[str]:
    """Return a line on each source of text that the cells read: its files, or what a launch would say.

    Sources on other machines are not looked at, and no file is read.
    """
    from bwlm.format import counted, file_size
    from bwlm.paths import local_path
    from bwlm.text.corpus import BUILTINS
    from bwlm.text.listing import JSON_LINES, PARQUET, TEXTS, list_files

    words = []
    for source in dict.fromkeys(c.experiment.data.source for c in plan.cells if PHASES[c.experiment.phase].is_first):
        if source in BUILTINS or local_path(source) is None:
            words.append(f"text: {source}")
            continue
        try:
            files = list_files(source, "data.source", (*PARQUET, *JSON_LINES, *TEXTS))
            words.append(f"text: {source}, {counted(len(files), 'file')}, {file_size(sum(f.size for f in files))}")
        except UserError as error:
            words.append(f"warning: {error}")
    return words


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
    return _other_text(planned) or planned.other_code or planned.status.reason


def _other_text(planned: PlannedCell) -> str:
    """Return how the source of a cell's text differs from what its run read; '' if it does not."""
    from bwlm.grid.cells import text_of

    if not (read := planned.other_text):
        return ""
    named = text_of(planned.cell.experiment)
    return f"its run read {read}, and the grid names {named}: refused unless its content is the same"


def _show_result(plan: Plan, root: Path, result: LaunchResult) -> None:
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
    brief = result.was_over and bool(findings.gaps)  # nothing is new: the verdict and its report
    bases = [cell_columns(cell) for cell in result.cells if PHASES[cell.phase].is_first]
    if bases and not brief:
        show_table(CELL_HEADER, bases, f"{plan.name}: cells", names=AXES, least=("loss",))
    for one in variants(folders):
        show("")
        header, *rows = one.in_short()
        show_table(header, rows, f"{plan.name}: {one.phase}", names=("id",))
        show_sentences(*one.comparisons)
    if findings.best and not brief:
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
