"""Numbers, sizes and durations in words."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """Returns `1 cell`, `3 cells`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Iterable[object]) -> str:
    """Distinct items in a fixed order: 2, 10, a, b."""
    return ", ".join(map(str, sorted(set(items), key=lambda item: (isinstance(item, str), item))))
