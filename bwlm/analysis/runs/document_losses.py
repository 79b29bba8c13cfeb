"""Own losses of runs by document: the input of `stats`. The sums of a run are kept in the storage's cache.

Files of losses do not change once a run has finished. The sums are kept under the SHA-256 of the files that they were
made from, so a file that is edited, or put back, has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from bwlm.analysis.runs.losses import HALVES, byte_counts_of, loss_file, own_loss_table
from bwlm.directions import own_readings
from bwlm.errors import UserError
from bwlm.paths import file_state
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.known_files import sha256_by_state
from bwlm.record.storage_cache import StorageCache

_VERSION = 1
_AT_ONCE = 500_000
"""Rows of segments that are summed at a time."""


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
    kept = _Kept(folders)
    reasons: dict[str, str] = {}
    for batch in _batches(folders, kept, reasons):
        kept.add(_summed(batch))
    readable = [folder for folder in folders if folder.id in kept.tables]
    return DocumentLosses(readable, [kept.tables[folder.id] for folder in readable], list(reasons.values()))


class _Kept:
    """Sums of runs, from the cache or new."""

    def __init__(self, folders: Sequence[ExperimentFolder]) -> None:
        self.tables: dict[str, pa.Table] = {}
        self._caches = {folder.id: StorageCache(folder.path.parent, "losses", _VERSION) for folder in folders}
        self._names: dict[str, str] = {}

    def find(self, folder: ExperimentFolder) -> bool:
        """Look for a run's sums in the cache; return whether they are there. Raises `OSError` if it has no losses."""
        self._names[folder.id] = name = _name(folder)
        if content := self._caches[folder.id].read(name):
            self.tables[folder.id] = pa.ipc.open_stream(content).read_all()
        return content is not None

    def add(self, tables: dict[str, pa.Table]) -> None:
        """Keep new sums."""
        self.tables |= tables
        for run, table in tables.items():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            self._caches[run].write(self._names[run], sink.getvalue().to_pybytes())


def _name(folder: ExperimentFolder) -> str:
    """Return the name of a run's sums: they follow from its files of losses alone."""
    readings = own_readings(folder.config().experiment.direction)
    files = [sha256_by_state(file_state(loss_file(folder, reading))) for reading in readings]
    return hashlib.sha256(" ".join(files).encode()).hexdigest()


def _batches(
    folders: Sequence[ExperimentFolder], kept: _Kept, reasons: dict[str, str]
) -> Iterator[dict[str, pa.Table]]:
    """Yield the segments of runs that have no sums yet, some runs at a time; note why others have no losses."""
    batch: dict[str, pa.Table] = {}
    for folder in track(list(folders), "reading losses", "runs"):
        try:
            if kept.find(folder):
                continue
        except OSError:
            pass  # gone, or not to be read: the next line says so
        try:
            batch[folder.id] = own_loss_table(folder)
        except UserError as error:
            reasons[folder.id] = f"{folder.id}: {error}"
        if sum(map(len, batch.values())) > _AT_ONCE:
            yield batch
            batch = {}
    yield batch


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
