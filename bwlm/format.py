"""Counts and lists in words."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """Return `1 cell` or `3 cells`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Iterable[object]) -> str:
    """Return the distinct items in a fixed order, numbers first: `2, 10, a, b`."""
    return ", ".join(map(str, sorted(set(items), key=lambda item: (isinstance(item, str), item))))
