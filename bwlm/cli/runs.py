"""`bwlm runs`: what was trained."""

from __future__ import annotations

import typer

from bwlm.cli.terminal import Json, Storage, print_json, say, show, table

runs_app = typer.Typer(help="What was trained.", no_args_is_help=True)


@runs_app.command("list")
def runs_list(storage: Storage = None, as_json: Json = False) -> None:
    """Every experiment with its state, step and figures.

    Example: `bwlm runs list --json`
    """
    from bwlm.analysis.tables import CELL_HEADER, cell_columns, load_cell
    from bwlm.paths import storage_root
    from bwlm.record.lineage import list_experiments, readable

    root = storage_root(storage)
    folders, left_out = readable(list_experiments(root))
    for line in left_out:
        say(line)
    cells = [load_cell(folder) for folder in folders]
    if as_json:
        return print_json([cell.to_json() for cell in cells])
    show(
        table(
            ["id", "state", "step", *CELL_HEADER[5:]],
            [[c.id, c.state, str(c.step), *cell_columns(c)[5:]] for c in cells],
        )
    )
    show(f"{len(cells)} experiment{'s' * (len(cells) != 1)} in {root}")
    return None
