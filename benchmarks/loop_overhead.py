"""What Ray's loop costs a step: `bwlm train`, against the same steps driven by nothing but a `for`, in turn.

    python benchmarks/loop_overhead.py [--rounds 3] [--steps 200] [--batch-tokens 2048]

The whole loop is Ray Data's stream, the trial's reports, the journal and MLflow's feeding; the bare one has the same
model, rows and threads, its batches made before the clock starts. Seconds a step are medians of what lies between the
ends of two steps.
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

from bwlm.record.journal import read_journal
from bwlm.record.lineage import ExperimentFolder

WARM = 5  # steps at the start that are left out
COMMAND = Path(sys.executable).parent / "bwlm"


def between(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in zip(ends[WARM:-2], ends[WARM + 1 : -1], strict=True))


def with_ray(storage: Path, name: str, arguments: argparse.Namespace) -> float:
    """Trains, and returns seconds a step from the journal's time stamps (milliseconds)."""
    settings = {
        "model.sequence_length": 512,
        "budget.steps": arguments.steps,
        "budget.batch_tokens": arguments.batch_tokens,
        "evaluation.every": 0,
        "evaluation.tokens": 4096,
        "checkpoint.every": 0,
        "resources.cpus_per_worker": os.cpu_count(),
    }
    command = [COMMAND, "train", "--direction", "forward", "--depth", "4", "--id", name, "--storage", storage]
    for field, value in settings.items():
        command += ["--set", f"{field}={value}"]
    subprocess.run(command, check=True, capture_output=True)
    return between([entry.time / 1000 for entry in read_journal(storage / name)])


def bare(folder: ExperimentFolder) -> float:
    import torch

    from bwlm.model.optim import build_optimizers
    from bwlm.model.step import TrainStep
    from bwlm.text.batches import DirectedPlan, open_rows
    from bwlm.text.direction import SpecialIds
    from bwlm.text.plan import RowPlan
    from bwlm.text.tokenizer import Tokenizer
    from bwlm.train.base import build_model, rows_per_step

    config = folder.config()
    torch.set_num_threads(config.compute.threads)
    model = build_model(config, torch.device("cpu"))
    step = TrainStep(model, build_optimizers(model), config.compute.micro_rows, config.experiment.optim.grad_clip)
    rows = RowPlan(len(open_rows(config.corpus, "train")), rows_per_step(config), config.experiment.seed)
    special = SpecialIds.of(Tokenizer.load(Path(config.tokenizer)))
    plan = DirectedPlan(config.corpus, "forward", special, rows)
    batches = [
        {name: torch.from_numpy(array).long() for name, array in batch.items()}
        for batch in plan.batches(0, config.steps)
    ]
    ends = []
    for batch in batches:
        step(batch["inputs"], batch["targets"])
        ends.append(time.perf_counter())
    return between(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return print(json.dumps(bare(ExperimentFolder(arguments.bare.parent, arguments.bare.name))))
    import bwlm.grid.session  # noqa: F401 - the allocator's settings, which Ray's workers get and the bare loop inherits

    with tempfile.TemporaryDirectory() as storage:
        ratios = []
        for number in range(arguments.rounds):
            name = f"round{number}"
            ray = with_ray(Path(storage), name, arguments)
            command = [sys.executable, __file__, "--bare", Path(storage) / name]
            alone = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            ratios.append(ray / alone)
            print(f"round {number + 1}: {1000 * ray:.1f} ms a step with Ray, {1000 * alone:.1f} ms bare")
        print(f"Ray's loop costs {statistics.median(ratios) - 1:+.1%} of a step (median of paired rounds)")
    return None


if __name__ == "__main__":
    main()
