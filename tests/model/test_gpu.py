"""What a GPU trains and decodes is what a CPU does."""

from __future__ import annotations

from random import Random

import pytest
import torch

from bwlm.model.attention import AttentionKernel
from bwlm.model.compiled_cache import CompiledKVCache
from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig
from bwlm.model.train_step import TrainStep
from tests.model.test_kv_cache import lively

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses(
    device: str,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
    masked: bool = False,
    attention: AttentionKernel = "sdpa",
) -> list[float]:
    """Ten steps on one batch, in two passes of two rows; each step has other segments."""
    ids = torch.randint(0, 1024, (4, 257), generator=torch.Generator().manual_seed(1)).to(device)
    model = GPT(GPTConfig.from_depth(3, 1024, 256), precision, attention, loss_chunk=512)
    model.init_weights(0)
    if compiled:
        model.compile_training()
    model.to(device)
    step = TrainStep(model, build_optimizer(model), micro_rows=2, grad_clip=1.0)
    found = []
    for number in range(10):
        places = torch.arange(256, device=device) + 13 * torch.arange(4, device=device)[:, None]
        segments = places // (30 + 50 * number) if masked else None
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found.append(step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), segments).loss)
    return found


def test_in_float32_to_its_precision() -> None:
    assert losses("cuda") == pytest.approx(losses("cpu"), abs=1e-4)


def test_compiled_in_bfloat16_to_the_precision_of_that() -> None:
    assert losses("cuda", torch.bfloat16, compiled=True) == pytest.approx(losses("cpu"), abs=5e-3)


@pytest.mark.parametrize("attention", ["sdpa", "flex", "blocked"])
def test_inside_segments_in_float32(attention: AttentionKernel) -> None:
    expected = losses("cpu", masked=True)
    assert losses("cuda", masked=True, attention=attention) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_inside_segments_compiled_in_bfloat16_and_never_anew(attention: AttentionKernel) -> None:
    found = losses("cuda", torch.bfloat16, compiled=True, masked=True, attention=attention)
    assert found == pytest.approx(losses("cpu", masked=True), abs=5e-3)


def test_captured_steps_decode_as_the_model_does_in_any_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 to 700 ids, so that graphs of all sizes are replayed; none is captured once rows are reserved."""
    config, random = GPTConfig.from_depth(2, 300, 1024), Random(0)
    model = lively(config).to("cuda")
    cache = CompiledKVCache(model)
    cache.reserve(5, 1024)
    monkeypatch.setattr(torch.cuda, "graph", None)
    rows = [[random.randrange(300) for _ in range(length)] for length in (1, 40, 300, 700, 5)]
    for slot, row in enumerate(rows):
        cache.extend(slot, row)
    for _ in range(30):
        first, second, count = random.randrange(5), random.randrange(5), random.randrange(1, 6)
        rows[first], rows[second] = rows[second], rows[first]
        cache.swap(first, second)
        new = [random.randrange(300) for _ in range(count)]
        rows = [[*row, *new[n : n + 1]] for n, row in enumerate(rows)]
        logits = cache.follow(new)
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([row], device="cuda"))[0, -1] for row in rows[:count]])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    cache.reserve(5, 1024)
    cache.extend(0, [1, 2])
    with torch.no_grad():
        whole = model(torch.tensor([[1, 2, 3]], device="cuda"))[0, -1:]
    torch.testing.assert_close(cache.follow([3]), whole, atol=1e-4, rtol=0)
