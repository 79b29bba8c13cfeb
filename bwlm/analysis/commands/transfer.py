"""Loss of each model in both readings, and of bidirectional models behind the wrong marker."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pandas as pd

from bwlm.analysis.charts.losses import transfer_chart
from bwlm.analysis.commands.result import OVER_SEEDS, Analysis
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.losses import load_losses
from bwlm.directions import TEXT_READINGS, is_marked, is_native, opposite, own_readings
from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.gaps import CONFIDENCE, paired_t


def transfer(folders: list[ExperimentFolder]) -> Analysis:
    """Return the losses of each direction in both readings, native and crossed, with t-intervals over seeds.

    Raises `UserError` if no run was evaluated at its end.
    """
    notes, rows = list[str](), list[dict[str, Any]]()
    labels = sizes(folders)
    for folder in folders:
        try:
            rows += [_of_reading(folder, reading, labels[folder.id]) for reading in TEXT_READINGS]
        except UserError as error:
            notes.append(f"{folder.id}: {error}")
    if not rows:
        raise UserError("; ".join(notes) or "analyze transfer: no run was given: name one")
    runs = pd.DataFrame(rows)
    table = summary(runs)
    title = "Transfer between directions"
    further = {"other reading": other_readings(runs), "wrong marker": wrong_markers(folders, labels)}
    findings = _sentences(*further.values())
    more = {name: of for name, of in further.items() if len(of)}
    return Analysis(
        "transfer", title, findings, table, transfer_chart(table, title), notes, more=more, bounds=OVER_SEEDS
    )


def _of_reading(folder: ExperimentFolder, reading: str, size: str) -> dict[str, Any]:
    experiment = folder.config().experiment
    losses = load_losses(folder, reading)
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
    """Return means over seeds: size, direction, lr, reading, native, seeds, loss, low, high (nats per token), bpb."""
    rows = []
    for key, group in runs.groupby(["size", "direction", "lr", "reading"]):
        named: dict[str, Any] = dict(zip(["size", "direction", "lr", "reading"], key, strict=True))
        low, high = _interval(group["loss"].to_numpy())
        rows.append(
            {
                **named,
                "native": is_native(named["direction"], named["reading"]),
                "seeds": len(group),
                "loss": float(group["loss"].mean()),
                "low": low,
                "high": high,
                "bpb": float(group["bpb"].mean()),
            }
        )
    return pd.DataFrame(rows)


def other_readings(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the extra loss of the reading that a model did not learn; for a bidirectional model, of backward reading.

    Columns: size, lr, direction, reading, against (the own reading; forward for a bidirectional model), seeds, nats
    (per token, loss in `reading` minus loss in `against`), low, high.
    """
    rows = []
    for (size, lr, direction), group in runs.groupby(["size", "lr", "direction"]):
        own = own_readings(str(direction))[0]
        if own not in TEXT_READINGS:
            continue
        wide = group.pivot(index="run", columns="reading", values="loss")
        other = opposite(own)
        rows.append((size, lr, direction, other, own, *_over_seeds((wide[other] - wide[own]).to_numpy())))
    return pd.DataFrame(rows, columns=["size", "lr", "direction", "reading", "against", *_SEEDS])


def wrong_markers(folders: list[ExperimentFolder], labels: dict[str, str]) -> pd.DataFrame:
    """Return the extra loss of bidirectional models on the same text after the marker of the other direction.

    Columns: size, lr, reading (the text's true order), seeds, nats (per token, loss with the wrong marker minus loss
    with the right one), low, high.
    """
    changes = []
    for folder in folders:
        experiment = folder.config().experiment
        for reading in TEXT_READINGS:
            name = f"{reading}_marked_{opposite(reading)}"
            with contextlib.suppress(UserError):  # a run of one direction has no marker
                wrong, right = (load_losses(folder, of) for of in (name, reading))
                apart = float((wrong["nll"] - right["nll"]).sum() / right["tokens"].sum())
                changes.append((labels[folder.id], experiment.lr, reading, apart))
    table = pd.DataFrame(changes, columns=["size", "lr", "reading", "apart"])
    groups = table.groupby(["size", "lr", "reading"])["apart"]
    rows = [(*key, *_over_seeds(apart.to_numpy())) for key, apart in groups]
    return pd.DataFrame(rows, columns=["size", "lr", "reading", *_SEEDS])


_SEEDS = ["seeds", "nats", "low", "high"]


def _over_seeds(apart: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, float, float, float]:
    return len(apart), float(apart.mean()), *_interval(apart)


def _sentences(readings: pd.DataFrame, markers: pd.DataFrame) -> list[str]:
    sentences = []
    for row in readings.itertuples():
        both = is_marked(str(row.direction))
        reads, against = (row.reading, f"reading {row.against}") if both else (row.reading, "its own direction")
        sentences.append(
            f"{_start(row)}: reading {reads} costs a {row.direction} model {_amount(row, f' against {against}')}"
        )
    for row in markers.itertuples():
        cost = f"on {row.reading} text the wrong marker costs a bidirectional model"
        sentences.append(f"{_start(row)}: {cost} {_amount(row)}")
    return sentences


def _start(row: Any) -> str:
    return f"{row.size}, lr {row.lr:g}"


def _amount(row: Any, against: str = "") -> str:
    amount = f"{row.nats:+.4f} nats per token{against}"
    if math.isnan(row.low):
        return f"{amount} (one seed)"
    return f"{amount} ({100 * CONFIDENCE:.0f} % over {row.seeds} seeds: {row.low:+.4f} .. {row.high:+.4f})"


def _interval(losses: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    tested = paired_t(losses)
    return tested[1] if tested else (math.nan, math.nan)
