"""Both kernels compute the same, at every number of blocks and in every direction of the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bwlm.model import attention
from bwlm.model.attention import attend

D = 16


def heads(time: int, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, T, D], k and v [2, K, T, D] as a model hands them over: views whose time and heads are swapped."""
    generator = torch.Generator().manual_seed(time)

    def one(count: int) -> Tensor:
        x = torch.randn(2, time, count, D, generator=generator, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    return one(4), one(kv_heads), one(kv_heads)


def segments(time: int) -> Tensor:
    """Segments that end inside a block, at its border, and span some."""
    first = torch.arange(time) // 50
    second = (torch.arange(time) >= 128).long()
    return torch.stack([first, second])


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad(out, inputs, weights)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "segments"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 127, 128, 129, 300, 1100])
def test_blocks_change_nothing(time: int, kv_heads: int, masked: bool) -> None:
    inputs, mask = heads(time, kv_heads), segments(time) if masked else None
    blocked, plain = (attend(*inputs, mask, kernel) for kernel in ("blocked", "sdpa"))
    torch.testing.assert_close(blocked, plain, rtol=1e-4, atol=1e-5)
    for name, ours, theirs in zip("qkv", gradients(blocked, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"d{n}: {text}")


def test_the_gradient_is_the_numerical_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", 3)
    monkeypatch.setattr(attention, "_MOST_BLOCKS", 10)
    inputs = heads(7, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask, "blocked"), inputs)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, None, "blocked"), inputs)


def test_bfloat16_is_as_close_as_torchs_own() -> None:
    """Scores are rounded once more than in a flash kernel, which costs less than twice its error."""
    exact = heads(512)
    with torch.no_grad():
        truth = attend(*exact, None, "sdpa")
        rounded = [x.bfloat16() for x in exact]
        error = {
            kernel: float((attend(*rounded, None, kernel) - truth).norm() / truth.norm())
            for kernel in ("blocked", "sdpa")
        }
    assert error["sdpa"] < 0.005
    assert error["blocked"] < 2 * error["sdpa"]


@pytest.mark.parametrize(("time", "block"), [(1, 128), (512, 128), (1024, 128), (2048, 256), (2049, 257)])
def test_a_row_has_at_most_eight_blocks(time: int, block: int) -> None:
    assert attention._block_size(time) == block
