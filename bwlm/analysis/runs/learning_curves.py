"""Learning curves of runs: the losses of their steps, averaged along the curve. The curve of a run that ended is kept.

A run's curve follows from its journal, so it is kept in the storage's cache under the journal's SHA-256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from bwlm.analysis.runs.kept_tables import keep_table, name_of, read_table
from bwlm.analysis.runs.labels import sizes
from bwlm.phases import PHASES
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import NAME, read_journal
from bwlm.record.storage_cache import StorageCache

_VERSION = 1
_SMOOTHED = 25
"""Fraction of a run's steps over which its training loss is averaged, as a divisor; the window is centred."""


def smoothed_curves(folders: Sequence[ExperimentFolder]) -> pd.DataFrame:
    """Return a row per step: run, size, direction, lr, seed, step, tokens, flops, seconds, averaged, loss, val_loss.

    Losses are in nats per supervised token (in SFT the tokens that a direction writes). `loss` is the training loss,
    averaged over `averaged` tokens around its step: an average of past steps would lag behind a falling loss.
    `val_loss` is NaN at steps without a validation. The table is empty if no run has logged a step.
    """
    labels = sizes(list(folders))
    found = [(folder, curve) for folder in track(folders, "reading journals", "runs") if len(curve := _curve(folder))]
    if not found:
        return pd.DataFrame()
    rows = pa.concat_tables([curve for _, curve in found], promote_options="permissive").to_pandas()
    lengths = [len(curve) for _, curve in found]
    experiments = [folder.config().experiment for folder, _ in found]
    named: dict[str, list[Any]] = {
        "run": [folder.id for folder, _ in found],
        "size": [labels[folder.id] for folder, _ in found],
        "direction": [experiment.direction for experiment in experiments],
        "lr": [experiment.lr for experiment in experiments],
        "seed": [experiment.seed for experiment in experiments],
    }
    own = pd.DataFrame(named).loc[np.repeat(np.arange(len(found)), lengths)].reset_index(drop=True)
    table: pd.DataFrame = pd.concat([own, rows], axis="columns")
    return table


def _curve(folder: ExperimentFolder) -> pa.Table:
    """Return the curve of a run; without rows if it has logged no step."""
    measured = PHASES[folder.config().experiment.phase].metric
    if not folder.status().ended:  # its journal grows
        return _smoothed(folder, measured)
    cache = StorageCache(folder.path.parent, "curves", _VERSION)
    try:
        name = name_of([folder.path / NAME], measured)
    except OSError:  # gone
        return _smoothed(folder, measured)
    if (kept := read_table(cache, name)) is not None:
        return kept
    curve = _smoothed(folder, measured)
    keep_table(cache, name, curve)
    return curve


def _smoothed(folder: ExperimentFolder, measured: str) -> pa.Table:
    """Return a curve from the journal; `measured` is the metric of its validations."""
    entries = list(read_journal(folder.path))

    def column(name: str) -> pd.Series[Any]:
        return pd.Series([entry.metrics.get(name, math.nan) for entry in entries])

    window, tokens = max(1, len(entries) // _SMOOTHED), column("tokens")
    averaged = window * tokens.diff().median() if len(entries) > 1 else tokens
    return pa.table(
        {
            "step": np.array([entry.step for entry in entries], dtype=np.int64),
            "tokens": tokens,
            "flops": column("flops"),
            "seconds": column("step_seconds").cumsum(),
            "averaged": np.broadcast_to(np.asarray(averaged, dtype=np.float64), len(entries)),
            "loss": column("train_loss").rolling(window, center=True, min_periods=1).mean(),
            "val_loss": column(measured).astype(np.float64),
        }
    )
