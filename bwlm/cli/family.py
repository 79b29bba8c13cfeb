"""Lines of `bwlm runs tree`: runs below their parents."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bwlm.cli.terminal import Branch

if TYPE_CHECKING:
    from bwlm.record.catalog.describe import Best, Leaves, Member


def branches(members: list[Member], gathered: bool) -> list[Branch]:
    """Return the branches of runs and their children. With `gathered`, the many leaves of a grid share one line."""
    from bwlm.record.catalog.describe import Leaves, gather

    shown: list[Member | Leaves] = gather(members) if gathered else list(members)
    return [_leaves(one) if isinstance(one, Leaves) else _member(one, gathered) for one in shown]


def _member(member: Member, gathered: bool) -> Branch:
    cell = member.cell
    columns = [cell.phase, cell.direction, f"d{cell.depth}", best_words(member.best, cell.step), state_words(member)]
    note = ", ".join(filter(None, [member.note, member.begins]))
    return Branch(cell.id, columns, note, branches(list(member.children), gathered))


def _leaves(leaves: Leaves) -> Branch:
    states = Counter(member.cell.state for member in leaves.members)
    summary = (
        f"all {min(states)}" if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in states.most_common())
    )
    phase = leaves.members[0].cell.phase
    return Branch(
        f"{len(leaves.members)} {phase} runs of grid {leaves.grid}, {summary}; each: bwlm runs tree {leaves.grid}"
    )


def state_words(member: Member) -> str:
    """Return a run's state, with its step if it has not finished."""
    cell = member.cell
    if cell.state in ("finished", "waiting"):
        return cell.state
    return f"{cell.state} at step {cell.step:,} of {member.steps:,}"


def best_words(best: Best | None, step: int) -> str:
    """Return a run's best figure, with its step unless that is `step`; '' if there is none."""
    if best is None:
        return ""
    return f"{best.metric} {best.value:.4f}" + (f" at step {best.step:,}" if best.step != step else "")
