"""`bwlm runs`: lists, trees, details and deletion of runs."""

from __future__ import annotations

import contextlib
import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.app import App
from bwlm.cli.terminal import (
    Json,
    Storage,
    confirmed,
    print_json,
    say,
    show,
    show_fields,
    show_table,
    show_tree,
)
from bwlm.errors import UserError
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.record.catalog.rows import CellRow
    from bwlm.record.experiment import ExperimentFolder

runs_app = App(help="List, show and delete runs; show the tree of parents and children.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(metavar="ID", help="Id of the run.", show_default=False)]


@runs_app.command("list")
def runs_list(
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Show only runs that match this condition; put it in quotes. Also != < > <= >=. Fields: id, phase, "
            "direction, parent, state (words, also globs), depth, lr, seed, step and any metric. Repeatable.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Sort by a field of --where; -FIELD: highest first. Default: id."),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """List every run with its state, step and metrics.

    A run that lacks a metric does not match a condition on it, and comes last when you sort by it.

    Example: `bwlm runs list --json`

    Example: `bwlm runs list --where phase=sft --where 'val_bpb<2.5' --sort val_bpb`
    """
    from bwlm.record.catalog.filters import choose_cells
    from bwlm.record.catalog.rows import load_readable
    from bwlm.record.experiment import list_experiments, list_starting
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    known, left_out = load_readable(list_experiments(root))
    cells = choose_cells(known, where or [], sort)
    for line in left_out:
        say(line)
    if as_json:
        return print_json([cell.to_json() for cell in cells])
    if cells:
        _show_list(cells)
    shown = f"{len(cells)} of {len(known)}" if where else f"{len(cells)}"
    missing = "" if root.exists() else ", which does not exist: --storage or BWLM_STORAGE names another folder"
    show(f"{shown} experiment{'s' * (len(known) != 1)} in {address_of(root)}{missing}")
    if starting := list_starting(root):
        show(f"starting, text not ready yet: {', '.join(starting)}")
    return None


def _show_list(cells: list[CellRow]) -> None:
    from bwlm.record.catalog.rows import FIGURES, cell_columns

    header = ["phase", "state", "step", *FIGURES]
    rows = [[cell.id, cell.parent or "", *cell_columns(cell, header), _figure(cell, "val_reward")] for cell in cells]
    show_table(["id", "parent", *header, "reward"], rows, names=("id", "parent"), least=("tokens/s", "loss", "parent"))


def _figure(cell: CellRow, metric: str) -> str:
    return format(cell.metrics[metric], ".4f") if metric in cell.metrics else ""


@runs_app.command("tree")
def runs_tree(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            help="Show only this run with its ancestors and descendants. Also the name of a grid, or a glob.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show every run below its parent, with phase, direction, depth, best metric and state.

    For each run the tree shows its lowest val_bpb, or in RL its highest val_reward, with the step if that is not the
    run's last. The phases use different validation texts, so do not compare values across phases.
    Without ID, four or more runs of one grid that have no children are shown as one summary line.

    Example: `bwlm runs tree`

    Example: `bwlm runs tree mine-sft --json`
    """
    from bwlm.cli.family import branches
    from bwlm.record.catalog.describe import family_of, load_members
    from bwlm.record.catalog.select import choose
    from bwlm.record.experiment import list_experiments
    from bwlm.record.health import readable
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    chosen = choose(root, [name], damaged=True)[0] if name is not None else None
    folders, left_out = readable(list_experiments(root), damaged=True)
    for line in left_out:
        say(line)
    family = family_of(folders)
    if chosen is not None:
        family = family.around(folder.id for folder in chosen)
    members = load_members(root, family.trees())
    if as_json:
        return print_json([member.to_json() for member in members])
    show_tree(branches(members, gathered=name is None))
    if not members:
        show(f"0 experiments in {address_of(root)}")
    return None


@runs_app.command("show")
def runs_show(run: RunId, storage: Storage = None, as_json: Json = False) -> None:
    """Show one run: state, parents and children, settings that differ from the parent, metrics, files.

    Example: `bwlm runs show mine`
    """
    from bwlm.cli.overview import sections
    from bwlm.record.catalog.describe import describe
    from bwlm.record.experiment import open_experiment
    from bwlm.record.health import damage_words
    from bwlm.storage.opened import open_storage

    folder = open_experiment(open_storage(storage), run)
    known = describe(folder)
    if known["damage"]:
        say(damage_words(folder, known["damage"]))
    if as_json:
        return print_json(known)
    for number, (title, fields) in enumerate(sections(known)):
        if number:
            show("")
        show_fields(title, fields)
    return None


@runs_app.command("delete")
def runs_delete(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Ids, globs over ids, or names of grids.", show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    storage: Storage = None,
) -> None:
    """Delete the folders of runs: checkpoints, research log, evaluations, report. Their MLflow runs stay.

    A run that has children that stay, or that is being trained, cannot be deleted. A cell of a grid can: the next
    launch of the grid trains it again. If this command is interrupted, run it again to complete the deletion.

    Example: `bwlm runs delete mine --yes`

    Example: `bwlm runs delete 'mine-*'`
    """
    from bwlm.record.removal import (
        check_deletable,
        children_first,
        delete,
        discard_deleted,
        is_unfinished,
        lineage_of,
    )
    from bwlm.storage.opened import finish_deletions, open_storage, refresh

    root = open_storage(storage)
    finished = finish_deletions(root)
    for run in [name for name in names if name in finished or is_unfinished(root, name)]:
        discard_deleted(root)
        names.remove(run)
        show(f"{run} is deleted: what an earlier deletion had left of it is gone")
    lineage = lineage_of(root)
    folders = children_first(_folders_to_delete(root, names), lineage)
    for number, folder in enumerate(folders):
        check_deletable(folder, [other.id for other in folders[:number]], lineage)
    told = {folder.id: (_what_goes(folder), _what_stays(folder)) for folder in folders}
    if folders and not yes and not confirmed(_deletion_question(folders, told[folders[0].id][0])):
        one = len(folders) == 1
        say(f"{folders[0].id} is left as it was" if one else "all of them are left as they were")
        raise typer.Exit(1)
    refresh(root)  # a person may have thought for an hour
    for folder in folders:
        delete(folder)
        what, besides = told[folder.id]
        show(f"{folder.id} is deleted ({what})", *besides)


def _folders_to_delete(root: Path, names: list[str]) -> list[ExperimentFolder]:
    from bwlm.record.catalog.select import named
    from bwlm.record.experiment import list_experiments, open_experiment
    from bwlm.record.grids import grid_names

    known = [folder.id for folder in list_experiments(root)]
    folders = []
    for name in names:
        is_several = glob.has_magic(name) or (name in grid_names(root) and name not in known)
        ids = [run for run in named(root, name, known) if run in known] if is_several else [name]
        folders += [open_experiment(root, run) for run in ids]
    return folders


def _deletion_question(folders: list[ExperimentFolder], what: str) -> str:
    if len(folders) == 1:
        return f"Delete {folders[0].path} ({what})?"
    from bwlm.format import file_size
    from bwlm.record.disk import bytes_in

    size = file_size(sum(bytes_in(folder.path) for folder in folders))
    return f"Delete {len(folders)} runs ({size}): {', '.join(folder.id for folder in folders)}?"


def _what_goes(folder: ExperimentFolder) -> str:
    from bwlm.format import file_size
    from bwlm.record.disk import bytes_in

    size = file_size(bytes_in(folder.path))
    with contextlib.suppress(UserError):  # a run whose status cannot be read can still be deleted
        status = folder.status()
        return f"{status.state} at step {status.step:,}, {size}"
    return size


def _what_stays(folder: ExperimentFolder) -> list[str]:
    from bwlm.record.mlflow_note import noted_run

    stays = []
    with contextlib.suppress(UserError):
        if run := noted_run(folder.path):
            stays.append(f"its MLflow run {run} stays")
    with contextlib.suppress(UserError):
        if grid := folder.config().grid:
            stays.append(f"grid {grid} trains it again when it is launched")
    return stays
