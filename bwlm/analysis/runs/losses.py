"""Tables of losses from run folders: learning curves, and the loss of every document."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.directions import TEXT_READINGS, own_readings
from bwlm.errors import UserError
from bwlm.paths import FileState, file_state, read_json
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal

HALVES = ("tuning", "test")
"""Halves of the validation: even windows choose the learning rate, odd windows compare the directions."""

_TEXT = ["window", "segment", "document", "tokens", "bytes"]


def load_curves(folder: ExperimentFolder) -> pd.DataFrame:
    """Return a run's journal, a row for each step: the step and every logged metric."""
    return pd.DataFrame([{"step": entry.step, **entry.metrics} for entry in read_journal(folder.path)])


def loss_file(folder: ExperimentFolder, reading: str) -> Path:
    """Return the file of a run's losses in a reading."""
    return folder.evaluation(folder.config().experiment.phase, reading) / "validation.parquet"


def load_losses(folder: ExperimentFolder, reading: str) -> pd.DataFrame:
    """Return a row for each segment of the validation windows: window, document, tokens, bytes, nll (nats), end_nll.

    Raises `UserError`, which names the file, if it is missing or damaged.
    """
    table: pd.DataFrame = _read(folder, reading).to_pandas()
    return table


def _read(folder: ExperimentFolder, reading: str) -> pa.Table:
    path = loss_file(folder, reading)
    try:
        with pq.ParquetFile(path) as file:  # in this thread: files are small, and there may be thousands
            return file.read(use_threads=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a run writes it at its end: finish it, or put it back") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): put the file back") from None


def byte_counts_of(folder: ExperimentFolder) -> str:
    """Return the digest of the table that counts the bytes of a run's tokens; empty if the run noted none."""
    path = folder.evaluation(folder.config().experiment.phase, TEXT_READINGS[0]) / "validation.json"
    try:
        return _byte_counts(file_state(path))
    except FileNotFoundError:
        return ""


@lru_cache(maxsize=10_000)
def _byte_counts(state: FileState) -> str:
    return str(read_json(Path(state.path)).get("token_bytes", ""))


def own_losses(folder: ExperimentFolder) -> pd.DataFrame:
    """Return losses in the direction's own reading; for a bidirectional model the mean over its two readings.

    Raises `UserError` if a file is missing or damaged, or if the two readings are of different windows.
    """
    table: pd.DataFrame = own_loss_table(folder).to_pandas()
    return table


def own_loss_table(folder: ExperimentFolder) -> pa.Table:
    """Return `own_losses` as Arrow's table. Raises `UserError` as it does."""
    direction = folder.config().experiment.direction
    first, *others = (_read(folder, reading) for reading in own_readings(direction))
    if not others:
        return first
    [second] = others
    if not first.select(_TEXT).equals(second.select(_TEXT)):
        raise UserError(
            f"{folder.id}: its two readings were measured on different windows: put back its files below evaluations/"
        )
    for name in ("nll", "end_nll"):
        mean = (first[name].to_numpy() + second[name].to_numpy()) / 2
        first = first.set_column(first.schema.get_field_index(name), name, pa.array(mean))
    return first
