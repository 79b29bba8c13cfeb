"""The fused loss is the plain one, by value and by gradient, whatever the chunk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.decoder import softcap_
from bwlm.model.loss import LOGIT_CAP, fused_loss, plain_loss, softcap

N, C, V = 37, 8, 50


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(N, C, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 5, N - 1]] = -1
    return x, weight, targets


def test_by_hand() -> None:
    """Two logits, 15 tanh(1.5 / 15) and 0, the second one wanted: log(1 + e^1.495)."""
    x, weight = torch.tensor([[1.5]]), torch.tensor([[1.0], [0.0]])
    total, each, _ = plain_loss(x, weight, torch.tensor([1]))
    capped = 15 * math.tanh(0.1)
    assert float(total) == pytest.approx(math.log(1 + math.exp(capped)), rel=1e-6)
    assert each.tolist() == [float(total)]


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual", "at the cap"])
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_chunks_change_nothing(chunk: int, scale: float) -> None:
    x, weight, targets = inputs(scale=scale)
    total, each, _ = plain_loss(x, weight, targets)
    expected = torch.autograd.grad(total / 3, (x, weight))
    fused, each_fused, _ = fused_loss(x, weight, targets, chunk)
    torch.testing.assert_close((fused, each_fused), (total, each), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(fused / 3, (x, weight)), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fused_loss(x, weight, targets, chunk)[:2], (total, each), rtol=1e-5, atol=1e-5)


def test_what_is_no_target_costs_nothing_and_moves_nothing() -> None:
    x, weight, targets = inputs()
    total, each, _ = fused_loss(x, weight, targets, 8)
    assert (each[targets < 0] == 0).all()
    (dx,) = torch.autograd.grad(total, x)
    assert (dx[targets < 0] == 0).all()
    assert (dx[targets >= 0] != 0).any(-1).all()
    nothing, *_ = fused_loss(x, weight, torch.full_like(targets, -1), 8)
    assert float(nothing.detach()) == 0


def test_the_losses_of_tokens_have_no_gradient() -> None:
    x, weight, targets = inputs()
    assert not fused_loss(x, weight, targets, 8)[1].requires_grad
    assert not plain_loss(x, weight, targets)[1].requires_grad


def test_bfloat16_rounds_as_the_plain_one_does() -> None:
    x, weight, targets = inputs(torch.bfloat16)
    fused, plain = fused_loss(x, weight, targets, 8)[0], plain_loss(x, weight, targets)[0]
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    one, other = (torch.autograd.grad(loss, weight)[0] for loss in (fused, plain))
    assert float((one - other).norm() / other.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_are_the_largest_logits_and_change_nothing(dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype)
    largest = F.linear(x, weight.to(dtype)).argmax(-1)
    unasked = fused_loss(x, weight, targets, 8)
    assert unasked.predicted.numel() == 0
    for found in (fused_loss(x, weight, targets, 8, predict=True), plain_loss(x, weight, targets, predict=True)):
        assert torch.equal(found.predicted, largest)
    asked = fused_loss(x, weight, targets, 8, predict=True)
    assert torch.equal(asked.each, unasked.each)
    gradients = [torch.autograd.grad(found.total, (x, weight)) for found in (asked, unasked)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(fused_loss(x, weight, targets, 8, predict=True).predicted, largest)


def test_a_compiled_kernel_is_taken_instead() -> None:
    asked: list[int] = []

    def kernel(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(len(x))
        logits = F.linear(x, weight)
        capped = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        return F.cross_entropy(capped, targets, ignore_index=-1, reduction="none"), torch.zeros(len(x), V), logits

    x, weight, targets = inputs()
    total, *_ = fused_loss(x, weight, targets, 30, gradient=kernel)
    assert asked == [30, 7]
    assert float(total.detach()) == pytest.approx(float(plain_loss(x, weight, targets)[0].detach()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cap_in_place_is_the_cap(dtype: torch.dtype) -> None:
    logits = 40 * torch.randn(N, V, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = softcap(logits)
    assert torch.equal(softcap_(logits), expected)
