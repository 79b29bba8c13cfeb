"""How often intervals of accuracies hold the truth, by simulation: `python -m tests.stats.coverage` prints the table.

Whether a run answers an item follows a probit model: the answer is right if

    ability of the arm + easiness of the item + (arm on item) + (seed) + (seed in arm) + rest > 0

Each part is normal, so the true accuracy of an arm is Phi(ability / standard deviation of the sum of the other parts).
Items are easy and hard (standard deviation 1, like the rest), arms differ on items (0.5), and half of a seed's variance
is common to both arms. Seed and item are drawn anew for each study. How far seeds spread is given as the variance of
their true accuracies over p (1 - p) / items, the noise of one run's items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from bwlm.stats.columns import FloatArray
from bwlm.stats.proportions import Crossed

SEEDS = (3, 5, 8)
ITEMS = (100, 500, 2000)
SPREADS = {0: "0", 1: "as the items", 10: "10 x the items"}
ACCURACIES = ((0.25, 0.25), (0.25, 0.35), (0.5, 0.6), (0.8, 0.9), (0.9, 0.9))
DRAWS = {100: 10_000, 500: 10_000, 2000: 4_000}
_ARM_ON_ITEM = 0.5
_BESIDE_SEEDS = 1 + 1 + _ARM_ON_ITEM**2  # variance: item, rest, arm on item
_AT_ONCE = 4_000_000  # answers


@dataclass(frozen=True)
class Case:
    seeds: int
    items: int
    spread: float
    accuracies: tuple[float, float]


@cache
def seed_deviation(accuracy: float, variance: float) -> float:
    """Standard deviation of the seed's parts at which the true accuracies of seeds have this variance."""
    if not variance:
        return 0.0
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def too_much(deviation: float) -> float:
        ability = norm.ppf(accuracy) * np.sqrt(_BESIDE_SEEDS + deviation**2)
        of_seeds = norm.cdf((ability + deviation * points) / np.sqrt(_BESIDE_SEEDS))
        return float((weights * of_seeds**2).sum() - accuracy**2 - variance)

    return float(brentq(too_much, 1e-6, 50.0))


def simulated(case: Case, draws: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Yield studies: answers [arm, seed, item], each 0 or 1."""
    chunk = max(1, _AT_ONCE // (2 * case.seeds * case.items))
    deviations = [seed_deviation(p, case.spread * p * (1 - p) / case.items) for p in case.accuracies]
    for start in range(0, draws, chunk):
        studies = min(chunk, draws - start)

        def drawn(*shape: int, studies: int = studies) -> FloatArray:
            return rng.standard_normal((studies, *shape), dtype=np.float32).astype(np.float64)

        item, common_seed = drawn(1, case.items), drawn(case.seeds, 1)
        arms = []
        for accuracy, deviation in zip(case.accuracies, deviations, strict=True):
            ability = norm.ppf(accuracy) * np.sqrt(_BESIDE_SEEDS + deviation**2)
            seed = deviation * (common_seed + drawn(case.seeds, 1)) / np.sqrt(2)
            of_run = ability + item + _ARM_ON_ITEM * drawn(1, case.items) + seed
            arms.append(of_run + drawn(case.seeds, case.items) > 0)
        yield from np.stack(arms, axis=1).astype(np.float64)


def coverage(case: Case, draws: int, seed: int = 0) -> tuple[float, float, float]:
    """Percent of studies whose 95 % interval holds the truth: of each arm's accuracy, and of their difference.

    Studies with an arm that is right or wrong on every item are left out, as the analysis refuses such an arm.
    """
    a, b = case.accuracies
    held, kept = np.zeros(3), 0
    for study in simulated(case, draws, np.random.default_rng(seed)):
        of_arms = [Crossed.from_scores(arm) for arm in study]
        if all(0 < arm.mean < 1 for arm in of_arms):
            of_difference = Crossed.from_scores(study[1] - study[0]).interval
            intervals = [*(arm.accuracy_interval() for arm in of_arms), of_difference]
            held += [low <= truth <= high for (low, high), truth in zip(intervals, (a, b, b - a), strict=True)]
            kept += 1
    in_percent = 100 * held / kept
    return float(in_percent[0]), float(in_percent[1]), float(in_percent[2])


def row(seeds: int, items: int, spread: int) -> str:
    """Line of the table: the lowest and highest coverage over the accuracies."""
    found = np.array([coverage(Case(seeds, items, spread, pair), DRAWS[items]) for pair in ACCURACIES])
    arms, differences = found[:, :2], found[:, 2]
    shown = " | ".join(f"{of.min():.1f} .. {of.max():.1f}" for of in (arms, differences))
    return f"| {seeds} | {items} | {SPREADS[spread]} | {shown} |"


if __name__ == "__main__":
    for one in ((seeds, items, spread) for seeds in SEEDS for items in ITEMS for spread in SPREADS):
        print(row(*one), flush=True)
