"""Tokens per second of a training step whose attention stays inside segments, against one that knows no segments.

    python benchmarks/document_mask.py [--json]                     # depth 4, T=2048, 4 rows, eager and compiled
    python benchmarks/document_mask.py --time 512 --rows 8
    python benchmarks/document_mask.py --depth 12 --rows 16 --vocab 32768 --modes compiled      # a GPU

All cases train one model in one process and take turns, step by step, so that a machine that slows down slows all of
them. Every step has other segments, as a corpus has; `compiled_anew` counts what the timed steps made torch compile. A
ratio is of the fastest steps, since whatever disturbs a step makes it slower. FLOPs are nominal in every case (all T
keys for each query), so the shares of the floor tell speeds and not work. Needs torch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from train_step import KEEP_MEMORY, Shape, Variant, bwlm_step, segments_of

from bwlm.model.compute import look_at_hardware
from bwlm.model.shape import flops_per_token

DOCUMENTS = {"unmasked": 0, "one document a row": 10**9, "documents of 500": 500, "documents of 50": 50}
"""Tokens of a document by case; 0: no mask."""
WARM_UP = 2  # rounds


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(mode: str, shape: Shape, rounds: int, seconds: float) -> dict[str, object]:
    """Steps of all cases in turn, for so many rounds or seconds."""
    torch.set_num_threads(shape.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = bwlm_step(Variant("bwlm", compile=mode == "compiled", keep_memory=True), shape, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.time + 1), generator=generator).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    took: dict[str, list[float]] = {case: [] for case in DOCUMENTS}
    began, compiled = time.perf_counter(), 0
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            began, compiled = time.perf_counter(), compiled_graphs()
        for case, length in DOCUMENTS.items():
            segments = segments_of(length, shape, generator).to(device) if length else None
            start = time.perf_counter()
            step(inputs, targets, segments)  # reads the loss, so that a GPU has ended too
            took[case].append(time.perf_counter() - start)
        if number >= WARM_UP and time.perf_counter() - began > seconds:
            break
    timed = {case: times[WARM_UP:] for case, times in took.items()}
    _, floor = look_at_hardware("cuda" if device.type == "cuda" else "cpu", shape.threads)
    flops = flops_per_token(shape.config)
    best = min(timed["unmasked"])
    return {
        "mode": mode,
        "compiled_anew": compiled_graphs() - compiled,
        "rounds": len(timed["unmasked"]),
        "cases": [
            {
                "case": case,
                "tokens_per_second": shape.tokens / statistics.median(times),
                "best": shape.tokens / min(times),
                "floor_share": shape.tokens / statistics.median(times) * flops / floor,
                "speed_to_unmasked": best / min(times),
            }
            for case, times in timed.items()
        ],
    }


def run_apart(mode: str, shape: Shape, arguments: argparse.Namespace) -> dict[str, object]:
    """One mode in a process of its own, with memory kept as workers keep it."""
    environment = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(shape.threads)}
    command = [sys.executable, __file__, "--one", mode, "--shape", json.dumps(asdict(shape))]
    command += ["--rounds", str(arguments.rounds), "--seconds", str(arguments.seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{mode}: failed, see above")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--modes", default="eager,compiled", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each case, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="no round begins after so many, in a mode")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape = Shape(**json.loads(arguments.shape))
        return print(json.dumps(measure(arguments.one, shape, arguments.rounds, arguments.seconds)))
    shape = Shape(arguments.depth, arguments.time, arguments.rows, arguments.vocab, arguments.threads)
    found = [run_apart(mode, shape, arguments) for mode in arguments.modes.split(",")]
    if arguments.json:
        return print(json.dumps({"shape": asdict(shape), "modes": found}, indent=2))
    for one in found:
        print(f"{one['mode']}, {one['rounds']} rounds, {one['compiled_anew']} graphs compiled in them")
        for row in one["cases"]:  # type: ignore[attr-defined]
            print(
                f"  {row['case']:20} {row['tokens_per_second']:9,.0f} tokens/s, best {row['best']:9,.0f}, "
                f"{row['floor_share']:4.0%} of the floor, {row['speed_to_unmasked']:.3f} times unmasked"
            )
    return None


if __name__ == "__main__":
    main()
