"""Grid files, and the settings of one experiment, resolved to a plan before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.paths import check_id
from bwlm.phases import PHASES
from bwlm.plan.axes import blocks_of, family_size, following_phases, product_size, with_first_values
from bwlm.plan.descendants import CellBuilder, grid_cells
from bwlm.plan.inherit import split_phases
from bwlm.plan.machine import with_resources
from bwlm.plan.spec import Cell, Grid, LaunchSettings, Plan, SchedulerSettings
from bwlm.settings_file import Document, dump_yaml, load_yaml, override, validate, with_whole_numbers
from bwlm.storage.opened import open_storage


def load_grid(path: Path, settings: list[str], storage: str | None = None) -> Plan:
    """Read, override and resolve a grid file; its parent runs lie in `storage`, or else where the file says.

    Raises `UserError` for every fault, before anything is made.
    """
    document = with_whole_numbers(override(load_yaml(path), settings), Grid)
    grid = validate(Grid, *with_first_values(document))
    check_id(grid.name, document.where("name"))
    blocks = blocks_of(document)
    following = following_phases(document, grid.phase)
    count = sum(map(product_size, blocks.values())) * family_size(following, document)
    if count > grid.launch.max_cells:  # counted before any is built: a slip of the pen can ask for billions
        raise UserError(
            f"{document.where('axes')}: {count} cells, more than launch.max_cells={grid.launch.max_cells}: "
            "remove values or raise launch.max_cells"
        )
    family = CellBuilder(document, following, open_storage(storage or grid.launch.storage))
    cells = with_resources(tuple(grid_cells(blocks, family)), document)
    if grid.scheduler.stops_early:
        _check_early_stops(grid.scheduler.kind, cells, document)
    text = dump_yaml(document.content) if settings else path.read_text("utf-8")
    return Plan(grid.name, cells, grid.launch, grid.scheduler, text)


_FLAGS = ("phase", "parent", "direction", "depth", "lr", "seed")
"""Settings of `bwlm train` that have a flag of their own, so that an error names the flag also where it is missing."""


def plan_experiment(
    flags: Mapping[str, Any], settings: list[str], chosen_id: str | None, storage: str | None = None
) -> Plan:
    """Return the plan of one experiment from the command line, or with `phase: base,mid,sft` of a chain.

    `settings` go over `flags`. Raises `UserError` naming the flag or field.
    """
    first, *following = split_phases(flags["phase"], "--phase")
    flags = dict(flags) | {"phase": first, **({"phases": {phase: {} for phase in following}} if following else {})}
    document = override(Document("--set", flags, {name: f"--{name}" for name in (*_FLAGS, *flags)}), settings)
    document = with_whole_numbers(document, Experiment)
    for name in ("direction", "depth"):
        if PHASES[first].is_first and name not in document.content:
            raise UserError(f"--{name}: missing: a base run has no parent to take it from")
    blocks = document.content.get("phases", {})
    if isinstance(blocks, dict) and (unknown := set(blocks) - set(following)):
        raise UserError(f"--set phases.{min(unknown)}: not a phase of this command's --phase: add it there")
    following = following_phases(document, document.content["phase"])
    family = CellBuilder(document, following, open_storage(storage))
    experiment = family.first({name: value for name, value in document.content.items() if name != "phases"}, document)
    usual = f"{experiment.phase}_{date.today():%Y%m%d}_{experiment.direction}_d{experiment.depth}"
    run = check_id(chosen_id or usual, "--id")
    cells = tuple(family.cells(experiment, run, document.content, document))
    return Plan(run, with_resources(cells, document), LaunchSettings(), SchedulerSettings(), None)


def _check_early_stops(kind: str, cells: tuple[Cell, ...], document: Document) -> None:
    """Raise `UserError` if a scheduler that stops cells early has no validations to decide by, or several seeds.

    Early stops choose learning rates by validations during training; among seeds they would keep the lucky ones.
    """
    where = document.where("scheduler.kind")
    if any(cell.experiment.evaluation.every == 0 for cell in cells):
        raise UserError(f"{where}: {kind} stops cells by their validation loss: set evaluation.every above 0")
    if len({cell.experiment.seed for cell in cells}) > 1:
        raise UserError(
            f"{where}: {kind} would stop some of the seeds and leave pairs incomplete: "
            "choose the learning rate with one seed, then train the other seeds at that rate with fifo"
        )
