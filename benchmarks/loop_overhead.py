"""What Ray's loop costs a step: `bwlm train`, against the same steps driven by nothing but a `for`, in turns.

    python benchmarks/loop_overhead.py [--steps 200] [--seconds 6] [--batch-tokens 4096] [--threads N]
    python benchmarks/loop_overhead.py --depth 12 --time 2048 --batch-tokens 131072     # on a GPU

The whole loop is Ray Data's stream, the trial's reports, the journal and MLflow's feeding; the bare one has the same
model, rows and threads, its batches made before the clock starts. Both are alive all the time and take turns of a few
seconds in which the other is stopped (SIGSTOP), since a shared machine's speed drifts by more than what is measured.

The bare loop runs beside an idle cluster, of which everything goes on but what the whole loop adds: this leaves what
the loop costs. In turns of its own it runs alone: this adds what an idle cluster takes from a machine whose cores all
train. Of the steps that lie within a turn, seconds are the mean of the middle 80 %.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import psutil

from bwlm.cluster.environment import prepare_environment
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal

prepare_environment()  # the allocator, for Ray's workers and for the bare loop alike

WARM = 5  # steps at the start that are left out
NAME = "whole"
COMMAND = Path(sys.executable).parent / "bwlm"
IDLE_CLUSTER = ("gcs_server", "raylet", "dashboard", "monitor.py", "Agent")
"""Words in the command lines of the processes that a cluster without work has."""

Turns = list[tuple[float, float]]
"""(first, last) seconds since the epoch."""


@contextlib.contextmanager
def whole_loop(storage: Path, arguments: argparse.Namespace) -> Iterator[psutil.Process]:
    """`bwlm train` for as many steps as it can need, of which the turns take a part."""
    settings = {
        "model.sequence_length": arguments.time,
        "budget.steps": 3 * arguments.steps,
        "budget.batch_tokens": arguments.batch_tokens,
        "evaluation.every": 0,
        "evaluation.tokens": arguments.batch_tokens,
        "checkpoint.every": 0,
        "resources.cpus_per_worker": arguments.threads,
        "compute.compile": "false",
    }
    command = [COMMAND, "train", "--direction", "forward", "--depth", str(arguments.depth), "--id", NAME]
    command += ["--storage", storage]
    for field, value in settings.items():
        command += ["--set", f"{field}={value}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launch:
        while len(ends_of_whole(storage)) <= WARM:
            if launch.poll() is not None:
                raise SystemExit(f"bwlm train ended with {launch.returncode}:\n{launch.communicate()[1]}")
            time.sleep(0.2)
        try:
            yield psutil.Process(launch.pid)
        finally:
            launch.terminate()


@contextlib.contextmanager
def bare_loop(storage: Path, output: Path) -> Iterator[psutil.Process]:
    """The same steps in a process of its own, stopped once its first ones are done."""
    with output.open("w") as file, subprocess.Popen([sys.executable, __file__, "--bare", storage], stdout=file) as loop:
        try:
            while len(ends_of_bare(output)) <= WARM:
                if loop.poll() is not None:
                    raise SystemExit(f"the bare loop ended with {loop.returncode}")
                time.sleep(0.2)
            loop.send_signal(signal.SIGSTOP)
            yield psutil.Process(loop.pid)
        finally:
            loop.kill()


def run_bare(folder: ExperimentFolder) -> None:
    """Trains until it is killed; prints when each step ended."""
    import torch

    from bwlm.model.optim import build_optimizer
    from bwlm.model.train_step import TrainStep
    from bwlm.text.batches import DirectedPlan, open_rows
    from bwlm.text.direction import SpecialIds
    from bwlm.text.plan import RowPlan
    from bwlm.text.tokenizer import Tokenizer
    from bwlm.train.packed_phase import build_model, rows_per_step

    config = folder.config()
    torch.set_num_threads(config.compute.threads)
    device = torch.device("cuda" if config.experiment.resources.gpus_per_worker else "cpu")
    model = build_model(config, device)
    step = TrainStep(model, build_optimizer(model), config.compute.micro_rows, config.experiment.optim.grad_clip)
    rows = RowPlan(len(open_rows(config.corpus, "train")), rows_per_step(config), config.experiment.seed)
    special = SpecialIds.from_tokenizer(Tokenizer.load(Path(config.tokenizer)))
    plan = DirectedPlan(config.corpus, "forward", special, rows)
    batches = [
        {name: torch.from_numpy(array).long() for name, array in batch.items()}
        for batch in plan.batches(0, min(config.steps, 100))
    ]
    for batch in cycle(batches):
        step(batch["inputs"].to(device), batch["targets"].to(device))
        print(time.time(), flush=True)


def ends_of_whole(storage: Path) -> list[float]:
    """Seconds since the epoch, from the journal's milliseconds."""
    return [entry.time / 1000 for entry in read_journal(storage / NAME)]


def ends_of_bare(output: Path) -> list[float]:
    return [float(line) for line in output.read_text().splitlines()]


def cluster_and_loop(launch: psutil.Process) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The processes that an idle cluster has as well, and what the loop adds: driver, trial, Ray Data's workers."""
    cluster, loop = [], [launch]
    for process in launch.children(recursive=True):
        words = " ".join(process.cmdline())
        (cluster if any(word in words for word in IDLE_CLUSTER) else loop).append(process)
    return cluster, loop


def let_run(running: list[psutil.Process], everything: list[psutil.Process]) -> None:
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT if process in running else signal.SIGSTOP)


def steps_within(turns: Turns, ends: list[float]) -> list[float]:
    """Seconds of the steps that began and ended within one turn."""
    steps = list(zip(ends[WARM:], ends[WARM + 1 :], strict=False))
    return [after - before for before, after in steps if any(a <= before and after <= b for a, b in turns)]


def middle(seconds: list[float]) -> float:
    tail = len(seconds) // 10
    return statistics.mean(sorted(seconds)[tail : len(seconds) - tail])


def measure(arguments: argparse.Namespace, storage: Path) -> dict[str, list[float]]:
    """Seconds of at least `--steps` steps of each kind."""
    output = storage / "bare.txt"
    with whole_loop(storage, arguments) as launch, contextlib.ExitStack() as later:
        cluster, loop = cluster_and_loop(launch)
        let_run(cluster, loop)
        bare = later.enter_context(bare_loop(storage, output))
        everything = [*cluster, *loop, bare]
        kinds = {"with Ray": [*cluster, *loop], "bare beside an idle cluster": [*cluster, bare], "bare": [bare]}
        turns: dict[str, Turns] = {kind: [] for kind in kinds}
        found: dict[str, list[float]] = {}
        try:
            while not found or min(map(len, found.values())) < arguments.steps:
                for kind, running in kinds.items():
                    let_run(running, everything)
                    began = time.time()
                    time.sleep(arguments.seconds)
                    turns[kind].append((began, time.time()))
                ends = dict.fromkeys(kinds, ends_of_bare(output)) | {"with Ray": ends_of_whole(storage)}
                found = {kind: steps_within(turns[kind], ends[kind]) for kind in kinds}
                assert not steps_within(turns["with Ray"], ends["bare"]), "the bare loop was not stopped"
                assert not steps_within(turns["bare"], ends["with Ray"]), "the whole loop was not stopped"
        finally:
            let_run(everything, everything)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each loop, at least")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return run_bare(ExperimentFolder(arguments.bare, NAME))
    with tempfile.TemporaryDirectory() as storage:
        found = measure(arguments, Path(storage))
    for kind, seconds in found.items():
        print(f"{kind}: {1000 * middle(seconds):.1f} ms a step ({len(seconds)} steps)")
    with_ray, beside, alone = (middle(seconds) for seconds in found.values())
    print(f"the loop costs {with_ray / beside - 1:+.1%} of a step, an idle cluster {beside / alone - 1:+.1%}")
    return None


if __name__ == "__main__":
    main()
