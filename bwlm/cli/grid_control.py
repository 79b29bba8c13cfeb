"""`bwlm grid stop | continue | delete`: commands about a grid as a whole."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.grid import GridFile, load_plan, run_grid
from bwlm.cli.terminal import AcceptCode, Json, Set, Storage, confirmed, say, show
from bwlm.errors import UserError, nearest
from bwlm.format import counted, file_size, first_of
from bwlm.progress import working
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.record.launches import LaunchEntry

_WAIT_SECONDS = 0.5


def grid_stop(
    grid: GridFile,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the launches have ended.")] = True,
    set_: Set = None,
    storage: Storage = None,
) -> None:
    """Stop every launch of a grid: its cells save checkpoints and end. `bwlm grid run` resumes them.

    Works from any machine that sees the storage. The launch exits with 75. In a bucket it looks for the request every
    ten seconds.

    Example: `bwlm grid stop demo`
    """
    from bwlm.grid.summary import summarize
    from bwlm.record.grids import grid_folder, run_command
    from bwlm.record.launches import ask_to_stop
    from bwlm.storage.opened import refresh

    plan, root = load_plan(grid, set_, storage)
    asked = ask_to_stop(grid_folder(root, plan.name), f"{socket.gethostname()}:{os.getpid()}")
    for launch in asked:
        assert launch.holder is not None
        show(f"{plan.name}: {launch.holder} is asked to stop; it runs {launch.holder.since_words}")
    if asked and wait:
        _wait_for_end(grid_folder(root, plan.name), asked)
        refresh(root)
    summary = summarize(plan, root)
    if not asked:
        running = [one for one in summary.cells if one.standing == "running"]
        show(f"{plan.name}: no launch runs here")
        for cell in running:  # of an earlier version, or one that was killed a moment ago
            show(f"{cell.planned.cell.id} is trained by {cell.planned.folder.lease_holder()}, which no launch leads")
    if asked and not wait:
        return
    show(summary.left_words(), *([] if summary.is_complete else [f"to resume: {run_command(grid, root)}"]))


def _wait_for_end(home: Path, asked: list[LaunchEntry]) -> None:
    """Wait until none of the launches runs, or shows a sign of life, any more."""
    from bwlm.record.launches import living_launches

    names = {launch.name for launch in asked}
    with working(
        f"waiting for {counted(len(asked), 'launch') if len(asked) == 1 else f'{len(asked)} launches'} to end"
    ):
        while names & {launch.name for launch in living_launches(home)}:
            time.sleep(_WAIT_SECONDS)


def grid_continue(
    grid: GridFile,
    cells: Annotated[
        list[str], typer.Argument(metavar="CELL...", help="Ids of cells, or globs over them.", show_default=False)
    ],
    set_: Set = None,
    storage: Storage = None,
    accept_code: AcceptCode = False,
    as_json: Json = False,
) -> None:
    """Train cells to their end that the scheduler stopped early, from their last checkpoints.

    The scheduler does not stop them again. Other cells of the grid that are not done are trained too, as by `grid run`.

    Example: `bwlm grid continue mine mine_forward_d4_lr0.5_s0`

    Example: `bwlm grid continue mine 'mine_backward_*'`
    """
    from bwlm.grid.continued import choose_stopped

    plan, root = load_plan(grid, set_, storage)
    continued = frozenset(planned.cell.id for planned in choose_stopped(plan, root, cells))
    run_grid(replace(plan, continued=continued), root, accept_code, as_json)


def grid_delete(
    name: Annotated[str, typer.Argument(metavar="GRID", help="Name of a grid that was run.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Delete a grid: all its runs, its reports and its folder. MLflow keeps its runs.

    A grid that a launch trains, or from whose runs other runs begin, cannot be deleted. If this command is
    interrupted, run it again to complete the deletion.

    Example: `bwlm grid delete mine --dry-run`
    """
    from bwlm.record.disk import bytes_in
    from bwlm.record.grids import grid_folder
    from bwlm.record.removal import (
        check_grid_deletable,
        delete_grid,
        discard_deleted,
        lineage_of,
        runs_of_grid,
        unfinished_deletions,
    )
    from bwlm.storage.opened import finish_deletions, open_storage

    root = open_storage(storage)
    home = grid_folder(root, name)
    known = sorted(path.name for path in home.parent.glob("[!.]*"))
    finished = [] if dry_run else finish_deletions(root)
    if name not in known and not dry_run and (f"grids/{name}" in finished or unfinished_deletions(root, name)):
        discard_deleted(root)
        return show(f"{name} is deleted: what an earlier deletion had left of it is gone")
    if name not in known:
        raise UserError(f"{name}: no grid of this name in {address_of(root)}{nearest(name, known)}")
    folders = runs_of_grid(root, name)
    check_grid_deletable(root, name, folders, lineage_of(root))
    size = file_size(bytes_in(home) + sum(bytes_in(folder.path) for folder in folders))
    runs = f": {first_of([folder.id for folder in folders])}" if folders else ""
    what = f"{counted(len(folders), 'run')} and its reports, {size}"
    if dry_run:
        return show(f"would delete {name} ({what}){runs}")
    if not yes and not confirmed(f"Delete {name} ({what}){runs}?"):
        say(f"{name} is left as it was")
        raise typer.Exit(1)
    delete_grid(root, name)
    discard_deleted(root)
    return show(f"{name} is deleted ({what}); its MLflow runs stay")
