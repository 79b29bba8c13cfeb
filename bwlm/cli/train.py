"""`bwlm train`: one experiment."""

from __future__ import annotations

from typing import Annotated

import typer

from bwlm.cli.launch import launch, show_places
from bwlm.cli.terminal import Json, Set, Storage, print_json, show, table


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
    result = launch(plan, root)
    [cell] = result.cells
    if as_json:
        print_json(cell.to_json())
    else:
        from bwlm.analysis.tables import CELL_HEADER, cell_columns

        show(table(CELL_HEADER, [cell_columns(cell)], cell.id), *([cell.reason] if cell.reason else []))
        show_places(result)
    if not result.complete:
        raise typer.Exit(1)
