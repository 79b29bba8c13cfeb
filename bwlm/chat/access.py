"""The right to ask the server: its names, and its token."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine, for programs on this machine."""


@dataclass(frozen=True)
class Access:
    """Names under which the server answers, and the token that it asks for."""

    hosts: frozenset[str] = LOOPBACK
    """Names under which the server may be called, without a port."""
    token: str | None = None
    body_seconds: float = 20.0
    """Time in which the body of a request must have come."""


LOCAL = Access()
"""Access for all programs on this machine."""
