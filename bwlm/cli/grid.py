"""`bwlm grid`: plan, run and watch a grid of cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.app import App
from bwlm.cli.grid_status import (
    STOPPED_ABOVE,
    action_words,
    cells_document,
    print_status,
    reasons,
    status_document,
    watch_status,
)
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
from bwlm.errors import Paused, UserError, nearest
from bwlm.format import counted
from bwlm.phases import PHASES
from bwlm.progress import loading, working
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.grid.launch import LaunchResult
    from bwlm.plan.spec import Cell, Plan

grid_app = App(help="Plan, run and watch a grid of cells.", no_args_is_help=True)

GridFile = Annotated[
    Path,
    typer.Argument(metavar="GRID.yaml", help="Grid file, or the name of a grid that was run.", show_default=False),
]


def load_plan(grid: Path, settings: list[str] | None, storage: str | None) -> tuple[Plan, Path]:
    """Return the plan of a grid file, or of a grid that was run by its name, and the storage."""
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
    on: Annotated[
        str | None,
        typer.Option(help="GPU to price the grid on, such as h100.", metavar="GPU", show_default=False),
    ] = None,
    mfu: Annotated[
        float | None, number_option("With --on: share of the GPU's peak that training reaches. Default: 0.4.")
    ] = None,
    price: Annotated[
        float | None, number_option("With --on: price of one GPU for an hour.", metavar="MONEY", show_default=False)
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print each cell with its parameters, tokens, FLOPs, log size and state; the time; the smallest gap that is seen.

    The time follows from the speed of runs in this storage that finished on this machine.

    A gap is the difference in loss between two directions. How small a gap can be seen depends on the number of seeds.

    Warns of memory, disk space and GPUs that the cells need and this machine does not have.

    With `--on`, also prints the GPU hours and the cost of what is left on a GPU that nothing has run on yet: FLOPs over
    a share of its peak.

    Example: `bwlm grid plan grids/demo.yaml --set budget.steps=100 --seed-noise 0.006`

    Example: `bwlm grid plan grids/demo.yaml --on h100 --mfu 0.3 --price 2.5`
    """
    if on is None and (unused := "--mfu" if mfu is not None else "--price" if price is not None else ""):
        raise UserError(f"{unused}: needs the GPU that it is for, such as --on h100")
    if seed_noise is not None and not 0 < seed_noise < math.inf:
        raise UserError(f"--seed-noise: {seed_noise} is not a positive number of nats per token")
    plan, root = load_plan(grid, set_, storage)
    from tasks.sources import check_sources

    for cell in plan.cells:
        check_sources(cell.experiment)
    from bwlm.format import short_number
    from bwlm.grid.cells import find_cells
    from bwlm.plan.estimate import time_words
    from bwlm.plan.price import MFU, price_words
    from bwlm.plan.price import price as price_plan

    with loading():  # scipy takes a second: mistakes are reported first
        from bwlm.plan.power import detectable, detectable_words
    seen, warnings, time = detectable(plan, seed_noise), warnings_of(plan, root), _time_of(plan, root)
    document = cells_document(plan, find_cells(plan, root))
    priced = price_plan(_left(plan, root), on, MFU if mfu is None else mfu, price) if on else None
    if as_json:
        document |= {"detectable": seen, "time": time, "warnings": warnings}
        return print_json(document | ({"price": priced} if priced else {}))
    cells = document["cells"]
    costs = ("params", "tokens", "flops", "log_bytes")
    rows = [
        [
            *(c["id"], *(short_number(c[cost]) for cost in costs), *_price_columns(priced, c["id"])),
            *(action_words(c), _state(c)),
        ]
        for c in cells
    ]
    header = ["cell", "params", "tokens", "FLOPs", "log (bytes)", "GPU hours", "cost", "next", "state"]
    show_table(header, rows, f"{plan.name}: {len(cells)} cells", names=("cell",), least=("log (bytes)", "state"))
    show_sentences(*reasons(cells), *_text_words(plan))
    total = sum(c["flops"] for c in cells)
    left = sum(c["flops"] for c in cells if not (c["done"] or c["changed"]) and c["reason"] != STOPPED_ABOVE)
    show(f"{short_number(total)} FLOPs in all, {short_number(left)} to do; storage {address_of(root)}")
    show_sentences(
        *filter(None, [time_words(time), *(price_words(priced) if priced else []), detectable_words(seen)]),
        *(f"warning: {line}" for line in warnings),
    )
    return None


@grid_app.command("status")
def grid_status(
    grid: GridFile,
    set_: Set = None,
    everything: Annotated[bool, typer.Option("--all", help="List the cells that are done, too.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until the grid is done; Ctrl-C ends it.")
    ] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show the states of a grid's cells, who trains them, their logs, the pace, the time left and the cost.

    Reads the files of the storage alone: it works from any machine, also while Ray is down.

    Example: `bwlm grid status grids/demo.yaml --json`

    Example: `bwlm grid status demo --watch`
    """
    from bwlm.grid.summary import summarize

    if as_json and watch:
        raise UserError("--watch: not with --json, which prints one document: leave one of them out")
    plan, root = load_plan(grid, set_, storage)
    if as_json:
        return print_json(status_document(plan, root))
    if watch:
        return watch_status(plan, root, everything)
    return print_status(plan, root, summarize(plan, root), everything)


@grid_app.command("run")
def grid_run(
    grid: GridFile,
    set_: Set = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Add cells to a grid: refuse a file that leaves out or changes a cell of its last launch.",
        ),
    ] = False,
    storage: Storage = None,
    accept_code: AcceptCode = False,
    as_json: Json = False,
) -> None:
    """Train every cell that is not finished, then compare the directions. The same command resumes.

    Exits with 75 if `bwlm grid stop` or a limit of `launch.limit` stopped it: the same command resumes it then.

    Example: `bwlm grid run grids/demo.yaml`

    Example: `bwlm grid run grids/demo.yaml --extend --set axes.seed=[0,1,2,3]`
    """
    plan, root = load_plan(grid, set_, storage)
    if extend:
        from bwlm.grid.extend import check_extends

        new = check_extends(plan, root)
        say(f"extends {plan.name}: {counted(len(new), 'new cell')} beside {len(plan.cells) - len(new)}")
    run_grid(plan, root, accept_code, as_json)


def run_grid(plan: Plan, root: Path, accept_code: bool, as_json: bool) -> None:
    """Launch a grid and print its result; exit with 1 if cells failed."""
    try:
        result = launch(plan, root, accept_code)
    except Paused:
        if as_json:
            print_json(status_document(plan, root))
        raise
    if as_json:
        print_json(status_document(plan, root))
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


def _time_of(plan: Plan, root: Path) -> dict[str, Any]:
    """Return how long the cells take that a launch would train."""
    from bwlm.plan.estimate import estimate_time
    from bwlm.plan.machine import machine_of

    left = _left(plan, root)
    return estimate_time(left, plan.launch, root, machine_of([cell for cell, _ in left]))


def _left(plan: Plan, root: Path) -> list[tuple[Cell, int]]:
    """Return the cells that a launch would train, each with the step that it trains from."""
    from bwlm.grid.cells import find_cells, without_parent
    from bwlm.record.checkpoint import checkpoint_steps

    planned = find_cells(plan, root)
    out = without_parent(planned)
    left = [p for p in planned if not (p.is_done or p.changed or p.cell.id in out)]
    return [(p.cell, max(checkpoint_steps(p.folder.checkpoints), default=0)) for p in left]


def _price_columns(priced: dict[str, Any] | None, id: str) -> list[str]:
    """Return a cell's GPU hours and cost for the table; '' for a cell that needs no training, and without a price."""
    from bwlm.plan.price import columns

    figures = priced["cells"].get(id) if priced else None
    return columns(figures) if figures else ["", ""]


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


def _show_result(plan: Plan, root: Path, result: LaunchResult) -> None:
    from bwlm.analysis.commands.gap import gap_caption
    from bwlm.analysis.report.study import dropped_cells, dropped_words
    from bwlm.analysis.report.variants import variants
    from bwlm.analysis.runs.findings import BEST_HEADER, best_columns, find
    from bwlm.cli.analyze import gap_rows, show_rows
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
        show_rows(gap_rows(findings.gaps), gap_caption(findings))
    show("")
    show_sentences(*(f"no result: {line}" for line in findings.skipped))
    show_sentences(*findings.at_edge, *dropped_words(dropped_cells(root, plan.name)))
    show_places(result)
