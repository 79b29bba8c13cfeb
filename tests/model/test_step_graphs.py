"""Steps of fixed shapes: the rows and places that fill one up change nothing. Capturing itself needs a GPU."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from bwlm.model import compiled_cache
from bwlm.model.compiled_cache import CompiledKVCache
from bwlm.model.decoder import Decoder
from bwlm.model.step_graphs import Captured, StepGraphs, fitting, sizes
from tests.model.test_kv_cache import SHAPES, T, V, assert_close, lively, whole


class Replayed(StepGraphs):
    """A step on a CPU with fixed shapes, as on a GPU: it writes its logits where it wrote them first."""

    count = 0

    def _capture(self, ids: Tensor, places: Tensor, seen: int) -> Captured:
        Replayed.count += 1
        logits = self._step(ids, places, seen).clone()

        def replay() -> None:
            logits.copy_(self._step(ids, places, seen))

        return Captured(replay, logits)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "StepGraphs", Replayed)
    monkeypatch.setattr("bwlm.model.step_graphs._FEWEST_PLACES", 4)
    monkeypatch.setattr(Replayed, "count", 0)


def graphed_cache(shape: str) -> CompiledKVCache:
    model = lively(SHAPES[shape])
    cache = CompiledKVCache(model)
    cache._decoder = Decoder(model)  # a GPU's
    cache.reserve(5, T)
    return cache


@pytest.mark.usefixtures("graphed")
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_fill_up_a_step_stay_what_they_are(shape: str) -> None:
    """Random operations on slots, full ones too; idle ones are read on now and then."""
    model, cache, random = lively(SHAPES[shape]), graphed_cache(shape), Random(1)
    captured = Replayed.count
    rows: list[list[int]] = [[] for _ in range(5)]
    for _ in range(150):
        slot = random.randrange(5)
        new = [random.randrange(V) for _ in range(random.choice([1, 3, T]))][: T - len(rows[slot])]
        match random.choice(["extend", "follow", "swap", "cut"]):
            case "extend" if new:
                rows[slot] += new
                assert_close(cache.extend(slot, new), whole(model, [rows[slot]]))
            case "follow" if all(len(row) < T for row in rows[: slot + 1]):
                ids = [random.randrange(V) for _ in rows[: slot + 1]]
                rows = [[*row, *ids[n : n + 1]] for n, row in enumerate(rows)]
                assert_close(cache.follow(ids), whole(model, rows[: slot + 1]))
            case "swap":
                rows[slot], rows[0] = rows[0], rows[slot]
                cache.swap(slot, 0)
            case "cut" if rows[slot]:
                del rows[slot][random.randrange(len(rows[slot])) :]
                cache.cut(slot, len(rows[slot]))
        assert cache.rows == rows
    assert Replayed.count == captured == len(sizes(1, 5)) * len(sizes(4, T)), "none is captured later"


@pytest.mark.usefixtures("graphed")
def test_what_was_reserved_can_be_forgotten_without_capturing_anew() -> None:
    model, cache = lively(), graphed_cache("two heads share")
    cache.extend(0, [1, 2, 3])
    captured, kept = Replayed.count, cache._kept
    cache.reserve(5, T)
    assert cache._kept is kept
    assert not kept.any()
    cache.extend(0, [4])
    assert_close(cache.follow([5]), whole(model, [[4, 5]]))
    assert Replayed.count == captured


@pytest.mark.usefixtures("graphed")
def test_graphs_are_not_used_for_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = lively(), graphed_cache("two heads share")
    monkeypatch.setattr(Replayed, "__call__", None)
    cache.read([[1, 2], [3]], 8)
    assert_close(cache.follow([5, 6]), whole(model, [[1, 2, 5], [3, 6]]))


def test_logits_stay_when_the_next_step_overwrites_its_own() -> None:
    step = StepGraphs.__new__(Replayed)
    StepGraphs.__init__(step, lambda ids, places, seen: ids[:, None].float(), 2, 4, torch.device("cpu"))
    first = step([1], [0, 0])
    assert step([2], [0, 0]).tolist() == [[2]]
    assert first.tolist() == [[1]]


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(1, 1, [1]), (1, 8, [1, 2, 4, 8]), (1, 5, [1, 2, 4, 5]), (256, 24, [24])]
)
def test_sizes_double_up_to_the_most(least: int, most: int, expected: list[int]) -> None:
    assert sizes(least, most) == expected


def test_the_smallest_size_that_is_enough_is_taken() -> None:
    assert [fitting([1, 2, 4, 5], needed) for needed in range(1, 6)] == [1, 2, 4, 4, 5]
