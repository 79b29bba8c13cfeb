"""Own losses of runs by document: the input of `stats`. The sums of a run are kept in the storage's cache.

Files of losses do not change once a run has finished. The sums are kept under the SHA-256 of the files that they were
made from, so a file that is edited, or put back, has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from bwlm.analysis.runs.kept_tables import keep_table, name_of, read_table
from bwlm.analysis.runs.losses import HALVES, byte_counts_of, loss_file, own_loss_table
from bwlm.directions import own_readings
from bwlm.errors import UserError
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.storage_cache import StorageCache

_VERSION = 1
_AT_ONCE = 50
"""Runs whose segments are summed at a time."""


@dataclass(frozen=True)
class DocumentLosses:
    """Own losses of runs, summed by half of the validation and document."""

    folders: list[ExperimentFolder]
    """Runs whose losses can be read."""
    tables: list[pa.Table]
    """Losses of each of them: half, document, nll (nats), tokens, bytes, windows (of the half)."""
    left_out: list[str]
    """Reason for each of the other runs."""


def document_losses(folders: Sequence[ExperimentFolder]) -> DocumentLosses:
    """Return the losses of the runs that have some, in their order, and why the others have none."""
    tables: dict[str, pa.Table] = {}
    segments: dict[str, pa.Table] = {}
    new, reasons = dict[str, str](), list[str]()
    for number, folder in enumerate(track(folders, "reading losses", "runs"), 1):
        try:
            name = _name(folder)
            if (kept := read_table(_cache(folder), name)) is not None:
                tables[folder.id] = kept
            else:
                segments[folder.id], new[folder.id] = own_loss_table(folder), name
        except UserError as error:
            reasons.append(f"{folder.id}: {error}")
        if number % _AT_ONCE == 0 or number == len(folders):
            tables |= _summed(segments)
            segments.clear()
    readable = [folder for folder in folders if folder.id in tables]
    for folder in readable:
        if folder.id in new:
            keep_table(_cache(folder), new[folder.id], tables[folder.id])
    return DocumentLosses(readable, [tables[folder.id] for folder in readable], reasons)


def _cache(folder: ExperimentFolder) -> StorageCache:
    return StorageCache(folder.path.parent, "losses", _VERSION)


def _name(folder: ExperimentFolder) -> str:
    """Return the name of a run's sums; '' if its files of losses cannot be read, which who reads them will say."""
    files = [loss_file(folder, reading) for reading in own_readings(folder.config().experiment.direction)]
    try:
        return name_of(files)
    except OSError:
        return ""


def _summed(segments: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Return the sums of each run's documents. A segment of a conversation can be a marker alone, never scored."""
    if not segments:
        return {}
    rows = pa.concat_tables(
        [table.append_column("run", pa.repeat(place, len(table))) for place, table in enumerate(segments.values())]
    ).to_pandas()
    rows["half"] = 1 - rows["window"] % 2  # in the order of the names: test, tuning
    rows["nll"] = rows["nll"].fillna(np.inf)  # a sum would skip NaN, and a diverged run would look good
    windows = rows.groupby(["run", "half"])["window"].nunique()
    sums = rows.groupby(["run", "half", "document"], as_index=False)[["nll", "tokens", "bytes"]].sum()
    sums = sums[sums["tokens"] > 0]
    sums["windows"] = windows.loc[pd.MultiIndex.from_frame(sums[["run", "half"]])].to_numpy()
    sums["half"] = np.array(sorted(HALVES), dtype=object)[sums["half"]]
    starts = np.searchsorted(sums["run"], np.arange(len(segments) + 1))
    table = pa.Table.from_pandas(sums.drop(columns="run"), preserve_index=False).replace_schema_metadata(None)
    return {run: table[starts[place] : starts[place + 1]] for place, run in enumerate(segments)}


def gap_table(losses: DocumentLosses, labels: dict[str, str]) -> pd.DataFrame:
    """Return the input of `stats`: half, document, nll, tokens, bytes, run, direction, seed, size, lr, ..

    A row per run, half and document with text; nll in nats. The column `windows` has the number of windows in the
    run's half, `token_bytes` the digest of the table that counts bytes. Sizes are taken from `labels`, which are made
    over the whole grid.
    """
    experiments = [folder.config().experiment for folder in losses.folders]
    runs = pd.DataFrame(
        {
            "run": [folder.id for folder in losses.folders],
            "direction": [experiment.direction for experiment in experiments],
            "seed": [experiment.seed for experiment in experiments],
            "size": [labels[folder.id] for folder in losses.folders],
            "lr": [experiment.lr for experiment in experiments],
            "token_bytes": [byte_counts_of(folder) for folder in losses.folders],
        }
    )
    rows = pa.concat_tables(losses.tables, promote_options="permissive").to_pandas()
    own = runs.loc[np.repeat(np.arange(len(runs)), [len(table) for table in losses.tables])].reset_index(drop=True)
    table: pd.DataFrame = pd.concat([rows, own], axis="columns")
    return table
