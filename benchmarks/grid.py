"""Costs of a grid besides training: its wall time over that of its training, and seconds between two cells.

    python benchmarks/grid.py [--cells 12] [--seconds 60] [--workers 1] [--at-once 2] [--json]

Trains a grid of cells that each take about so many seconds, `--at-once` of them at a time, as `bwlm grid run` does. A
first, small grid finds out how many steps that is, and prepares the text. Training is what the cells' journals show:
from the first step to the last, with the validations between them. Ideal is all training, divided by the cells at
once. The wall time is that of the whole command: start of Python and Ray, reports, everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bwlm.record.grids import cells_of
from bwlm.record.journal import read_journal

BWLM = Path(sys.executable).parent / "bwlm"
_FIRST_STEPS = 30
"""Steps of the cells that find out how long a step takes."""


class Trained(NamedTuple):
    """Cell, in seconds since the epoch."""

    began: float
    ended: float
    step_seconds: float


def run_grid(storage: Path, name: str, cells: int, steps: int, args: argparse.Namespace) -> float:
    """Run a grid; return the seconds that the command took."""
    grid = {
        "name": name,
        "data": {"source": args.source},
        "tokenizer": {"vocab_size": args.vocab},
        "axes": {"direction": ["forward"], "depth": [args.depth], "lr": [2.0], "seed": list(range(cells))},
        "model": {"sequence_length": 256},
        "budget": {"steps": steps, "batch_tokens": 4096},
        "evaluation": {"every": 0, "tokens": 40960},
        "resources": {"workers": args.workers, "cpus_per_worker": 1},
        "launch": {"concurrency": args.at_once},
    }
    (path := storage / f"{name}.yaml").write_text(yaml.safe_dump(grid))
    began = time.perf_counter()
    done = subprocess.run([BWLM, "grid", "run", path, "--storage", storage], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - began


def trained(storage: Path, name: str) -> list[Trained]:
    """Return the cells in the order in which they began."""
    found = []
    for cell in cells_of(storage, name):
        times = [entry.time / 1000 for entry in read_journal(storage / cell)]
        step = statistics.median(after - before for before, after in pairwise(times))
        found.append(Trained(times[0] - step, times[-1], step))
    return sorted(found)


def pauses(cells: list[Trained], at_once: int) -> list[float]:
    """Return the seconds from each end of a cell to the first step of the cell that took its place."""
    ends = sorted(cell.ended for cell in cells)
    return [cell.began - end for cell, end in zip(cells[at_once:], ends, strict=False)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the grid, in seconds."""
    with tempfile.TemporaryDirectory(prefix="bwlm-grid-") as folder:
        storage = Path(folder)
        run_grid(storage, "first", args.at_once, _FIRST_STEPS, args)
        step = statistics.median(cell.step_seconds for cell in trained(storage, "first"))
        steps = max(2, round(args.seconds / step))
        wall = run_grid(storage, "measured", args.cells, steps, args)
        cells = trained(storage, "measured")
    training = sum(cell.ended - cell.began for cell in cells)
    ideal = training / args.at_once
    between = pauses(cells, args.at_once)
    return {
        "cells": args.cells,
        "workers": args.workers,
        "steps": steps,
        "wall_seconds": wall,
        "ideal_seconds": ideal,
        "wall_over_ideal": wall / ideal,
        "seconds_a_cell": training / args.cells,
        "pause_seconds": statistics.median(between) if between else None,
        "longest_pause_seconds": max(between, default=None),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60, help="training of each cell")
    parser.add_argument("--workers", type=int, default=1, help="workers of each cell")
    parser.add_argument("--at-once", type=int, default=2, help="cells at a time")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--source", default="builtin:pydocs", help="text, as data.source of a grid")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.cells} cells of {found['seconds_a_cell']:.1f} s, {found['steps']} steps each")
    print(f"wall {found['wall_seconds']:.1f} s, ideal {found['ideal_seconds']:.1f} s: {found['wall_over_ideal']:.3f}")
    if found["pause_seconds"] is not None:
        print(f"from a cell's end to the next one's first step: {found['pause_seconds']:.1f} s (median)")


if __name__ == "__main__":
    main()
