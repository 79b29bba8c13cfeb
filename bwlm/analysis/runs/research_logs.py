"""Research logs (`<phase>.h5`) as tables for analyses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.analysis.charts.style import EMBEDDING, OUTPUT
from bwlm.analysis.runs.labels import series
from bwlm.errors import UserError
from bwlm.record.bucket import fetch_log
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.health import check_log
from bwlm.record.researchlog import open_log


@dataclass(frozen=True)
class LoggedRun:
    """Run with its research log open."""

    folder: ExperimentFolder
    direction: str
    lr: float
    seed: int
    file: Any

    def last(self, group: str, column: str) -> NDArray[Any]:
        """Return the newest entry of a column. Raises `UserError` if there is none."""
        return np.asarray(self._entries(group, column)[-1])

    def all(self, group: str, column: str) -> NDArray[Any]:
        """Return every entry of a column [steps, ..]. Raises `UserError` if there is none."""
        return np.asarray(self._entries(group, column)[:])

    def fixed(self, group: str, column: str) -> NDArray[Any]:
        """Return a column of the log that holds for the whole run."""
        values = self.file[f"{group}/{column}"][:]
        return values.astype(str) if values.dtype.kind == "O" else np.asarray(values)

    def layer_names(self, group: str) -> list[str]:
        """Return the layers of a group as they are called: `embedding`, the number of a layer, or `output`."""
        names = {-1: EMBEDDING, self.folder.config().experiment.depth: OUTPUT}
        return [names.get(layer, str(layer)) for layer in self.fixed(group, "layer").tolist()]

    def _entries(self, group: str, column: str) -> Any:
        name = f"{group}/{column}"
        if name not in self.file or not len(self.file[name]):
            raise UserError(
                f"{self.file.filename}: holds no {name} yet: wait until the run logs it, or train a run with "
                f"research_log.{group} switched on"
            )
        return self.file[name]


@contextmanager
def opened(folder: ExperimentFolder) -> Iterator[LoggedRun]:
    """Raise `UserError` naming the file if it is missing, or turns out to be damaged when it is read in the block."""
    experiment = folder.config().experiment
    path = folder.research_log(experiment.phase)
    fetch_log(path)
    check_log(folder, path)
    try:
        with open_log(path) as file:
            yield LoggedRun(folder, experiment.direction, experiment.lr, experiment.seed, file)
    except (KeyError, OSError, RuntimeError, ValueError) as error:  # h5py raises these at a flipped bit
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): put the file back") from error


def from_each(
    folders: list[ExperimentFolder], read: Callable[[LoggedRun], pd.DataFrame]
) -> tuple[pd.DataFrame, list[str]]:
    """Return what `read` makes of each run's log, with run, direction and series, and why other runs gave nothing.

    The columns run, direction and series are added. Raises `UserError` if no run gave a table.
    """
    parts, notes, named = [], [], series(folders)
    for folder in folders:
        try:
            with opened(folder) as run:
                parts.append(read(run).assign(run=folder.id, direction=run.direction, series=named[folder.id]))
        except UserError as error:
            notes.append(str(error))
    if not parts:
        raise UserError("; ".join(notes))
    return pd.concat(parts, ignore_index=True), notes
