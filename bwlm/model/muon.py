"""Muon with all matrices of one shape in one batched product, in the precision of the model.

torch's own Muon takes one matrix at a time, always in bfloat16. On a GPU its launches take 1.8 to 7 times as long as
the products. A CPU that only emulates bfloat16 takes up to 18 times as long as in float32 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# quintic Newton-Schulz, steepest at zero: singular values end between 0.7 and 1.2 instead of at 1
# (Jordan et al., https://kellerjordan.github.io/posts/muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
STRETCHES = (2, 2, 1)
"""Iterations for a wide matrix between two fresh products of its rows: rounding errors grow inside a stretch."""
_EPS = 1e-7

_MOST_ELEMENTS = 2**26
"""Most elements of one product. Its temporary tensors are some times as large; larger matrices fill a GPU alone."""


class Muon(torch.optim.Muon):
    """Muon with torch's update and state.

    Heavy-ball momentum with Nesterov's look-ahead, orthogonalized, and decoupled weight decay.
    """

    def __init__(self, group: dict[str, Any], weight_decay: float, precision: torch.dtype) -> None:
        """Make the optimizer of a parameter `group` of matrices, as torch takes it; `precision` is its dtype.

        Only the orthogonalization runs in that dtype.
        """
        # 'original' scales a matrix's update by sqrt(max(1, rows / columns)), as nanochat's Muon does
        super().__init__([group], momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="original")
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for matrices in _batches([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix)) for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        updates = orthogonalize(ahead.to(self._precision)).to(ahead.dtype)
        rows, columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] with about orthonormal rows or columns, near the given ones, in their precision."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    x = _iterated_by_gram(x) if x.size(-1) >= 2 * x.size(-2) else _iterated(x)
    return x.mT if tall else x


def _iterated(x: Tensor) -> Tensor:
    """Iterate x <- (a + b G + c G^2) x with G = x x^T, for [K, M, N]."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterated_by_gram(x: Tensor) -> Tensor:
    """Return the same as `_iterated`, mostly by products of [M, M]: a fifth less work where N is four times M.

    The polynomial P of G commutes with G, so the next G is P G P, and the next x is a product of these P and x
    (Zhang, Amsel, Chen and Dao, Gram Newton-Schulz, https://dao-lab.ai/blog/2026/gram-newton-schulz).
    """
    a, b, c = COEFFICIENTS
    for iterations in STRETCHES:
        gram, whole = x @ x.mT, None
        for left in reversed(range(iterations)):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P without the a on its diagonal
            whole = _plus_diagonal(p, a) if whole is None else torch.baddbmm(whole, p, whole, beta=a)
            if left:
                half = torch.baddbmm(gram, p, gram, beta=a)
                gram = torch.baddbmm(half, half, p, beta=a)
        assert whole is not None
        x = whole @ x
    return x


def _plus_diagonal(matrices: Tensor, value: float) -> Tensor:
    out = matrices.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(value)
    return out


def _batches(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield matrices of one shape together, in their order, at most _MOST_ELEMENTS elements at a time."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for alike in by_shape.values():
        most = max(1, _MOST_ELEMENTS // alike[0].numel())
        yield from (alike[start : start + most] for start in range(0, len(alike), most))
