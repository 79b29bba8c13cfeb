"""Cost of a reading: accuracies of the same models in both readings of a text, paired by seed and item."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from bwlm.directions import TEXT_READINGS, own_readings, rank
from bwlm.stats.score_table import ScoreRun, Setting, score_runs
from bwlm.stats.scores import Difference, measure_difference, why_not_compared

FORWARD, BACKWARD = TEXT_READINGS


@dataclass(frozen=True)
class ReadingCost:
    """Accuracies of the models of a direction in both readings."""

    setting: Setting
    """Task, size, rule and form; its reading is empty."""
    direction: str
    native: float
    """Native accuracy: in the own reading; of a bidirectional model the mean of both."""
    crossed: float | None
    """Cross-direction accuracy, in the other reading; None for a bidirectional model, which has no other."""
    difference: Difference
    """Direction gap, native minus crossed; of a bidirectional model its balance, forward minus backward."""

    @property
    def is_balance(self) -> bool:
        """True if the difference is the balance of a bidirectional model."""
        return self.crossed is None


def reading_costs(rows: pd.DataFrame) -> list[ReadingCost]:
    """Return the costs of all directions whose models were scored in both readings, by setting.

    `rows` are those of `checked_scores`, with the readings forward and backward.
    """
    runs = score_runs(rows)
    costs = []
    for setting, of_setting in runs.items():
        backward = runs.get(setting._replace(reading=BACKWARD), {})
        for direction in sorted(of_setting, key=rank) if setting.reading == FORWARD else ():
            both = {FORWARD: of_setting[direction], BACKWARD: backward.get(direction, {})}
            cost = _cost(setting._replace(reading=""), direction, both)
            costs += [cost] if cost else []
    return costs


def _cost(setting: Setting, direction: str, runs: dict[str, dict[int, ScoreRun]]) -> ReadingCost | None:
    own = own_readings(direction)
    if not set(own) <= set(runs) or not all(runs.values()) or why_not_compared(*_flat(runs)):
        return None
    first, second = (FORWARD, BACKWARD) if own[0] == FORWARD else (BACKWARD, FORWARD)
    difference = measure_difference(setting, second, runs[second], first, runs[first])
    native, crossed = (_mean(runs[reading], difference.seeds) for reading in (first, second))
    if len(own) > 1:
        return ReadingCost(setting, direction, (native + crossed) / 2, None, difference)
    return ReadingCost(setting, direction, native, crossed, difference)


def _flat(runs: dict[str, dict[int, ScoreRun]]) -> tuple[str, dict[int, ScoreRun], str, dict[int, ScoreRun]]:
    (a, of_a), (b, of_b) = runs.items()
    return a, of_a, b, of_b


def _mean(runs: dict[int, ScoreRun], seeds: list[int]) -> float:
    return float(sum(runs[seed].score_i.mean() for seed in seeds) / len(seeds))
