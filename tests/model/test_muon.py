"""Muon in float32: the same update as torch's to bfloat16's precision, and chosen by the model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bwlm.model.gpt import GPT
from bwlm.model.muon import Float32Muon, build_muon, orthogonalize
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig

SHAPES = [(24, 24), (48, 12), (12, 48)]


def random(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = random(shape, 0)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix) @ v.T
    values = found.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (found - torch.diag(values)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_torchs_to_the_precision_of_bfloat16(shape: tuple[int, int]) -> None:
    """Over steps in which rate and momentum change, with weight decay."""
    ours, theirs = (torch.nn.Parameter(random(shape, 1)) for _ in range(2))
    optimizers = {
        matrix: build_muon({"params": [matrix], "lr": 0.02}, 0.1, precision)
        for matrix, precision in ((ours, torch.float32), (theirs, torch.bfloat16))
    }
    assert isinstance(optimizers[ours], Float32Muon)
    assert not isinstance(optimizers[theirs], Float32Muon)
    for matrix, optimizer in optimizers.items():
        for step in range(4):
            optimizer.param_groups[0] |= {"lr": 0.02 / (step + 1), "momentum": 0.85 + 0.02 * step}
            matrix.grad = random(shape, 10 + step)
            optimizer.step()
    buffers = [optimizer.state[matrix]["momentum_buffer"] for matrix, optimizer in optimizers.items()]
    assert torch.equal(*buffers)
    moved = (random(shape, 1) - theirs).norm()
    assert 0 < (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_is_chosen_by_what_the_model_computes_in(precision: torch.dtype) -> None:
    config = GPTConfig(vocab_size=64, depth=1, width=32, heads=2, kv_heads=1, sequence_length=16)
    optimizer = build_optimizer(GPT(config, precision))
    assert isinstance(optimizer.parts["muon"], Float32Muon) is (precision == torch.float32)
