"""Commands over a grid of a thousand cells: seconds of this build and of another checkout, in turns.

    python benchmarks/many_cells.py --source STORAGE [--peer CHECKOUT] [--cells 960] [--rounds 3] [--json]

STORAGE holds a finished grid, by default that of `make demo`. Its runs are copied to a grid of four learning rates and
as many seeds as make `--cells`. A copy is a run as `bwlm grid run` leaves it, with its own id, settings and digests;
its losses differ from the original's by a few percent for each run, and a little for each segment. The large files of
all copies of a run are one file on the disk.

CHECKOUT is another checkout of bwlm with its own `.venv`. Both builds read the same storage. `first` is a command that
finds nothing in the storage's cache, `again` the same command once more. A tick is one look of the launch at all runs
for what MLflow does not have yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.paths import write_atomic, write_text
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import GRID_FILE, cells_of, grid_folder, write_cells
from bwlm.record.journal import NAME, Entry, read_journal

GRID = "many"
RATES = (1.0, 2.0, 4.0, 8.0)
ROOT = Path(__file__).parent.parent
COMMANDS = {
    "analyze gap": ["analyze", "gap", GRID],
    "analyze compare": ["analyze", "compare", GRID],
    "runs list": ["runs", "list"],
    "grid status": ["grid", "status", GRID],
    "grid plan, all finished": ["grid", "plan", GRID],
    "grid plan, all to do": ["grid", "plan", GRID, "--set", "name=another"],
}
_LARGE = ("*.h5", "checkpoints/*/*")
_MEASURED = ("loss", "bpb")
"""Words in the names of metrics that are losses."""
_CACHES = ("files-*", "losses-*", "curves-*", "results-*")


# ---- the storage ----


def copy_grid(source: Path, grid: str, storage: Path, cells: int, rates: tuple[float, ...] = RATES) -> list[str]:
    """Make the grid `many` of about so many copies of a finished grid's runs; return the ids of its cells."""
    if (source / "cache").exists():
        shutil.copytree(source / "cache", storage / "cache")
    originals = [ExperimentFolder(source, run) for run in cells_of(source, grid)]
    settings = [(folder, folder.config().experiment) for folder in originals]
    kinds: dict[tuple[str, int], list[tuple[float, ExperimentFolder]]] = {}
    for folder, experiment in settings:
        kinds.setdefault((experiment.direction, experiment.depth), []).append((experiment.lr, folder))
    seeds = max(1, cells // (len(kinds) * len(rates)))
    ids = []
    for ((direction, depth), runs), rate, seed in product(kinds.items(), rates, range(seeds)):
        nearest = min((lr for lr, _ in runs), key=lambda lr: abs(np.log(lr / rate)))
        alike = [folder for lr, folder in runs if lr == nearest]
        copy = ExperimentFolder(storage, f"{GRID}_{direction}_d{depth}_lr{rate:g}_s{seed}")
        copy_run(alike[seed % len(alike)], copy, rate, seed)
        ids.append(copy.id)
    write_cells(storage, GRID, ids)
    if (file := grid_folder(source, grid) / GRID_FILE).exists():
        axes = {"direction": list(dict.fromkeys(d for d, _ in kinds)), "depth": sorted({depth for _, depth in kinds})}
        axes |= {"lr": list(rates), "seed": list(range(seeds))}
        kept = [line for line in file.read_text("utf-8").splitlines() if line.partition(":")[0] not in _OF_THE_COPY]
        text = "\n".join([f"name: {GRID}", f"axes: {json.dumps(axes)}", *kept, ""])
        write_text(grid_folder(storage, GRID) / GRID_FILE, text)
    return ids


_OF_THE_COPY = ("name", "axes", "also")


def copy_run(original: ExperimentFolder, copy: ExperimentFolder, rate: float, seed: int) -> None:
    """Make a finished run of other losses, id, learning rate and seed."""
    rng = np.random.default_rng([*copy.id.encode()])
    factor = float(np.exp(rng.normal(0, 0.02)))
    config = original.config()
    changed = {"lr": rate, "seed": seed}
    corpus, home = Path(config.corpus), original.path.parent
    config = replace(
        config,
        id=copy.id,
        grid=GRID,
        experiment=config.experiment.model_copy(update=changed),
        identity=config.identity | changed,
        corpus=str(copy.path.parent / corpus.relative_to(home) if corpus.is_relative_to(home) else corpus),
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
    if (lease := original.path / "lease.json").exists():
        shutil.copyfile(lease, copy.path / lease.name)
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


# ---- the commands ----


def run_command(build: Path, storage: Path, words: list[str]) -> tuple[float, float]:
    """Run `bwlm` of a checkout; return the seconds that it took, and the megabytes that it held at most."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment = kept | {"BWLM_STORAGE": str(storage)}
    program = build / ".venv" / "bin" / "bwlm"
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([program, *words], env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            errors.seek(0)
            raise SystemExit(f"bwlm {' '.join(words)} failed:\n{errors.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def measure(storage: Path, peer: Path | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the seconds of each command, of all builds in turns: the median of the rounds."""
    for name, words in COMMANDS.items():
        found: dict[str, list[tuple[float, float]]] = {"first": [], "again": [], "peer": []}
        for _ in range(rounds):
            for pattern in _CACHES:
                for folder in (storage / "cache").glob(pattern):
                    shutil.rmtree(folder)
            found["first"].append(run_command(ROOT, storage, words))
            found["again"].append(run_command(ROOT, storage, words))
            if peer is not None:
                found["peer"].append(run_command(peer, storage, words))
        seconds = {kind: statistics.median(one for one, _ in of) for kind, of in found.items() if of}
        memory = {kind: statistics.median(one for _, one in of) for kind, of in found.items() if of}
        yield {"command": name, **seconds, "megabytes": memory["again"], "megabytes of the peer": memory.get("peer")}


# ---- the launch's own work ----


def deliver(storage: Path, ticks: int = 20) -> dict[str, float]:
    """Feed a new MLflow store from all runs, then look at them again: seconds, and how the memory grows."""
    from bwlm.record.mlflow_store import sqlite_uri
    from bwlm.record.mlflow_view import GridSettings
    from bwlm.record.tracking import Tracking

    folders = [ExperimentFolder(storage, run) for run in cells_of(storage, GRID)]
    tracking = Tracking(sqlite_uri(storage / "mlflow.db"), storage)
    parent = tracking.parent_run(grid_folder(storage, GRID), GRID, "", GridSettings(len(folders), {}, {}))
    for folder in folders:
        tracking.expect(folder, parent, {"name": "text", "digest": "0", "source": "text"})
    feed = _seconds(lambda: [tracking.deliver(folder) for folder in folders])
    first = _seconds(lambda: [tracking.deliver(folder) for folder in folders])
    before = psutil.Process().memory_info().rss
    times = [_seconds(lambda: [tracking.deliver(folder) for folder in folders]) for _ in range(ticks)]
    grown = psutil.Process().memory_info().rss - before
    return {"feed": feed, "first tick": first, "tick": statistics.median(times), "grown megabytes": grown / 2**20}


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def deliver_with(build: Path, storage: Path) -> dict[str, float]:
    """Return `deliver` by the code of a checkout, on runs that no store has."""
    for path in (*storage.glob("mlflow.db*"), *storage.glob("*/mlflow.json"), *storage.glob("grids/*/mlflow.json")):
        path.unlink()
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from benchmarks.many_cells import *; "
    code += f"print(json.dumps(deliver(Path({str(storage)!r}))))"
    done = subprocess.run(
        [build / ".venv" / "bin" / "python", "-c", f"import bwlm; {code}"], cwd=build, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="storage of a finished grid")
    parser.add_argument("--grid", default="demo", help="its name")
    parser.add_argument("--peer", type=Path, help="checkout to compare with")
    parser.add_argument("--cells", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.source.absolute().parent) as folder:
        storage = Path(folder) / "runs"
        cells = len(copy_grid(arguments.source.absolute(), arguments.grid, storage, arguments.cells))
        time.sleep(3)  # files that changed a moment ago are read again the next time
        rows = list(measure(storage, arguments.peer, arguments.rounds))
        report, _ = run_command(ROOT, storage, ["analyze", "report", GRID])
        page = (grid_folder(storage, GRID) / "RESEARCH_REPORT.html").stat().st_size
        ticks = {"this build": deliver_with(ROOT, storage)}
        ticks |= {"peer": deliver_with(arguments.peer, storage)} if arguments.peer else {}
    found = {"cells": cells, "commands": rows, "report": {"seconds": report, "bytes": page}, "mlflow": ticks}
    print(json.dumps(found, indent=1) if arguments.json else shown(found))


def shown(found: dict[str, Any]) -> str:
    """Return the figures as people read them."""
    lines = [
        f"{found['cells']} cells; seconds",
        f"{'':28}{'first':>8}{'again':>8}{'peer':>8}{'peer/first':>12}{'MB':>7}",
    ]
    for row in found["commands"]:
        peer = f"{row['peer']:8.2f}{row['peer'] / row['first']:12.1f}" if "peer" in row else f"{'–':>8}{'–':>12}"
        lines.append(f"{row['command']:28}{row['first']:8.2f}{row['again']:8.2f}{peer}{row['megabytes']:7.0f}")
    lines.append(f"report: {found['report']['seconds']:.0f} s, page of {found['report']['bytes'] / 1e6:.1f} MB")
    for build, of in found["mlflow"].items():
        figures = ", ".join(f"{name} {value:.3g}" for name, value in of.items())
        lines.append(f"MLflow, {build}: {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
