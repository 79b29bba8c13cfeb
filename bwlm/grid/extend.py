"""Extension of a grid under its name: new cells beside those of its last launch, which all stay as they are."""

from __future__ import annotations

from pathlib import Path

from bwlm.errors import UserError
from bwlm.format import counted, first_of
from bwlm.grid.cells import text_of
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Cell, Plan
from bwlm.record.fingerprint import differences, identity
from bwlm.record.grids import GRID_FILE, grid_folder


def check_extends(plan: Plan, storage: Path) -> list[str]:
    """Return the cells that a plan adds to the grid of its name, as the grid's last launch planned it.

    Raises `UserError` naming the cells that the plan leaves out, or the fields of those that it changes.
    """
    file = grid_folder(storage, plan.name) / GRID_FILE
    if not file.exists():
        raise UserError(f"{plan.name}: --extend: no grid of this name was run in {storage}: leave --extend out")
    before, now = load_grid(file, [], str(storage)), {cell.id: cell for cell in plan.cells}
    if missing := [cell.id for cell in before.cells if cell.id not in now]:
        raise UserError(
            f"{plan.name}: --extend: {counted(len(missing), 'cell')} of its last launch would be left out "
            f"({first_of(missing)}): keep every value of its axes, and add values"
        )
    for cell in before.cells:
        if changed := differences(_identity(cell), _identity(now[cell.id])):
            raise UserError(
                f"{plan.name}: --extend: {cell.id} would have other settings ({'; '.join(changed)}): put them back, "
                "or give the grid another name"
            )
    known = {cell.id for cell in before.cells}
    return [cell.id for cell in plan.cells if cell.id not in known]


def _identity(cell: Cell) -> dict[str, object]:
    """Return what decides a cell's result, as far as a grid file says it: the text by its name."""
    own = cell.experiment
    text, tokenizer = text_of(own), str(own.tokenizer.path or "")
    return identity(own, data=text, tokenizer=tokenizer, precision=own.compute.precision, steps=cell.steps)
