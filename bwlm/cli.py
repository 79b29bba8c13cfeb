"""The one command line: `bwlm grid|train|eval|export|runs|tokenizer|data`, thin over the rooms that do the work."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from bwlm.errors import BwlmError, UserError
from bwlm.train.termination import TERMINATED

if TYPE_CHECKING:
    from rich.table import Table

    from bwlm.config import Recipe
    from bwlm.grid.cells import PlannedCell
    from bwlm.grid.launch import LaunchResult
    from bwlm.grid.spec import Plan
    from bwlm.text.prepare import Prepared

app = typer.Typer(
    help="Which way should a language model read? Train, compare and talk to forward, backward and bidirectional GPTs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
grid_app = typer.Typer(help="Plan, run and watch a grid of cells.", no_args_is_help=True)
runs_app = typer.Typer(help="What was trained.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train or look at a tokenizer.", no_args_is_help=True)
data_app = typer.Typer(help="Prepare text, or look at it as a model will.", no_args_is_help=True)
for name, sub in (("grid", grid_app), ("runs", runs_app), ("tokenizer", tokenizer_app), ("data", data_app)):
    app.add_typer(sub, name=name)

GridFile = Annotated[Path, typer.Argument(metavar="GRID.yaml", help="The grid file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, dotted: --set budget.steps=100. Repeatable."),
]
Storage = Annotated[
    str | None, typer.Option(help="Folder of experiments; default: BWLM_STORAGE, else runs/.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


_INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point: a person's mistake is one line and exit code 2, a failed run 1, an interrupt 130, SIGTERM 143."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("mlflow", "alembic", "ray"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a cell that fails is told in its own line
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and turns Ctrl-C into 130
    except BwlmError as error:
        _say(f"bwlm: {error}")
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        _say(f"bwlm: {error.format_message()}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == TERMINATED:
            _say("bwlm: asked to end; the same command goes on where it was")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == _INTERRUPTED:
        _say("bwlm: interrupted; the same command goes on where it was")
    sys.exit(code or 0)


def _end(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does, where nothing waits for its cells to save."""
    raise SystemExit(TERMINATED)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def _print(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str))


def _table(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left", title_style="bold")
    for column in header:
        table.add_column(
            column,
            justify="left"
            if column in ("id", "cell", "direction", "state", "size", "pair", "verdict", "reason")
            else "right",
        )
    for row in rows:
        table.add_row(*[cell.replace("**", "") for cell in row])
    return table


# ---- grid ----


def _load(grid: Path, settings: list[str] | None, storage: str | None) -> tuple[Plan, Path]:
    from bwlm.grid.spec import load_grid
    from bwlm.paths import storage_root

    plan = load_grid(grid, settings or [])
    return plan, storage_root(storage or plan.launch.storage)


@grid_app.command("plan")
def grid_plan(grid: GridFile, set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Print every cell with its parameters, tokens, FLOPs and what is already done.

    Example: `bwlm grid plan grids/demo.yaml --set budget.steps=100`
    """
    plan, root = _load(grid, set_, storage)
    if as_json:
        return _print_json(_status_document(plan, root))
    cells = _status_document(plan, root)["cells"]
    rows = [[c["id"], *(_si(c[k]) for k in ("params", "tokens", "flops")), c["state"], c["reason"]] for c in cells]
    _print(_table(["cell", "params", "tokens", "FLOPs", "state", "reason"], rows, f"{plan.name}: {len(cells)} cells"))
    total = sum(c["flops"] for c in cells)
    left = sum(c["flops"] for c in cells if c["state"] not in ("finished", "failed"))
    _print(f"{_si(total)} FLOPs in all, {_si(left)} to do; storage {root}")
    return None


@grid_app.command("status")
def grid_status(grid: GridFile, set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """How far a grid is: the state, step and figures of every cell.

    Example: `bwlm grid status grids/demo.yaml --json`
    """
    from bwlm.analysis.report import CELL_HEADER, cell_columns
    from bwlm.analysis.tables import load_cell
    from bwlm.grid.cells import find_cells

    plan, root = _load(grid, set_, storage)
    if as_json:
        return _print_json(_status_document(plan, root))
    planned = find_cells(plan, root)
    known = [load_cell(p.folder) for p in planned if p.folder.exists()]
    _print(_table(["id", *CELL_HEADER[4:]], [[c.id, *cell_columns(c)[4:]] for c in known], plan.name))
    _print(f"{sum(c.state == 'finished' for c in known)} of {len(planned)} cells finished")
    return None


@grid_app.command("run")
def grid_run(grid: GridFile, set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Train every cell that is not finished, then compare the directions. The same command resumes.

    Example: `bwlm grid run grids/demo.yaml`
    """
    plan, root = _load(grid, set_, storage)
    result = _run(plan, root)
    if as_json:
        _print_json(_status_document(plan, root))
    else:
        _show_result(plan, root, result, grid)
    if not result.complete:
        raise typer.Exit(1)


@grid_app.command("schema")
def grid_schema() -> None:
    """Print the JSON Schema of a grid file.

    Example: `bwlm grid schema > grid.schema.json`
    """
    from bwlm.grid.spec import Grid

    _print_json(Grid.model_json_schema())


def _run(plan: Plan, root: Path) -> LaunchResult:
    from bwlm.grid.launch import run_plan  # pandas, altair and Ray take seconds: a mistake is told before

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        _say(f"storage: {root}")
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints; stdout is for the result alone
        return run_plan(plan, root, _say)


def _status_document(plan: Plan, root: Path) -> dict[str, Any]:
    from bwlm.grid.cells import find_cells

    cells = [
        {
            "id": p.cell.id, "params": p.cell.parameters, "tokens": p.cell.tokens, "flops": p.cell.flops,
            "state": p.status.state, "reason": _reason(p), "step": p.status.step, "steps": p.cell.steps,
            "metrics": p.status.metrics,
        }
        for p in find_cells(plan, root)
    ]  # fmt: skip
    return {"grid": plan.name, "cells": cells}


def _reason(planned: PlannedCell) -> str:
    """Why a cell ended as it did, or that `run` would refuse it."""
    if planned.changed:
        return f"exists with other settings ({'; '.join(planned.changed)})"
    return planned.status.reason


def _si(value: float) -> str:
    """1234567 -> 1.23M"""
    for bound, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{suffix}"
    return f"{value:g}"


def _show_result(plan: Plan, root: Path, result: LaunchResult, grid: Path) -> None:
    from bwlm.analysis.report import (
        BEST_HEADER,
        CELL_HEADER,
        GAP_HEADER,
        best_columns,
        cell_columns,
        find,
        gap_caption,
        gap_columns,
    )
    from bwlm.record.lineage import ExperimentFolder

    findings = find([ExperimentFolder(root, cell.id) for cell in result.cells])
    _print(_table(CELL_HEADER, [cell_columns(cell) for cell in result.cells], f"{plan.name}: cells"))
    _print(
        _table(
            BEST_HEADER,
            [best_columns(rate) for rate in findings.best],
            "Best learning rate (chosen on the tuning half)",
        )
    )
    if findings.gaps:
        _print(_table(GAP_HEADER, [gap_columns(gap) for gap in findings.gaps], gap_caption(findings)))
    for line in findings.skipped:
        _print(f"no result: {line}")
    _print_places(result)
    _print(f"dashboard  {_dashboard_hint(result, grid)}")


def _print_places(result: LaunchResult) -> None:
    from bwlm.record.tracking import ui_command

    _print(f"report     {result.report}", f"MLflow     {ui_command(result.tracking_uri, Path(sys.executable).parent)}")


def _dashboard_hint(result: LaunchResult, grid: Path) -> str:
    if os.environ.get("RAY_ADDRESS"):
        return f"http://{result.dashboard}" if result.dashboard else os.environ["RAY_ADDRESS"]
    where = f"http://{result.dashboard} while it ran; " if result.dashboard else ""
    activate = f"export PATH={Path(sys.executable).parent}:$PATH"
    submit = f"ray job submit --working-dir . -- python jobs/run_grid.py {grid}"
    return f"{where}one that stays, at http://127.0.0.1:8265: {activate}; ray start --head && {submit}"


# ---- train ----


@app.command("train")
def train(
    direction: Annotated[str, typer.Option(help="forward, backward, bidirectional or permuted.", show_default=False)],
    depth: Annotated[int, typer.Option(help="Layers; the width follows from it.", show_default=False)],
    phase: Annotated[str, typer.Option(help="base: next-token prediction on documents.")] = "base",
    lr: Annotated[float, typer.Option(help="Multiplies the learning rates of all parameter groups.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the rows.")] = 0,
    id_: Annotated[
        str | None, typer.Option("--id", help="Default: PHASE_DATE_DIRECTION_dDEPTH.", show_default=False)
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Train one experiment, as a grid trains a cell. The same command resumes; on another day with `--id`.

    Example: `bwlm train --direction backward --depth 4 --set budget.steps=200 --set budget.batch_tokens=16384`
    """
    from bwlm.grid.spec import plan_experiment
    from bwlm.paths import storage_root

    flags = {"phase": phase, "direction": direction, "depth": depth, "lr": lr, "seed": seed}
    plan, root = plan_experiment(flags, set_ or [], id_), storage_root(storage)
    result = _run(plan, root)
    [cell] = result.cells
    if as_json:
        _print_json(cell.to_json())
    else:
        from bwlm.analysis.report import CELL_HEADER, cell_columns

        _print(_table(CELL_HEADER, [cell_columns(cell)], cell.id), *([cell.reason] if cell.reason else []))
        _print_places(result)
    if not result.complete:
        raise typer.Exit(1)


# ---- runs ----


@runs_app.command("list")
def runs_list(storage: Storage = None, as_json: Json = False) -> None:
    """Every experiment with its state, step and figures.

    Example: `bwlm runs list --json`
    """
    from bwlm.analysis.report import CELL_HEADER, cell_columns
    from bwlm.analysis.tables import load_cell
    from bwlm.paths import storage_root
    from bwlm.record.lineage import list_experiments

    root = storage_root(storage)
    cells = [load_cell(folder) for folder in list_experiments(root)]
    if as_json:
        return _print_json([cell.to_json() for cell in cells])
    _print(
        _table(
            ["id", "state", "step", *CELL_HEADER[5:]],
            [[c.id, c.state, str(c.step), *cell_columns(c)[5:]] for c in cells],
        )
    )
    _print(f"{len(cells)} experiments in {root}")
    return None


# ---- models ----


@app.command("export")
def export(
    experiment: Annotated[str, typer.Argument(metavar="ID", help="An experiment; see `bwlm runs list`.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    format_: Annotated[Literal["hf"], typer.Option("--format", help="hf: what transformers loads.")] = "hf",
    step: Annotated[int | None, typer.Option(help="Of which step; default: the newest.", show_default=False)] = None,
    storage: Storage = None,
) -> None:
    """Write a trained model, its tokenizer and a model card as a folder for other programs.

    Example: `bwlm export demo_forward_d1_lr4_s0 --format hf demo-forward`
    """
    from bwlm.evaluate.export import check_target, export_hf
    from bwlm.evaluate.load import load_model
    from bwlm.paths import storage_root

    check_target(target)  # loading takes longer than this mistake
    loaded = load_model(storage_root(storage), experiment, step)
    export_hf(loaded, target)
    direction = loaded.config.experiment.direction
    print(f"{experiment}, step {loaded.step}, reads {direction}: how to feed it stands in {target / 'README.md'}")
    print(f'model = transformers.AutoModelForCausalLM.from_pretrained("{target}")')
    print(f'tokenizer = transformers.AutoTokenizer.from_pretrained("{target}")')


# ---- data and tokenizer ----


def _recipe(settings: list[str] | None, storage: str | None) -> tuple[Recipe, Path]:
    from bwlm.config import Recipe, override, parse_yaml, validate
    from bwlm.paths import check_writable, storage_root

    document = override(parse_yaml("", "--set"), settings or [])
    root = storage_root(storage)
    check_writable(root)
    return validate(Recipe, document.content, document), root


def _prepared(settings: list[str] | None, storage: str | None) -> Prepared:
    """The corpus that the settings ask for; Ray starts only if it was never prepared."""
    from bwlm.text.prepare import prepare

    recipe, root = _recipe(settings, storage)

    def pack(*arguments: Any) -> Any:
        from bwlm.grid.session import cluster
        from bwlm.text.stream import pack_corpus

        with cluster([recipe.resources], None, 1):
            return pack_corpus(*arguments)

    return prepare(recipe, root, pack, _say)


@data_app.command("prepare")
def data_prepare(set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Tokenize and pack a corpus, so that the first grid on it starts at once.

    Example: `bwlm data prepare --set data.source=corpus/ --set model.sequence_length=512`
    """
    prepared = _prepared(set_, storage)
    width = prepared.manifest.sequence_length
    splits = {}
    for name in ("train", "validation"):
        split = getattr(prepared.manifest, name)
        counts = {k: split.total(k) for k in ("documents", "empty_documents", "rows", "segments", "tokens", "bytes")}
        splits[name] = {"shards": len(split.shards), **counts, "padding_share": split.padding_share(width)}
    content = {"folder": str(prepared.folder), "digest": prepared.manifest.digest, "sequence_length": width, **splits}
    if as_json:
        return _print_json(content)
    rows = [[key, *(_figure(splits[name][key]) for name in splits)] for key in splits["train"]]
    _print(_table(["", *splits], rows, f"{prepared.folder}"))
    return None


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"


@data_app.command("inspect")
def data_inspect(
    direction: Annotated[str | None, typer.Option(help="Only this direction; default: all.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="How many rows of the plan.")] = 2,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show the first rows that a run with seed 0 reads, decoded in each direction.

    Example: `bwlm data inspect --direction backward --rows 1`
    """
    from bwlm.config import DIRECTIONS
    from bwlm.text.direction import check_direction
    from bwlm.text.inspect import inspect_rows

    wanted = [check_direction(direction)] if direction else list(DIRECTIONS)
    if as_json and direction is None:
        raise UserError("--json: say which --direction")
    prepared = _prepared(set_, storage)
    shown = {name: inspect_rows(prepared, name, rows) for name in wanted}
    if as_json:
        return _print_json(shown[wanted[0]])
    for index in range(rows):
        for name in wanted:
            row = shown[name]["rows"][index]
            text = prepared.tokenizer.decode(row["ids"])
            _print(f"[bold]row {index}, {name}[/bold]")
            print(text.replace("\n", "⏎"))
    return None


@tokenizer_app.command("train")
def tokenizer_train(
    output: Annotated[Path | None, typer.Option(help="Also write it to this folder.", show_default=False)] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Train the tokenizer that a grid with these settings would use.

    Example: `bwlm tokenizer train --set data.source=corpus/ --set tokenizer.vocab_size=8192`
    """
    _tokenizer(set_, storage, as_json, output)


@tokenizer_app.command("show")
def tokenizer_show(set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Vocabulary, bytes per token on the validation text, and digest.

    Example: `bwlm tokenizer show --set tokenizer.path=my-tokenizer`
    """
    _tokenizer(set_, storage, as_json, None)


def _tokenizer(settings: list[str] | None, storage: str | None, as_json: bool, output: Path | None) -> None:
    from bwlm.text.prepare import bytes_per_token, get_tokenizer

    recipe, root = _recipe(settings, storage)
    corpus, folder, tokenizer = get_tokenizer(recipe, root / "cache", _say)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output)
        folder = output
    content = {
        "folder": str(folder),
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token(tokenizer, corpus),
        "digest": tokenizer.digest,
    }
    if as_json:
        return _print_json(content)
    for key, value in content.items():
        _print(f"{key:16} {value}")
    return None
