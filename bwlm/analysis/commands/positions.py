"""Loss by position from each end of a segment, by frequency of a token, and by length of its document."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.analysis.charts.insides import position_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.research_logs import LoggedRun, from_each
from bwlm.directions import own_readings
from bwlm.record.bucket import fetch_text
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.packing import PackedRows

KINDS = (
    "tokens from the segment's start",
    "tokens from the segment's end",
    "token's share of the text",
    "document's tokens",
)
"""Kinds of place. The last is left out if the packed text, which knows a document's length, is gone."""
_AT_ONCE = 4096
"""Rows of packed text that are in memory at a time."""
_KEPT = ["kind", "bin", "tokens", "loss", "accuracy"]


def positions(folders: list[ExperimentFolder]) -> Analysis:
    """Return loss and accuracy by place at the newest validation, in each run's own reading, over the runs of a series.

    Columns: mean, lowest and highest over the runs of a series; loss in nats per token, accuracy as a share.

    Raises `UserError` if no run logged its validation tokens.
    """
    of_runs, notes = from_each(folders, by_place)
    spread = {"": "mean", "_low": "min", "_high": "max"}
    figures = {f"{name}{end}": (name, how) for name in ("loss", "accuracy") for end, how in spread.items()}
    by_bin = of_runs.groupby(["series", "direction", "kind", "bin"], sort=False)
    table = by_bin.agg(tokens=("tokens", "mean"), **figures, runs=("run", "nunique")).reset_index()
    title = "Loss by place in the text"
    return Analysis("positions", title, _sentences(table), table, position_chart(table, title), notes)


def by_place(run: LoggedRun) -> pd.DataFrame:
    """Return a row per kind of place and bin: kind, bin (its lower edge), tokens, loss (nats), accuracy (share).

    Edges are powers of two: numbers of tokens, or for the frequency of a token its share of the text.
    """
    readings = list(run.fixed("validation", "reading"))
    own = [readings.index(name) for name in own_readings(run.direction)]
    loss = run.last("validation", "loss")[own].mean(0).astype(np.float64)
    correct = run.last("validation", "correct")[own].mean(0)
    segment, document, token = (run.fixed("validation", name) for name in ("segment", "document", "token"))
    start, length = _within(segment)
    counts = np.bincount(token)
    edges = {
        KINDS[0]: _power_of_two(start + 1),
        KINDS[1]: _power_of_two(length - start),
        KINDS[2]: 2.0 ** np.floor(np.log2(counts[token] / len(token))),
    }
    if (lengths := document_lengths(run.folder.config().corpus)) is not None:
        edges[KINDS[3]] = _power_of_two(lengths.loc[document].to_numpy())
    parts = [
        pd.DataFrame({"bin": edge, "loss": loss, "accuracy": correct})
        .groupby("bin")
        .agg(tokens=("loss", "size"), loss=("loss", "mean"), accuracy=("accuracy", "mean"))
        .reset_index()
        .assign(kind=kind)
        for kind, edge in edges.items()
    ]
    return pd.concat(parts, ignore_index=True)[_KEPT]


def _within(segment: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each token's index in its segment, and the segment's length; a segment's tokens stand together."""
    _, first, counts = np.unique(segment, return_index=True, return_counts=True)
    order = np.argsort(first)
    return np.arange(len(segment)) - np.repeat(first[order], counts[order]), np.repeat(counts[order], counts[order])


@cache
def document_lengths(corpus: str) -> pd.Series[int] | None:
    """Count the tokens of each document of the validation split, by its number; None if the packed text is gone."""
    fetch_text(Path(corpus))
    if not (Path(corpus) / "manifest.json").exists():
        return None
    rows = PackedRows(Path(corpus), "validation")
    parts = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows.take(np.arange(start, min(start + _AT_ONCE, len(rows))))
        parts.append(pd.Series(part.lengths, index=part.document))
    lengths: pd.Series[int] = pd.concat(parts).groupby(level=0).sum()
    return lengths


def _power_of_two(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(2.0 ** np.floor(np.log2(values)))


def _sentences(table: pd.DataFrame) -> list[str]:
    sentences = []
    for series, group in table.groupby("series", sort=False):
        for kind in KINDS[:2]:
            part = group[group["kind"] == kind].sort_values("bin")
            first, last = part.iloc[0], part.iloc[-1]
            sentences.append(
                f"{series}: loss by {kind}: {first['loss']:.3f} nats at {first['bin']:.0f}, "
                f"{last['loss']:.3f} from {last['bin']:.0f} on"
            )
    return sentences
