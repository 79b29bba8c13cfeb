"""The directions in which a model can be trained, one record each, and the readings in which a text can be read.

How token ids are turned around is in `bwlm.text.direction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DirectionName = Literal["forward", "backward", "bidirectional", "permuted"]

READINGS = ("forward", "backward", "permuted")
"""Orders in which text can be read. A direction is what a model is trained in; a bidirectional one has two readings."""
TEXT_READINGS = ("forward", "backward")
"""Readings in which every model is evaluated: the text from its beginning, and from its end."""
BASELINE = "forward"
"""The direction that the others are compared with."""


@dataclass(frozen=True)
class Direction:
    """How a model of this direction reads."""

    readings: tuple[str, ...]
    """Its own readings: their mean is its own figure. With several, each segment has a marker after BOS."""
    is_control: bool = False
    """True for an order of documents that no conversation has."""


DIRECTIONS: Mapping[str, Direction] = MappingProxyType(
    {
        "forward": Direction(("forward",)),
        "backward": Direction(("backward",)),
        "bidirectional": Direction(("forward", "backward")),
        "permuted": Direction(("permuted",), is_control=True),
    }
)
"""The directions by name, in the order of tables and legends."""


def own_readings(direction: str) -> tuple[str, ...]:
    """Returns the readings whose mean is the direction's own figure."""
    return DIRECTIONS[direction].readings


def is_marked(direction: str) -> bool:
    """Returns whether segments carry a marker after BOS: a model of several readings must be told which."""
    return len(own_readings(direction)) > 1


def is_native(direction: str, reading: str) -> bool:
    """Returns whether a model of the direction was trained to read so."""
    return reading in own_readings(direction)


def opposite(reading: str) -> str:
    """Returns backward for forward, and forward for backward."""
    return TEXT_READINGS[1 - TEXT_READINGS.index(reading)]


def rank(direction: str) -> tuple[int, str]:
    """Returns a key for sorting: the known directions in their order, then any others by name."""
    known = tuple(DIRECTIONS)
    return (known.index(direction) if direction in known else len(known), direction)
