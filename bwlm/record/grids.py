"""Folder of a grid: the list of its cells, and the reports of launches that had other cells."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import time
from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import atomic_folder, check_id, read_json, storage_root, write_json
from bwlm.remote import address_of

GRID_FILE = "grid.yaml"
REPORT = "RESEARCH_REPORT.md"
EARLIER = "earlier"
"""Folder of earlier reports inside a grid's folder."""
_NOT_OF_A_REPORT = ("lock", "mlflow.json")


def grid_folder(storage: Path, name: str) -> Path:
    """Return the folder where a grid keeps the list of its cells, the file it was made from, and its report."""
    return storage / "grids" / name


def grid_names(storage: Path) -> list[str]:
    """Return the names of the grids in a storage, sorted."""
    return sorted(path.parent.name for path in (storage / "grids").glob("*/grid.json"))


def run_command(grid: str | Path, storage: Path) -> str:
    """Return the command that resumes a grid, by its file or its name; it names the storage, if that is not the usual.

    The usual one is what a command takes that names none.
    """
    words = ["bwlm", "grid", "run", str(grid)]
    with contextlib.suppress(UserError):  # BWLM_STORAGE cannot be used
        if storage == storage_root(None):
            return shlex.join(words)
    return shlex.join([*words, "--storage", address_of(storage)])


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


def keep_report(storage: Path, name: str, ids: list[str]) -> None:
    """Copy a grid's report to `earlier/<time>` before a launch of the cells `ids`, if the report is on others.

    The time is that of the report, so that a launch that is cut off here and begins again makes no second copy.
    """
    home = grid_folder(storage, name)
    if not (home / REPORT).exists() or _known_cells(storage, name) == ids:
        return
    made = time.localtime((home / REPORT).stat().st_mtime)
    kept = home / EARLIER / time.strftime("%Y-%m-%d_%H-%M-%S", made)
    with atomic_folder(kept) as folder:
        for file in home.iterdir():
            if file.is_file() and not file.name.startswith(".") and file.name not in _NOT_OF_A_REPORT:
                shutil.copyfile(file, folder / file.name)
        for page in folder.glob(f"{Path(REPORT).stem}.*"):  # its command repeats the grid of that launch
            own = f"grids/{name}/{EARLIER}/{kept.name}/{GRID_FILE}"
            text = page.read_text("utf-8").replace(f"grids/{name}/{GRID_FILE}", own)
            text = re.sub(rf'(\]\(|href="){EARLIER}/', r"\1../", text)  # links to still earlier reports
            page.write_text(text, "utf-8")


def _known_cells(storage: Path, name: str) -> list[str]:
    with contextlib.suppress(UserError):
        return cells_of(storage, name)
    return []


def earlier_reports(storage: Path, name: str) -> list[Path]:
    """Return the reports of earlier launches that had other cells, the oldest first."""
    return sorted((grid_folder(storage, name) / EARLIER).glob(f"*/{REPORT}"))
