"""What Ray's loop costs a step: `bwlm train`, against the same steps driven by nothing but a `for`, in turn.

    python benchmarks/loop_overhead.py [--rounds 3] [--steps 200] [--batch-tokens 4096] [--threads N]
    python benchmarks/loop_overhead.py --depth 12 --time 2048 --batch-tokens 131072 --steps 40      # on a GPU

The whole loop is Ray Data's stream, the trial's reports, the journal and MLflow's feeding; the bare one has the same
model, rows and threads, its batches made before the clock starts. It runs twice: beside an idle cluster like the one
that the whole loop has, which leaves what the loop costs, and alone, which adds what Ray's own processes take from a
machine whose cores all train. Seconds a step are the mean of the middle 80 %, since a report and a block of data come
only every so many steps and must count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bwlm.config import ResourceSettings
from bwlm.grid.cluster import cluster  # also sets the allocator, for Ray's workers and for the bare loop alike
from bwlm.record.journal import read_journal
from bwlm.record.lineage import ExperimentFolder

WARM = 5  # steps at the start that are left out
SETTLE = 5.0  # seconds in which a new cluster starts its processes
COMMAND = Path(sys.executable).parent / "bwlm"


def between(ends: list[float]) -> float:
    seconds = sorted(b - a for a, b in zip(ends[WARM:-2], ends[WARM + 1 : -1], strict=True))
    tail = len(seconds) // 10
    return statistics.mean(seconds[tail : len(seconds) - tail])


def with_ray(storage: Path, name: str, arguments: argparse.Namespace) -> float:
    """Trains, and returns seconds a step from the journal's time stamps (milliseconds)."""
    settings = {
        "model.sequence_length": arguments.time,
        "budget.steps": arguments.steps,
        "budget.batch_tokens": arguments.batch_tokens,
        "evaluation.every": 0,
        "evaluation.tokens": arguments.batch_tokens,
        "checkpoint.every": 0,
        "resources.cpus_per_worker": arguments.threads,
    }
    depth = str(arguments.depth)
    command = [COMMAND, "train", "--direction", "forward", "--depth", depth, "--id", name, "--storage", storage]
    for field, value in settings.items():
        command += ["--set", f"{field}={value}"]
    subprocess.run(command, check=True, capture_output=True)
    return between([entry.time / 1000 for entry in read_journal(storage / name)])


def bare(folder: ExperimentFolder) -> float:
    import torch

    from bwlm.model.optim import build_optimizer
    from bwlm.model.step import TrainStep
    from bwlm.text.batches import DirectedPlan, open_rows
    from bwlm.text.direction import SpecialIds
    from bwlm.text.plan import RowPlan
    from bwlm.text.tokenizer import Tokenizer
    from bwlm.train.packed import build_model, rows_per_step

    config = folder.config()
    torch.set_num_threads(config.compute.threads)
    device = torch.device("cuda" if config.experiment.resources.gpus_per_worker else "cpu")
    model = build_model(config, device)
    step = TrainStep(model, build_optimizer(model), config.compute.micro_rows, config.experiment.optim.grad_clip)
    rows = RowPlan(len(open_rows(config.corpus, "train")), rows_per_step(config), config.experiment.seed)
    special = SpecialIds.of(Tokenizer.load(Path(config.tokenizer)))
    plan = DirectedPlan(config.corpus, "forward", special, rows)
    batches = [
        {name: torch.from_numpy(array).long() for name, array in batch.items()}
        for batch in plan.batches(0, config.steps)
    ]
    ends = []
    for batch in batches:
        step(batch["inputs"].to(device), batch["targets"].to(device))
        ends.append(time.perf_counter())
    return between(ends)


def beside_ray(folder: Path, threads: int) -> float:
    with cluster([ResourceSettings(cpus_per_worker=threads)], None, 1):
        time.sleep(SETTLE)
        return alone(folder)


def alone(folder: Path) -> float:
    command = [sys.executable, __file__, "--bare", folder]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return print(json.dumps(bare(ExperimentFolder(arguments.bare.parent, arguments.bare.name))))
    with tempfile.TemporaryDirectory() as storage:
        loop, processes = [], []
        for number in range(arguments.rounds):
            name = f"round{number}"
            whole = with_ray(Path(storage), name, arguments)
            beside = beside_ray(Path(storage) / name, arguments.threads)
            bare_seconds = alone(Path(storage) / name)
            loop.append(whole / beside - 1)
            processes.append(beside / bare_seconds - 1)
            print(
                f"round {number + 1}: {1000 * whole:.1f} ms a step with Ray, {1000 * beside:.1f} ms bare beside an "
                f"idle cluster, {1000 * bare_seconds:.1f} ms bare",
                flush=True,
            )
    print(f"the loop costs {statistics.median(loop):+.1%} of a step (median of paired rounds)")
    print(f"Ray's idle processes cost {statistics.median(processes):+.1%}")
    return None


if __name__ == "__main__":
    main()
