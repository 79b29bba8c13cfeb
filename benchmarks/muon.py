"""Milliseconds of a Muon update by depth, in turn: torch.optim.Muon, bwlm's in bfloat16 and bwlm's in float32.

    python benchmarks/muon.py [--threads 2] [--depths 1,2,4,6]     # on a GPU where there is one

ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2 show a CPU that only emulates bfloat16. Run with the MALLOC_
settings of benchmarks/train_step.py to see it as the workers of a grid do. Needs torch alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.model.muon import Muon

ROUNDS = 15


def matrices(depth: int, device: torch.device) -> list[torch.Tensor]:
    width = 64 * depth
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    made = [torch.randn(shape, device=device).requires_grad_() for _ in range(depth) for shape in shapes]
    for matrix in made:
        matrix.grad = torch.randn_like(matrix)
    return made


def seconds_of(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    optimizer.step()
    wait()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--depths", default="1,2,4,6")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for depth in map(int, arguments.depths.split(",")):
        optimizers: dict[str, torch.optim.Optimizer] = {
            "torch": torch.optim.Muon(matrices(depth, device), lr=0.02, adjust_lr_fn="original"),
            "bfloat16": Muon({"params": matrices(depth, device), "lr": 0.02}, 0.1, torch.bfloat16),
            "float32": Muon({"params": matrices(depth, device), "lr": 0.02}, 0.1, torch.float32),
        }
        seconds: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(ROUNDS):
            for name, optimizer in optimizers.items():
                seconds[name].append(seconds_of(optimizer, device))
        torchs = seconds["torch"][2:]
        told = [f"torch {1000 * statistics.median(torchs):.1f} ms"]
        for name in ("bfloat16", "float32"):
            own = seconds[name][2:]
            ratio = statistics.median(theirs / mine for theirs, mine in zip(torchs, own, strict=True))
            told.append(f"{name} {1000 * statistics.median(own):.1f} ms ({ratio:.2f} times as fast)")
        print(f"depth {depth}: {', '.join(told)}")


if __name__ == "__main__":
    main()
