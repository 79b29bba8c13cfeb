"""Links from a run to its parent (`parent_link.json`), and the tree of runs.

`parent.py` reads the parent's files to check that its checkpoint is what the link says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import check_id, read_json, write_json
from bwlm.phases import PHASES, order

LINK = "parent_link.json"


@dataclass(frozen=True)
class ParentLink:
    """Link to a parent: its checkpoint, and the chain up to the base."""

    parent: str
    """Id of the parent, in the same storage."""
    phase: str
    """Phase of the parent."""
    checkpoint: str
    """Name of the checkpoint's folder, `step_000400`."""
    step: int
    sha256: str
    """SHA-256 of the checkpoint's weights."""
    chain: list[str] = field(default_factory=list)
    """Ids from the base to the parent."""
    best: bool = False
    """True if the checkpoint was chosen as the parent's best. Links of earlier versions do not say."""


_NONE: dict[str, Any] = dict.fromkeys(ParentLink.__dataclass_fields__) | {"chain": [], "best": False}


def write_link(folder: Path, link: ParentLink | None) -> None:
    """Write the link of a run; None for a base run, which has no parent."""
    write_json(folder / LINK, _NONE if link is None else asdict(link))


def read_link(folder: Path) -> ParentLink | None:
    """Return the link of a run; None for a base run. Raises `UserError` naming the file if it holds something else."""
    path = folder / LINK
    content = read_json(path)
    try:
        if content["parent"] is None:
            return None
        link = ParentLink(**content)
        _check_types(link)
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the link of a run to its parent: put the file back") from None
    check_id(link.parent, f"{path}: parent")
    return link


def _check_types(link: ParentLink) -> None:
    """Raise TypeError for a field of another type: JSON may hold anything."""
    names = [link.parent, link.checkpoint, link.sha256, *link.chain]
    others = type(link.step) is int and isinstance(link.chain, list) and isinstance(link.best, bool)
    if not all(isinstance(name, str) for name in names) or link.phase not in PHASES or not others:
        raise TypeError


def check_order(phase: str, parent: str, parent_phase: str) -> None:
    """Raise `UserError` if a phase cannot begin from a run of the parent's phase."""
    follows = PHASES[phase].follows
    if parent_phase not in follows:
        begins = " or ".join(follows) or "nothing"
        raise UserError(
            f"parent: {parent} is of phase {parent_phase}, but {phase} begins from {begins}: change the parent or "
            "the phase"
        )


def skipped(phase: str, parent_phase: str) -> list[str]:
    """Return the phases between the parent's and the run's, which the run skips."""
    return list(PHASES)[order(parent_phase) + 1 : order(phase)]


# ---- the tree of runs ----


@dataclass(frozen=True)
class LineageNode:
    """Run with the runs that descend from it."""

    id: str
    children: tuple[LineageNode, ...] = ()
    note: str = ""
    """Reason why a run stands at the top although its link names a parent."""


class Lineage:
    """Tree of a storage's runs by their links, of which some may name a run that is gone, or go in a circle.

    No link is followed twice, so that damaged links cannot make anything run for ever.
    """

    def __init__(self, parents: Mapping[str, str | None]) -> None:
        """Index the runs; `parents` names the parent of each, None for a base run."""
        self._parents = dict(sorted(parents.items()))
        self._children: dict[str, list[str]] = {}
        for run, parent in self._parents.items():
            if parent is not None:
                self._children.setdefault(parent, []).append(run)

    def children(self, run: str) -> list[str]:
        """Return the ids of a run's children, also of a run that is gone."""
        return self._children.get(run, [])

    def ancestors(self, run: str) -> list[str]:
        """Return the ids from a run's parent up to the base, or to a damaged link."""
        above: list[str] = []
        parent = self._parents.get(run)
        while parent is not None and parent in self._parents and parent != run and parent not in above:
            above.append(parent)
            parent = self._parents[parent]
        return above

    def descendants(self, run: str) -> list[str]:
        """Return the ids of a run's descendants, nearest first."""
        descendants = [run]
        for other in descendants:
            descendants += [child for child in self.children(other) if child not in descendants]
        return descendants[1:]

    def around(self, runs: Iterable[str]) -> Lineage:
        """Return the lineage of these runs alone, with their ancestors and descendants."""
        kept = {kin for run in runs for kin in (run, *self.ancestors(run), *self.descendants(run))}
        return Lineage({run: parent for run, parent in self._parents.items() if run in kept})

    def trees(self) -> list[LineageNode]:
        """Return every run once, below its parent.

        At the top are base runs, runs whose parent is gone, and of each circle of links the first run by id.
        """
        seen: set[str] = set()
        roots = []
        for run, parent in self._parents.items():
            if parent not in self._parents:
                note = "" if parent is None else f"its parent {parent} is not here"
                roots.append(self._tree(run, note, seen))
        for run in self._parents:
            if run not in seen:  # its ancestors form a circle: the first by id stands at the top
                circle = self._circle(run)
                note = f"damaged links go in a circle: {' > '.join([*circle, circle[0]])}"
                roots.append(self._tree(circle[0], note, seen))
        return sorted(roots, key=lambda kin: kin.id)

    def _tree(self, run: str, note: str, seen: set[str]) -> LineageNode:
        seen.add(run)
        return LineageNode(
            run, tuple(self._tree(child, "", seen) for child in self.children(run) if child not in seen), note
        )

    def _circle(self, run: str) -> list[str]:
        """Return the circle that a run's ancestors form: parents before their children, from the first by id."""
        trail = [run]
        while (parent := self._parents[trail[-1]]) not in trail:
            assert parent is not None
            trail.append(parent)
        circle = trail[trail.index(parent) :][::-1]
        first = circle.index(min(circle))
        return circle[first:] + circle[:first]
