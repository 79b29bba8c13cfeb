"""The decode step in compiled code; that its logits are those of the whole row is a law of `test_kv_cache.py`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from bwlm.model.compiled_cache import CompiledKVCache
from bwlm.model.compiled_decoder import CannotCompile, CompiledDecoder, Panels, _compiled
from bwlm.model.decoder import Matrix
from bwlm.model.shape import GPTConfig
from tests.model.test_kv_cache import SHAPES, assert_close, lively, whole

T = 24
ROWS = [[(7 * row + 3 * place) % 50 for place in range(1 + row % 5)] for row in range(21)]
"""More rows than are multiplied at once, of several lengths."""


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 1), (7, 1), (8, 1), (9, 1), (21, 1), (9, 2)])
def test_any_number_of_rows_on_any_number_of_threads(count: int, threads: int) -> None:
    model, rows, before = lively(), [list(row) for row in ROWS[:count]], torch.get_num_threads()
    cache = CompiledKVCache(model)
    cache.read(rows, T)
    torch.set_num_threads(threads)
    try:
        found = [cache.follow([new] * count) for new in range(2)]
    finally:
        torch.set_num_threads(before)
    for new, logits in enumerate(found):
        rows = [[*row, new] for row in rows]
        assert_close(logits, whole(model, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (50, 24), (5, 8)])
def test_panels_multiply_as_the_matrix_does(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, inputs, generator=generator).to(dtype) for size in (outputs, 6))
    added = torch.randn(6, outputs, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.2  # a sum that is rounded twice
    for argument in (None, added):
        expected = Matrix(weight).times(x, argument)
        found = Panels(weight).times(x, argument)
        assert found.shape == expected.shape
        assert_close(found, expected, tolerance)
    cube = x.view(2, 3, inputs)
    assert_close(Panels(weight).times(cube), Matrix(weight).times(cube), tolerance)


def test_weights_are_held_once() -> None:
    """Prompts are read from the panels too: beside them there is the embedding, and no other matrix."""
    config = GPTConfig.from_depth(2, 96, T)
    decoder = CompiledDecoder(lively(config))
    kept = [one for one in vars(decoder).values() if isinstance(one, torch.Tensor)]
    stored = [matrix.stored for layer in decoder._layers for matrix in layer] + [decoder._head.stored]
    numbers = sum(tensor.numel() for tensor in kept + stored)
    matrices = config.depth * 12 * config.width**2 + 2 * config.vocab_size * config.width
    assert matrices <= numbers < 1.1 * matrices


def test_nothing_is_compiled_once_the_decoder_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    cache = CompiledKVCache(model)
    monkeypatch.setattr(subprocess, "run", None)
    for rows in ([ROWS[0]], ROWS, ROWS[:3]):
        cache.read(rows, T)
        cache.follow([1] * len(rows))
    CompiledKVCache(lively(seed=2))  # nor for another model of the same sizes


def test_an_id_or_a_place_outside_of_the_memory_is_not_read() -> None:
    cache = CompiledKVCache(lively())
    cache.read([[1, 2]], 3)
    for wrong in (-1, 50):
        with pytest.raises(AssertionError, match="ids of the vocabulary"):
            cache.follow([wrong])
    cache.follow([3])
    with pytest.raises(AssertionError, match="places of the cache"):
        cache.follow([4])


@pytest.fixture
def uncached() -> None:
    _compiled.cache_clear()


@pytest.mark.usefixtures("uncached")
class TestWithoutACompiler:
    def decoder(self) -> CompiledDecoder:
        return CompiledDecoder(lively(SHAPES["one head"]))

    def test_it_says_what_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(CannotCompile, match=r"^it needs a C\+\+ compiler, such as g\+\+$"):
            self.decoder()

    def test_it_names_the_one_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -O3")
        with pytest.raises(CannotCompile, match=r"^CXX names no-such-compiler, which is not there$"):
            self.decoder()

    def test_what_it_says_is_passed_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "broken++"
        broken.write_text("#!/bin/sh\necho 'first line' >&2\necho 'error: no space left' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(CannotCompile, match=r"broken\+\+ failed: error: no space left"):
            self.decoder()
