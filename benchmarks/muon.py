"""Milliseconds of a Muon update by depth, in turn: torch.optim.Muon, one that batches, and bwlm's in float32.

    python benchmarks/muon.py [--threads 2] [--depths 1,2,4,6]

torch's is used where a model computes in bfloat16, the float32 one where it does not: ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2 show a CPU that only emulates bfloat16.

Run with the MALLOC_ settings of benchmarks/train_step.py to see it as the workers of a grid do. It says how much a
Muon of our own would save (benchmarks/RESULTS.md: too little).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bwlm.model.muon import COEFFICIENTS, ITERATIONS, build_muon

ROUNDS = 15

_EPS = 1e-7


def orthogonalize(x: Tensor) -> Tensor:
    """[.., M, N] to about the nearest matrices with orthonormal rows or columns, bfloat16."""
    x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon's update with all matrices of one shape in one batched product."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        """`params` are matrices, or groups of them."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self.state[m].setdefault("momentum_buffer", torch.zeros_like(m)) for m in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        updates = orthogonalize(torch.stack(ahead)).float()
        rows, columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, updates.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)


def matrices(depth: int) -> list[torch.Tensor]:
    width = 64 * depth
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    made = [torch.randn(shape).requires_grad_() for _ in range(depth) for shape in shapes]
    for matrix in made:
        matrix.grad = torch.randn_like(matrix)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--depths", default="1,2,4,6")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for depth in map(int, arguments.depths.split(",")):
        group = {"params": matrices(depth), "lr": 0.02}
        optimizers = {
            "torch": torch.optim.Muon(matrices(depth), lr=0.02, weight_decay=0.0, adjust_lr_fn="original"),
            "batched": BatchedMuon(matrices(depth), lr=0.02),
            "float32": build_muon(group, 0.0, torch.float32),
        }
        seconds: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(ROUNDS):
            for name, optimizer in optimizers.items():
                began = time.perf_counter()
                optimizer.step()
                seconds[name].append(time.perf_counter() - began)
        torchs = seconds["torch"][2:]
        told = [f"torch {1000 * statistics.median(torchs):.1f} ms"]
        for name in ("batched", "float32"):
            own = seconds[name][2:]
            ratio = statistics.median(theirs / mine for theirs, mine in zip(torchs, own, strict=True))
            told.append(f"{name} {1000 * statistics.median(own):.1f} ms ({ratio:.2f} times as fast)")
        print(f"depth {depth}: {', '.join(told)}")


if __name__ == "__main__":
    main()
