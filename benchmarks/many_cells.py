"""Commands over a grid of a thousand cells: seconds of this build and of another checkout, in turns.

    python benchmarks/many_cells.py --demo STORAGE [--peer CHECKOUT] [--seeds 40] [--rounds 3] [--keep FOLDER]

STORAGE holds the finished grid of `make demo`. Its runs are copied to a grid of 24 cells for each seed: three
directions, two depths and four learning rates. A copy is a run as `bwlm grid run` leaves it, with its own id, settings
and digests; its losses differ from the original's by a few percent for each run, and a little for each segment.
The large files of all copies of a run are one file on the disk.

CHECKOUT is another checkout of bwlm with its own `.venv`. Both builds read the same storage. `first` is a command
that finds no summaries in the storage's cache, `again` the same command once more.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.paths import write_atomic, write_text
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import GRID_FILE, grid_folder, write_cells
from bwlm.record.journal import NAME, Entry, read_journal

GRID = "many"
DIRECTIONS, DEPTHS, RATES = ("forward", "backward", "bidirectional"), (1, 2), (1.0, 2.0, 4.0, 8.0)
_LARGE = ("*.h5", "checkpoints/*/*")
_MEASURED = ("loss", "bpb")
"""Words in the names of metrics that are losses."""


# ---- the storage ----


def copy_grid(
    demo: Path, storage: Path, seeds: int, rates: Sequence[float] = RATES, depths: Sequence[int] = DEPTHS
) -> list[str]:
    """Make the grid `many` of copies of the demo's finished runs; return the ids of its cells."""
    shutil.copytree(demo / "cache", storage / "cache")
    ids = []
    for direction, depth, rate, seed in product(DIRECTIONS, depths, rates, range(seeds)):
        name = f"{GRID}_{direction}_d{depth}_lr{rate:g}_s{seed}"
        copy_run(_original(demo, direction, depth, rate, seed), ExperimentFolder(storage, name), rate, seed)
        ids.append(name)
    write_cells(storage, GRID, ids)
    text = grid_text((demo / "grids" / "demo" / GRID_FILE).read_text("utf-8"), seeds, rates, depths)
    write_text(grid_folder(storage, GRID) / GRID_FILE, text)
    return ids


def grid_text(demo: str, seeds: int, rates: Sequence[float] = RATES, depths: Sequence[int] = DEPTHS) -> str:
    """Return the grid file of the copies, made from that of the demo."""
    axes = {"direction": list(DIRECTIONS), "depth": list(depths), "lr": list(rates), "seed": list(range(seeds))}
    kept = [line for line in demo.splitlines() if line.partition(":")[0] not in ("name", "axes", "also")]
    return "\n".join([f"name: {GRID}", f"axes: {json.dumps(axes)}", *kept, ""])


def _original(demo: Path, direction: str, depth: int, rate: float, seed: int) -> ExperimentFolder:
    """Return the demo's run of a direction and depth with the nearest learning rate, and one of its seeds."""
    nearest = min((2.0, 4.0, 8.0), key=lambda one: abs(np.log(one / rate)))
    return ExperimentFolder(demo, f"demo_{direction}_d{depth}_lr{nearest:g}_s{seed % 3 if depth == 1 else 0}")


def copy_run(original: ExperimentFolder, copy: ExperimentFolder, rate: float, seed: int) -> None:
    """Make a finished run of other losses, id, learning rate and seed."""
    rng = np.random.default_rng([*copy.id.encode()])
    factor = float(np.exp(rng.normal(0, 0.02)))
    config = original.config()
    changed = {"lr": rate, "seed": seed}
    corpus = copy.path.parent / Path(config.corpus).relative_to(original.path.parent)
    config = replace(
        config,
        id=copy.id,
        grid=GRID,
        experiment=config.experiment.model_copy(update=changed),
        identity=config.identity | changed,
        corpus=str(corpus),
    )
    copy.keep_tokenizer(Path(config.tokenizer))
    copy.create(config)
    for pattern in _LARGE:
        for path in original.path.glob(pattern):
            _link(path, copy.path / path.relative_to(original.path))
    lines = [Entry(one.step, one.time, _scaled(one.metrics, factor)).line() for one in read_journal(original.path)]
    write_atomic(copy.path / NAME, b"".join(lines))
    for path in original.path.glob("evaluations/*/*/validation.parquet"):
        _copy_losses(path, copy.path / path.relative_to(original.path), factor, rng)
    shutil.copyfile(original.path / "lease.json", copy.path / "lease.json")
    status = original.status()
    copy.finish(Status("finished", "", status.step, _scaled(status.metrics, factor)))


def _scaled(metrics: dict[str, float], factor: float) -> dict[str, float]:
    return {
        name: value * factor if any(word in name for word in _MEASURED) else value for name, value in metrics.items()
    }


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:  # another file system
        shutil.copyfile(path, to)


def _copy_losses(path: Path, to: Path, factor: float, rng: np.random.Generator) -> None:
    to.parent.mkdir(parents=True)
    table = pq.read_table(path)
    place = table.schema.get_field_index("nll")
    losses = table["nll"].to_numpy() * factor * np.exp(rng.normal(0, 0.01, len(table)))
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(losses, table.schema.field(place).type)), to
    )
    shutil.copyfile(path.with_suffix(".json"), to.with_suffix(".json"))
