"""Reading with a cache: the logits of a whole forward pass, and nothing read twice."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch
from torch import Tensor

from bwlm.model.attention import AttentionKernel
from bwlm.model.compiled_cache import CompiledKVCache
from bwlm.model.decoder import CachedAttention, Decoder
from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.shape import GPTConfig

T, V = 24, 50
SHAPES = {
    "a kv head for each head": GPTConfig(V, depth=2, width=32, heads=4, kv_heads=4, sequence_length=T),
    "two heads share": GPTConfig(V, depth=3, width=32, heads=4, kv_heads=2, sequence_length=T),
    "all heads share": GPTConfig(V, depth=2, width=24, heads=4, kv_heads=1, sequence_length=T),
    "one head": GPTConfig(V, depth=1, width=64, heads=1, kv_heads=1, sequence_length=T),
}
CACHES = {False: KVCache, True: CompiledKVCache}
ROWS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [9, 9]]


def lively(
    config: GPTConfig = SHAPES["two heads share"],
    compute_dtype: torch.dtype = torch.float32,
    attention: AttentionKernel = "sdpa",
    seed: int = 1,
) -> GPT:
    """With weights everywhere, of the size at which logits are neither flat nor at their cap."""
    model = GPT(config, compute_dtype, attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.size(-1) ** -0.5)
    return model.eval()


def whole(model: GPT, rows: list[list[int]]) -> Tensor:
    """The logits after each row, by a forward pass over each alone."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes [B, T] of what models read."""
    shapes: list[tuple[int, ...]] = []
    inner = Decoder.states

    def spy(self: Decoder, ids: Tensor, places: Tensor, attention: CachedAttention) -> Tensor:
        shapes.append(tuple(ids.shape))
        return inner(self, ids, places, attention)

    monkeypatch.setattr(Decoder, "states", spy)
    return shapes


@pytest.mark.parametrize(("attention", "compiled"), [("sdpa", False), ("blocked", False), ("sdpa", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_whole_row_at_every_length(
    shape: str, attention: AttentionKernel, compiled: bool
) -> None:
    model, rows = lively(SHAPES[shape], attention=attention), [list(row) for row in ROWS]
    reader = CACHES[compiled](model)
    assert_close(reader.read(rows, T), whole(model, rows))
    for step in range(T - max(map(len, rows))):
        new = [(7 * step + 3 * n) % V for n in range(len(rows))]
        rows = [[*row, one] for row, one in zip(rows, new, strict=True)]
        assert_close(reader.follow(new), whole(model, rows))
    assert reader.rows == rows
    assert max(map(len, rows)) == T


def test_the_past_matters_to_these_models() -> None:
    model = lively()
    assert float((whole(model, [ROWS[0]]) - whole(model, [ROWS[0][1:]])).abs().max()) > 0.1


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_read_as_the_model_reads_it(compiled: bool) -> None:
    model, exact = lively(compute_dtype=torch.bfloat16), lively()
    reader, rows = CACHES[compiled](model), [list(row) for row in ROWS]
    assert_close(reader.read(rows, T), whole(model, rows), 0.05)
    for step in range(8):
        rows = [[*row, step] for row in rows]
        found, expected = reader.follow([step] * len(rows)), whole(exact, rows)
        assert found.dtype == torch.float32
        # attention in float32 rounds less than the model does by itself
        assert float((found - expected).abs().mean()) < 1.2 * float((whole(model, rows) - expected).abs().mean())
    assert model.lm_head.weight.dtype == torch.float32


def test_rows_that_are_the_same_are_read_once(reads: list[tuple[int, ...]]) -> None:
    model, rows = lively(), [ROWS[0], ROWS[1], ROWS[0], ROWS[0]]
    reader = KVCache(model)
    assert_close(reader.read(rows, T), whole(model, rows))
    assert reads == [(2, 5)]
    grown = [[*row, n] for n, row in enumerate(rows)]
    assert_close(reader.follow(range(4)), whole(model, grown))  # and go their own ways from there
    grown = [[*row, 7] for row in grown]
    assert_close(reader.follow([7] * 4), whole(model, grown))


@pytest.mark.parametrize("ended", [{0}, {3}, {0, 1}, {1, 3}, {2, 3}, {0, 1, 2}, set()])
def test_rows_that_remain_are_not_confused(ended: set[int], reads: list[tuple[int, ...]]) -> None:
    model, reader = lively(), KVCache(lively())
    reader.read(ROWS, T)
    reader.follow([11, 12, 13, 14])
    order = reader.drop(ended)
    assert sorted(order) == sorted({0, 1, 2, 3} - ended)
    rows = [[*ROWS[n], 11 + n] for n in order]
    assert reader.rows == rows
    for _ in range(2):
        rows = [[*row, 20 + n] for n, row in zip(order, rows, strict=True)]
        assert_close(reader.follow([20 + n for n in order]), whole(model, rows))
    assert reads[-1] == (4 - len(ended), 1)


def test_a_conversation_is_read_once_and_can_be_taken_back(reads: list[tuple[int, ...]]) -> None:
    model = lively()
    reader, said = KVCache(model), [1, 2, 3]
    for ids, read in [
        (said, 3),
        ([*said, 4, 5], 2),
        ([*said, 4, 5], 1),
        ([*said, 4, 9, 9, 9], 3),
        ([*said, 4], 1),
        ([7], 1),
        ([7, *range(T - 1)], T - 1),
        ([8, *range(T - 1)], T),
    ]:
        assert_close(reader.reread(ids), whole(model, [ids]))
        assert reads[-1] == (1, read)
        assert reader.rows == [ids]
    reader.reread(said)
    assert_close(reader.follow([6]), whole(model, [[*said, 6]]))
    reader.reread([*said, 6, 7])
    assert reads[-1] == (1, 1), "what followed was read too"


def test_one_reader_may_read_batches_and_conversations() -> None:
    model, reader = lively(), KVCache(lively())
    for _ in range(2):
        assert_close(reader.reread(ROWS[2]), whole(model, [ROWS[2]]))
        assert_close(reader.read(ROWS, 12), whole(model, ROWS))
    assert_close(reader.read([[1, 2]], 3), whole(model, [[1, 2]]))
    assert_close(reader.reread([1, 2, 3, 4]), whole(model, [[1, 2, 3, 4]]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_nothing_is_compiled(training: bool) -> None:
    model = lively()
    model.compile_training()
    model.train(training)
    with torch.compiler.set_stance("fail_on_recompile"):
        reader = KVCache(model)
        found = reader.read(ROWS, T), reader.follow([1, 2, 3, 4])
    assert all(module.training == training for module in model.modules())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not any(logits.requires_grad for logits in found)
    assert_close(found[0], whole(lively(), ROWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_decodes_with_the_weights_of_the_moment_when_it_was_made(dtype: torch.dtype) -> None:
    model = lively(compute_dtype=dtype)
    reader, before = KVCache(model), KVCache(model).read(ROWS, T)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(reader.read(ROWS, T), before)


# ---- slots: rows that are read, copied and exchanged one by one ----


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_are_read_in_parts_and_moved_stay_what_they_are(shape: str, compiled: bool) -> None:
    """Random operations on slots; after each, the logits of what is read next are those of the whole row."""
    model, random = lively(SHAPES[shape]), Random(0)
    cache = CACHES[compiled](model)
    cache.reserve(4, T)
    rows: list[list[int]] = [[] for _ in range(4)]
    for _ in range(60):
        slot, other = random.randrange(4), random.randrange(4)
        match random.choice(["extend", "scored", "cut", "copy", "swap", "follow"]):
            case "extend" if new := [random.randrange(V) for _ in range(min(5, T - len(rows[slot])))]:
                rows[slot] += new
                assert_close(cache.extend(slot, new), whole(model, [rows[slot]]))
            case "scored" if new := [random.randrange(V) for _ in range(min(3, T - len(rows[slot])))]:
                rows[slot] += new
                with torch.no_grad():
                    expected = model(torch.tensor([rows[slot]]))[0, -len(new) :]
                assert_close(cache.extend_scored(slot, new), expected)
            case "cut":
                rows[slot] = rows[slot][: random.randrange(len(rows[slot]) + 1)]
                cache.cut(slot, len(rows[slot]))
            case "copy" if slot != other:
                rows[other] = rows[slot][: random.randrange(len(rows[slot]) + 1)]
                cache.copy(slot, other, len(rows[other]))
            case "swap":
                rows[slot], rows[other] = rows[other], rows[slot]
                cache.swap(slot, other)
            case "follow" if all(len(row) < T for row in rows[: slot + 1]):
                new = [random.randrange(V) for _ in rows[: slot + 1]]
                rows = [[*row, *new[n : n + 1]] for n, row in enumerate(rows)]
                assert_close(cache.follow(new), whole(model, rows[: slot + 1]))
        assert cache.rows == rows


@pytest.mark.parametrize(("rows", "room"), [([], T), ([[1], []], T), ([[1, 2, 3]], 2), ([[1]], T + 1)])
def test_rows_that_do_not_fit_are_refused(rows: list[list[int]], room: int) -> None:
    with pytest.raises(ValueError, match=f"give 1 to room={room}, and room at most {T}"):
        KVCache(lively()).read(rows, room)


@pytest.mark.parametrize("length", [0, T + 1])
def test_a_conversation_that_does_not_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} ids in a row: give 1 to {T}"):
        KVCache(lively()).reread([1] * length)
