"""The share of a grid's time that went into training steps and validation, from the journals of its cells.

    python benchmarks/grid_share.py STORAGE [GRID]

Counted from the first cell's first step to the last cell's end, over as many lanes as cells ran at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bwlm.paths import read_json
from bwlm.record.journal import Entry, read_journal


def span(entries: list[Entry]) -> tuple[float, float]:
    """Seconds since the epoch at which a cell's first step began and its last entry was written."""
    return entries[0].time / 1000 - entries[0].metrics["step_seconds"], entries[-1].time / 1000


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


if __name__ == "__main__":
    main()
