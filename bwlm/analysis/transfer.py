"""What a model that learned one direction makes of the other, and whether a bidirectional one reads both as well."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pandas as pd

from bwlm.analysis.charts import transfer_chart
from bwlm.analysis.result import Analysis
from bwlm.analysis.stats import CONFIDENCE, DIRECTION_ORDER, paired_t
from bwlm.analysis.tables import load_losses, sizes
from bwlm.errors import UserError
from bwlm.record.lineage import ExperimentFolder

READINGS = ("forward", "backward")


def transfer(folders: list[ExperimentFolder]) -> Analysis:
    """Losses of each direction in both readings, native and crossed, with t-intervals over seeds.

    Raises `UserError` if no run was evaluated at its end.
    """
    notes, rows = list[str](), list[dict[str, Any]]()
    labels = sizes(folders)
    for folder in folders:
        try:
            rows += [_of_reading(folder, reading, labels[folder.id]) for reading in READINGS]
        except UserError as error:
            notes.append(f"{folder.id}: {error}")
    if not rows:
        raise UserError("; ".join(notes) or "no run was given")
    runs = pd.DataFrame(rows)
    table = summary(runs)
    title = "Transfer between directions"
    found = [*sentences(runs), *marker_sentences(folders, labels)]
    return Analysis("transfer", title, found, table, transfer_chart(table, title), notes)


def _of_reading(folder: ExperimentFolder, reading: str, size: str) -> dict[str, Any]:
    experiment = folder.config().experiment
    losses = load_losses(folder, reading, experiment.phase)
    nll = float(losses["nll"].sum())
    return {
        "run": folder.id,
        "size": size,
        "direction": experiment.direction,
        "lr": experiment.lr,
        "seed": experiment.seed,
        "reading": reading,
        "loss": nll / losses["tokens"].sum(),
        "bpb": nll / (math.log(2) * losses["bytes"].sum()),
    }


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """size, direction, lr, reading, native, seeds, loss with its interval (nats per token), bpb."""
    rows = []
    for key, group in runs.groupby(["size", "direction", "lr", "reading"]):
        named: dict[str, Any] = dict(zip(["size", "direction", "lr", "reading"], key, strict=True))
        low, high = _interval(group["loss"].to_numpy())
        rows.append(
            {
                **named,
                "native": named["direction"] in (named["reading"], "bidirectional"),
                "seeds": len(group),
                "loss": float(group["loss"].mean()),
                "low": low,
                "high": high,
                "bpb": float(group["bpb"].mean()),
            }
        )
    return pd.DataFrame(rows)


def sentences(runs: pd.DataFrame) -> list[str]:
    """The price of reading the other way, and a bidirectional model's balance, each with an interval over seeds."""
    found = []
    for key, group in runs.groupby(["size", "direction", "lr"]):
        size, direction, lr = key
        if direction not in DIRECTION_ORDER[:3]:
            continue
        wide = group.pivot(index="run", columns="reading", values="loss")
        own = "backward" if direction == "backward" else "forward"
        other = "forward" if own == "backward" else "backward"
        apart = (wide[other] - wide[own]).to_numpy()
        what = f"{size}, lr {lr:g}: a {direction} model"
        if direction == "bidirectional":
            words = f"reads backwards at {apart.mean():+.4f} nats per token against forwards"
        else:
            words = f"reads {other} at {apart.mean():+.4f} nats per token against its own direction"
        found.append(f"{what} {words}{_over_seeds(apart)}")
    return found


def marker_sentences(folders: list[ExperimentFolder], labels: dict[str, str]) -> list[str]:
    """Whether the marker switches a bidirectional model: what the same text costs behind the other marker."""
    rows = []
    for folder in folders:
        experiment = folder.config().experiment
        for reading, told in (READINGS, READINGS[::-1]):
            name = f"{reading}_marked_{told}"
            with contextlib.suppress(UserError):  # a run of one direction has no marker
                wrong, right = (load_losses(folder, of, experiment.phase) for of in (name, reading))
                apart = float((wrong["nll"] - right["nll"]).sum() / right["tokens"].sum())
                rows.append((labels[folder.id], experiment.lr, reading, apart))
    table = pd.DataFrame(rows, columns=["size", "lr", "reading", "apart"])
    return [
        f"{size}, lr {lr:g}: behind the wrong marker a bidirectional model reads {reading} text at "
        f"{group['apart'].mean():+.4f} nats per token{_over_seeds(group['apart'].to_numpy())}"
        for (size, lr, reading), group in table.groupby(["size", "lr", "reading"])
    ]


def _over_seeds(apart: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    tested = paired_t(apart)
    if tested is None:
        return " (one seed)"
    low, high = tested[1]
    return f" ({100 * CONFIDENCE:.0f} % over {len(apart)} seeds: {low:+.4f} .. {high:+.4f})"


def _interval(losses: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    tested = paired_t(losses)
    return tested[1] if tested else (math.nan, math.nan)
