"""Records of the directions in which a model can be trained, and of the readings in which text can be read.

`bwlm.text.direction` turns the token ids around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DirectionName = Literal["forward", "backward", "bidirectional", "permuted"]

READINGS = ("forward", "backward", "permuted")
"""Orders in which text can be read. A model is trained in a direction; a bidirectional model has two readings."""
TEXT_READINGS = ("forward", "backward")
"""Readings in which every model is evaluated: the text from its beginning, and from its end."""
BASELINE = "forward"
"""Direction that the others are compared with."""


@dataclass(frozen=True)
class Direction:
    """Readings of the models of a direction."""

    readings: tuple[str, ...]
    """Readings that the model is trained in; the mean over them is its own figure.

    With several readings, each segment has a marker after BOS.
    """
    is_control: bool = False
    """True for an order that exists in documents only: no conversation has it."""


DIRECTIONS: Mapping[str, Direction] = MappingProxyType(
    {
        "forward": Direction(("forward",)),
        "backward": Direction(("backward",)),
        "bidirectional": Direction(("forward", "backward")),
        "permuted": Direction(("permuted",), is_control=True),
    }
)
"""Directions by name, in the order of tables and legends."""


def own_readings(direction: str) -> tuple[str, ...]:
    """Return the readings whose mean is the direction's own figure."""
    return DIRECTIONS[direction].readings


def evaluated_readings(direction: str) -> tuple[str, ...]:
    """Return the readings in which a model of the direction is evaluated: forward, backward, and its own if other."""
    return tuple(dict.fromkeys((*TEXT_READINGS, *own_readings(direction))))


def is_marked(direction: str) -> bool:
    """Return whether segments carry a marker after BOS, which tells a model of several readings which one to use."""
    return len(own_readings(direction)) > 1


def is_native(direction: str, reading: str) -> bool:
    """Return whether a model of the direction was trained in the reading."""
    return reading in own_readings(direction)


def opposite(reading: str) -> str:
    """Return backward for forward, and forward for backward."""
    return TEXT_READINGS[1 - TEXT_READINGS.index(reading)]


def rank(direction: str) -> tuple[int, str]:
    """Return a key for sorting: the known directions in their order, then any others by name."""
    known = tuple(DIRECTIONS)
    return (known.index(direction) if direction in known else len(known), direction)
