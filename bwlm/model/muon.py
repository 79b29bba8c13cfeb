"""Muon by the precision of the model: torch's own always orthogonalizes in bfloat16, whatever the hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# quintic Newton-Schulz, steepest at zero: singular values end between 0.7 and 1.2 instead of at 1
# (Jordan et al., https://kellerjordan.github.io/posts/muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_EPS = 1e-7


class Float32Muon(torch.optim.Muon):
    """torch's update, orthogonalized in float32, as nanochat's is where it computes in float32.

    A CPU that only emulates bfloat16 takes up to 18 times as long for torch's (benchmarks/RESULTS.md).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                if "momentum_buffer" not in (state := self.state[matrix]):
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                buffer = state["momentum_buffer"]
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(buffer, group["momentum"]))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """[M, N] to about the nearest matrix with orthonormal rows or columns, in the precision that it has."""
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(_EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def build_muon(group: dict[str, Any], weight_decay: float, precision: torch.dtype) -> torch.optim.Muon:
    """Muon of one group of matrices for a model that computes in `precision`."""
    kind = Float32Muon if precision == torch.float32 else torch.optim.Muon
    # 'original' scales a matrix's update by sqrt(max(1, rows / columns)), as nanochat's Muon does
    return kind(
        [group],
        momentum=0.95,
        nesterov=True,
        ns_coefficients=COEFFICIENTS,
        ns_steps=ITERATIONS,
        eps=_EPS,
        weight_decay=weight_decay,
        adjust_lr_fn="original",
    )
