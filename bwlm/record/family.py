"""Whose child a run is: `parent_link.json`, the chain up to its base, and who descends from whom.

Not here: whether a parent's checkpoint is what the link says, which needs its files (`parent.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import check_id, read_json, write_json

LINK = "parent_link.json"
FOLLOWS = {"base": (), "mid": ("base",), "sft": ("base", "mid"), "rl": ("sft",)}
"""The phases that a phase can begin from."""


@dataclass(frozen=True)
class ParentLink:
    """What a run begins from."""

    parent: str
    """Id, in the same storage."""
    phase: str
    """The parent's."""
    checkpoint: str
    """Name of its folder, `step_000400`."""
    step: int
    sha256: str
    """Of the checkpoint's weights."""
    chain: list[str] = field(default_factory=list)
    """Ids from the base to the parent."""


_NONE: dict[str, Any] = {"parent": None, "phase": None, "checkpoint": None, "step": None, "sha256": None, "chain": []}


def write_link(folder: Path, link: ParentLink | None) -> None:
    """None: of a base run, which has no parent."""
    write_json(folder / LINK, _NONE if link is None else asdict(link))


def read_link(folder: Path) -> ParentLink | None:
    """None for a base run. Raises `UserError` that names the file if it says something else."""
    path = folder / LINK
    content = read_json(path)
    try:
        if content["parent"] is None:
            return None
        link = ParentLink(**content)
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the link to a parent: put the file of this run back") from None
    check_id(link.parent, f"{path}: parent")
    return link


def check_order(phase: str, parent: str, parent_phase: str) -> None:
    """Raises `UserError` if a phase cannot begin from a run of another one."""
    if parent_phase not in FOLLOWS[phase]:
        begins = " or ".join(FOLLOWS[phase]) or "nothing"
        raise UserError(f"parent: {parent} is of phase {parent_phase}, but {phase} begins from {begins}")


def skipped(phase: str, parent_phase: str) -> list[str]:
    """Phases between a run's and its parent's that it goes without."""
    order = list(FOLLOWS)
    return order[order.index(parent_phase) + 1 : order.index(phase)]
