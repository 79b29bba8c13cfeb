"""Difference between the scores of two readings of the same items, paired item by item: what a direction costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bwlm.directions import TEXT_READINGS, own_readings
from bwlm.evaluate.tasks.results import Interval
from bwlm.stats.proportions import one_seed

Examples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of the examples of a result, by reading."""


@dataclass(frozen=True)
class DirectionMetrics:
    """Accuracies of one model on one task by one rule, in its own reading and in the other."""

    task: str
    form: str
    rule: str
    items: int
    native: float
    """Accuracy in the model's own reading; for a bidirectional model the mean of both."""
    crossed: float | None
    """Accuracy in the other reading; None for a bidirectional model, which has no other."""
    difference: float
    """Direction gap, native minus crossed; for a bidirectional model its balance, forward minus backward."""
    interval: Interval
    """95 % interval of the difference over items (Bonett and Price 2012)."""

    @property
    def words(self) -> str:
        """Return the metrics as a sentence."""
        low, high = (100 * end for end in self.interval)
        apart = f"{100 * self.difference:+.1f} points, 95 % over {self.items:,} items {low:+.1f} .. {high:+.1f}"
        what = f"{self.task}, {self.form}, {self.rule}: {self.native:.1%}"
        if self.crossed is None:
            return f"{what} over both directions; forward minus backward {apart}"
        return f"{what} in its own direction, {self.crossed:.1%} in the other: {apart}"


def direction_metrics(task: str, direction: str, examples: Examples) -> Iterator[DirectionMetrics]:
    """Yield the metrics of a model of `direction` for each form and rule that both readings have."""
    own = own_readings(direction)
    if not set(own) <= set(TEXT_READINGS) or not set(TEXT_READINGS) <= set(examples):
        return
    by_rule = {reading: _correct_by_rule(rows) for reading, rows in examples.items()}
    forward, backward = (by_rule[reading] for reading in TEXT_READINGS)
    for key in forward:
        if key not in backward:
            continue
        items = [item for item in forward[key] if item in backward[key]]
        first, second = (np.array([of[key][item] for item in items]) for of in (forward, backward))
        both = len(own) > 1
        native, crossed = (first, second) if both or own[0] == TEXT_READINGS[0] else (second, first)
        measured = one_seed(native - crossed)
        yield DirectionMetrics(
            task,
            *key,
            items=len(items),
            native=float(np.mean([native, crossed])) if both else float(native.mean()),
            crossed=None if both else float(crossed.mean()),
            difference=measured.mean,
            interval=measured.interval,
        )


def _correct_by_rule(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Return how far each item is right, by form and rule, the mean over attempts; without controls."""
    shares: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["control"] is None:
            shares.setdefault((row["form"], row["rule"]), {}).setdefault(row["item"], []).append(row["correct"])
    return {key: {item: sum(of) / len(of) for item, of in items.items()} for key, items in shares.items()}
