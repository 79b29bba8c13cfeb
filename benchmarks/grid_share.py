"""What a grid's time went into, from the journals of its cells: training steps and validation, and between cells.

    python benchmarks/grid_share.py STORAGE [GRID]

Counted from the first cell's first step to the last cell's end, over as many lanes as cells ran at once. What lies
between the end of a cell and the first step of the next in its lane is all that it costs to schedule and start one.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from bwlm.paths import read_json
from bwlm.record.journal import Entry, read_journal


def span(entries: list[Entry]) -> tuple[float, float]:
    """Seconds since the epoch at which a cell's first step began and its last entry was written."""
    return entries[0].time / 1000 - entries[0].metrics["step_seconds"], entries[-1].time / 1000


def between_cells(spans: list[tuple[float, float]]) -> list[float]:
    """Seconds from a cell's end to the first step of the one that took its place."""
    gaps, free = [], list[float]()
    for first, last in sorted(spans):
        if before := [end for end in free if end <= first]:
            free.remove(max(before))
            gaps.append(first - max(before))
        free.append(last)
    return gaps


def main() -> None:
    storage, grid = Path(sys.argv[1]), (sys.argv[2:] or ["demo"])[0]
    cells = [list(read_journal(storage / cell)) for cell in read_json(storage / "grids" / grid / "grid.json")["cells"]]
    spans = [span(entries) for entries in cells]
    began, ended = min(first for first, _ in spans), max(last for _, last in spans)
    lanes = max(sum(first <= moment < last for first, last in spans) for moment, _ in spans)
    steps = sum(entry.metrics["step_seconds"] for entries in cells for entry in entries)
    validation = sum(entry.metrics.get("validation_seconds", 0.0) for entries in cells for entry in entries)
    total = lanes * (ended - began)
    print(f"{len(cells)} cells in {lanes} lanes over {ended - began:.1f} s:")
    rest = total - steps - validation
    print(f"training steps {steps / total:.0%}, validation {validation / total:.0%}, the rest {rest / total:.0%}")
    if gaps := between_cells(spans):
        print(f"from one cell to the next: median {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s")


if __name__ == "__main__":
    main()
