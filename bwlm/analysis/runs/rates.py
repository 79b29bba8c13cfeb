"""Learning rates that were tried, the best rate of each direction, and its losses on the test half."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bwlm.directions import TEXT_READINGS, is_marked, rank
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.labels import double_budget_pairs
from bwlm.stats.gaps import PER_DIRECTION


@dataclass(frozen=True)
class TriedRate:
    """A learning rate that the grid planned for a direction at a size."""

    size: str
    direction: str
    lr: float
    cells: int
    finished: int

    @property
    def qualifies(self) -> bool:
        """True if every planned cell finished: the seeds that survive a divergence say nothing about the rate."""
        return self.finished == self.cells


def tried_rates(folders: list[ExperimentFolder], labels: dict[str, str], finished: set[str]) -> list[TriedRate]:
    """Return every learning rate of the grid, with how many of its cells, one per seed, are among the `finished`."""
    keys = {}
    for folder in folders:
        experiment = folder.config().experiment
        keys[folder.id] = (labels[folder.id], experiment.direction, experiment.lr)
    done = Counter(key for run, key in keys.items() if run in finished)
    return [TriedRate(*key, cells, done[key]) for key, cells in sorted(Counter(keys.values()).items())]


@dataclass(frozen=True)
class BestRate:
    """Learning rate at which a direction is compared."""

    size: str
    direction: str
    lr: float
    candidates: int
    """Number of learning rates that were tried, with rates that do not qualify."""
    seeds: int
    bpb: float
    """Mean over these seeds, on the tuning half; bits per byte."""
    choosing_seeds: int | None
    """Fewest seeds that any rate in the choice was judged by; None if only one rate was tried: nothing was chosen."""


def best_learning_rates(table: pd.DataFrame, tried: Sequence[TriedRate]) -> list[BestRate]:
    """Return the best rate of each size and direction: the lowest mean over seeds on the tuning half.

    Only seeds that every qualifying rate of that size and direction was trained with count, if there are any. A
    direction without a qualifying rate has no best rate.
    """
    candidates = Counter((rate.size, rate.direction) for rate in tried)
    qualifying = {(rate.size, rate.direction, rate.lr) for rate in tried if rate.qualifies}
    tuning = table[of_groups(table, qualifying) & table["half"].eq("tuning")]
    sums = tuning.groupby(["size", "direction", "lr", "seed"], as_index=False)[["nll", "bytes"]].sum()
    sums["bpb"] = sums["nll"] / (math.log(2) * sums["bytes"])
    best = []
    for (size, direction), group in sums.groupby(["size", "direction"]):
        tried_here = candidates[str(size), str(direction)]
        rates = group["lr"].nunique()
        of_seed = group.groupby("seed")["lr"].nunique()
        shared = group[group["seed"].isin(of_seed.index[of_seed == rates])]
        counted = shared if len(shared) else group
        means = counted.groupby("lr")["bpb"].mean()
        lr = float(means.index[int(means.to_numpy().argmin())])  # the lowest of equally good rates
        of_rate = counted.groupby("lr")["seed"].nunique()
        choosing_seeds = int(of_rate.min()) if tried_here > 1 else None
        bpb, seeds = float(means.min()), int(of_rate[lr])
        best.append(BestRate(str(size), str(direction), lr, tried_here, seeds, bpb, choosing_seeds))
    return sorted(best, key=lambda rate: (rate.size, rank(rate.direction)))


def best_on_test(table: pd.DataFrame, best: list[BestRate]) -> pd.DataFrame:
    """Return the rows on the test half of the cells at their direction's best learning rate.

    The column `choosing_seeds` says how many seeds chose that rate; NaN if nothing was chosen.
    """
    wanted = {(rate.size, rate.direction, rate.lr): rate.choosing_seeds for rate in best}
    test = table[of_groups(table, wanted) & table["half"].eq("test")].drop(columns="half")
    choosing_seeds = pd.Series(math.nan, index=test.index)
    for key, rows in _groups(test).items():
        choosing_seeds.iloc[rows] = wanted[key]
    return test.assign(choosing_seeds=choosing_seeds)


def equal_per_direction(test: pd.DataFrame, folders: list[ExperimentFolder], labels: dict[str, str]) -> pd.DataFrame:
    """Return rows of `test` again, for pairs of one-directional runs with bidirectional runs of twice their steps.

    Their size ends in `PER_DIRECTION`. Only these pairs may differ in their budget, and so in their row order.
    """
    parts = []
    for once, twice in double_budget_pairs({labels[folder.id]: folder.config().compared for folder in folders}):
        is_pair = (test["size"].eq(once) & test["direction"].isin(TEXT_READINGS)) | (
            test["size"].eq(twice) & test["direction"].map(is_marked)
        )
        parts.append(test[is_pair].assign(size=f"{once}{PER_DIRECTION}"))
    return pd.concat(parts, ignore_index=True) if parts else test.head(0)


def of_groups(table: pd.DataFrame, wanted: Collection[tuple[str, str, float]]) -> pd.Series[bool]:
    """Return true for rows of the wanted sizes, directions and learning rates."""
    among = pd.Series(False, index=table.index)
    for key, rows in _groups(table).items():
        if key in wanted:
            among.iloc[rows] = True
    return among


def _groups(table: pd.DataFrame) -> dict[tuple[str, str, float], NDArray[np.intp]]:
    """Return the places of the rows of each size, direction and learning rate."""
    return table.groupby(["size", "direction", "lr"], sort=False).indices  # type: ignore[return-value]
