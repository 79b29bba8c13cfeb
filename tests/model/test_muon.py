"""Muon in batches: the update of torch's, which takes one matrix at a time, in either precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bwlm.model import muon
from bwlm.model.muon import Muon, orthogonalize

SHAPES = [(24, 24), (48, 12), (12, 48)]


def random(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.stack([random(shape, seed) * 10**seed for seed in range(3)])
    for matrix, orthogonal in zip(matrices, orthogonalize(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = u.T @ orthogonal @ v.T
        values = found.diagonal()
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (found - torch.diag(values)).abs().max() < 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_wide_matrices_end_where_the_plain_iteration_ends(decay: float) -> None:
    """Whatever the spectrum: in float32 the same, in bfloat16 about as near to that as the plain one."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 64, 256
    u, v = (torch.linalg.qr(torch.randn(4, size, rows, generator=generator))[0] for size in (rows, columns))
    values = torch.arange(1.0, rows + 1) ** -decay
    wide = (u * (values / values.norm())) @ v.mT
    exact = muon._iterated(wide.double())
    assert (muon._iterated_by_gram(wide) - exact).norm() < 1e-4 * exact.norm()
    assert (orthogonalize(wide) == muon._iterated_by_gram(wide / wide.norm(dim=(-2, -1), keepdim=True))).all()

    def off(found: Tensor) -> Tensor:
        return (found.double() - exact).norm() / exact.norm()

    rounded = wide.bfloat16()
    assert off(muon._iterated_by_gram(rounded)) < 2 * off(muon._iterated(rounded)) + 0.01


@pytest.mark.parametrize("most", [2**26, 1, 2 * 24 * 24], ids=["all at once", "one by one", "two by two"])
@pytest.mark.parametrize(("precision", "error"), [(torch.float32, 0.02), (torch.bfloat16, 0.03)])
def test_an_update_is_torchs_for_every_matrix(
    precision: torch.dtype, error: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over steps in which rate and momentum change, with weight decay; one matrix has no gradient at one of them."""
    monkeypatch.setattr(muon, "_MOST_ELEMENTS", most)
    start = [random(shape, seed) for seed, shape in enumerate(SHAPES * 3)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [
        (ours, Muon({"params": ours, "lr": 0.02}, 0.1, precision)),
        (theirs, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")),
    ]
    for matrices, optimizer in optimizers:
        for step in range(4):
            optimizer.param_groups[0] |= {"lr": 0.02 / (step + 1), "momentum": 0.85 + 0.02 * step}
            for number, matrix in enumerate(matrices):
                matrix.grad = None if (step, number) == (2, 3) else random(SHAPES[number % 3], 10 * step + number)
            optimizer.step()
    for before, own, their in zip(start, ours, theirs, strict=True):
        ours_of, theirs_of = (optimizer.state for _, optimizer in optimizers)
        assert torch.equal(ours_of[own]["momentum_buffer"], theirs_of[their]["momentum_buffer"])
        moved = (before - their).norm()
        assert moved > 0
        assert (own - their).norm() < error * moved
