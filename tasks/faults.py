"""Faults of conversations, counted by kind in one pass over their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bwlm.errors import Unusable
from tasks.rows import Row

EXAMPLES = 3
"""Most examples that are told of a kind."""


@dataclass
class Faults:
    """Faults of the conversations of a source."""

    source: str
    conversations: int = 0
    """Conversations that were read, usable or not."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of unusable conversations by the kind of their first fault."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """File, row and fault of the first conversations of each kind."""

    def add(self, fault: Unusable) -> None:
        """Count a conversation that cannot be used."""
        self.counts[fault.kind] = self.counts.get(fault.kind, 0) + 1
        examples = self.examples.setdefault(fault.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(str(fault))

    @property
    def kinds(self) -> list[str]:
        """Kinds of faults, the most frequent first."""
        return sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))

    def share(self) -> str:
        """Return how many conversations cannot be used: `2 of 1,000 conversations`."""
        return f"{sum(self.counts.values()):,} of {self.conversations:,} conversations"

    def refusal(self) -> str:
        """Return an error for a person: each kind with its count and examples, and what to do."""
        lines = [f"data.mixture: {self.source}: {self.share()} cannot be used:"]
        for kind in self.kinds:
            lines += [f"  {kind}: {self.counts[kind]:,}", *(f"    {example}" for example in self.examples[kind])]
        some_are_usable = sum(self.counts.values()) < self.conversations
        leave_out = ", or set data.skip_invalid=true to leave these conversations out" if some_are_usable else ""
        return "\n".join([*lines, f"repair the file{leave_out}"])

    def note(self) -> str:
        """Return a line that tells how many conversations of each kind are left out."""
        counted = ", ".join(f"{kind} {self.counts[kind]:,}" for kind in self.kinds)
        return f"{self.source}: {self.share()} left out, which cannot be used: {counted}"


def find_faults(source: str, rows: Iterable[Row], parse: Callable[[Row], object]) -> Faults:
    """Return the faults of all rows that `parse` refuses."""
    faults = Faults(source)
    for row in rows:
        faults.conversations += 1
        try:
            parse(row)
        except Unusable as fault:
            faults.add(fault)
    return faults
