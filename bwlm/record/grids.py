"""Folder of a grid: the list of its cells."""

from __future__ import annotations

from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import check_id, read_json, write_json


def grid_folder(storage: Path, name: str) -> Path:
    """Return the folder where a grid keeps the list of its cells, the file it was made from, and its report."""
    return storage / "grids" / name


def grid_names(storage: Path) -> list[str]:
    """Return the names of the grids in a storage, sorted."""
    return sorted(path.parent.name for path in (storage / "grids").glob("*/grid.json"))


def write_cells(storage: Path, name: str, ids: list[str]) -> None:
    """Write the list of a grid's cells, by their ids."""
    home = grid_folder(storage, name)
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "grid.json", {"name": name, "cells": ids})


def cells_of(storage: Path, name: str) -> list[str]:
    """Return the ids of a grid's cells. Raises `UserError` naming the file if it is missing or holds something else."""
    path = grid_folder(storage, name) / "grid.json"
    content = read_json(path)
    try:
        return [check_id(run, "cell") for run in content["cells"]]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the list of a grid's cells: run the grid's command again") from None
