"""Tables of losses from run folders: learning curves, and the loss of every document."""

from __future__ import annotations

import math

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.directions import TEXT_READINGS, own_readings
from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal

HALVES = ("tuning", "test")
"""Halves of the validation: even windows choose the learning rate, odd windows compare the directions."""

_TEXT = ["window", "segment", "document", "tokens", "bytes"]


def load_curves(folder: ExperimentFolder) -> pd.DataFrame:
    """Return a run's journal, a row for each step: the step and every logged metric."""
    return pd.DataFrame([{"step": entry.step, **entry.metrics} for entry in read_journal(folder.path)])


def load_losses(folder: ExperimentFolder, reading: str) -> pd.DataFrame:
    """Return a row for each segment of the validation windows: window, document, tokens, bytes, nll (nats), end_nll.

    Raises `UserError`, which names the file, if it is missing or damaged.
    """
    path = folder.evaluation(folder.config().experiment.phase, reading) / "validation.parquet"
    try:
        table: pd.DataFrame = pq.read_table(path).to_pandas()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a run writes it at its end: finish it, or put it back") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): put the file back") from None
    return table


def byte_counts_of(folder: ExperimentFolder) -> str:
    """Return the digest of the table that counts the bytes of a run's tokens; empty if the run noted none."""
    path = folder.evaluation(folder.config().experiment.phase, TEXT_READINGS[0]) / "validation.json"
    return str(read_json(path).get("token_bytes", "")) if path.exists() else ""


def own_losses(folder: ExperimentFolder) -> pd.DataFrame:
    """Return losses in the direction's own reading; for a bidirectional model the mean over its two readings.

    Raises `UserError` if a file is missing or damaged, or if the two readings are of different windows.
    """
    direction = folder.config().experiment.direction
    first, *others = (load_losses(folder, reading) for reading in own_readings(direction))
    if not others:
        return first
    [second] = others
    if not first[_TEXT].equals(second[_TEXT]):
        raise UserError(
            f"{folder.id}: its two readings were measured on different windows: put back its files below evaluations/"
        )
    return first.assign(nll=(first["nll"] + second["nll"]) / 2, end_nll=(first["end_nll"] + second["end_nll"]) / 2)


def with_losses(folders: list[ExperimentFolder]) -> tuple[list[ExperimentFolder], list[str]]:
    """Return the runs whose own losses can be read, and a reason for each of the others."""
    readable, reasons = [], []
    for folder in track(folders, "reading losses", "runs"):
        try:
            own_losses(folder)
            readable.append(folder)
        except UserError as error:
            reasons.append(f"{folder.id}: {error}")
    return readable, reasons


def load_gap_table(folders: list[ExperimentFolder], labels: dict[str, str]) -> pd.DataFrame:
    """Return the input of `stats`: run, direction, seed, size, lr, half, document, nll, tokens, bytes, token_bytes.

    A row per run, half and document with text; nll in nats. A segment of a conversation can be a marker alone, which
    is never scored. The column `windows` has the number of windows in the run's half.
    Sizes are taken from `labels`, which are made over the whole grid.
    """
    parts = []
    for folder in track(folders, "summing losses", "runs"):
        experiment = folder.config().experiment
        losses = own_losses(folder)
        losses["half"] = [HALVES[window % 2] for window in losses["window"]]
        losses["nll"] = losses["nll"].fillna(math.inf)  # a sum would skip NaN, and a diverged run would look good
        windows = losses.groupby("half")["window"].nunique()
        summed = losses.groupby(["half", "document"], as_index=False)[["nll", "tokens", "bytes"]].sum()
        summed = summed[summed["tokens"] > 0]
        parts.append(
            summed.assign(
                run=folder.id,
                direction=experiment.direction,
                seed=experiment.seed,
                size=labels[folder.id],
                lr=experiment.lr,
                windows=summed["half"].map(windows),
                token_bytes=byte_counts_of(folder),
            )
        )
    return pd.concat(parts, ignore_index=True)
