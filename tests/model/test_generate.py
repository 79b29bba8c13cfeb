"""Decoding: what the model would say, many rows at once or as a stream, and no further than its row."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from bwlm.model.attention import AttentionKernel
from bwlm.model.generate import generate, stream
from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.sampling import draw
from bwlm.model.shape import GPTConfig
from tests.model.test_kv_cache import SHAPES, lively
from tests.model.test_kv_cache import reads as reads

T, V = 16, 12
CONFIG = GPTConfig(vocab_size=V, depth=2, width=32, heads=4, kv_heads=2, sequence_length=T)
PROMPT = [3, 1, 4, 1, 5]
RAGGED = [PROMPT, [9], [2, 6, 5, 3, 5, 8, 9, 7], PROMPT, [11, 10]]


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def best_by_rereading(model: GPT, prompt: list[int], new_tokens: int) -> list[int]:
    """The best id at each step, by a forward pass over the whole row."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(min(new_tokens, model.config.sequence_length + 1 - len(prompt))):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


# ---- what is said ----


@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_ids_are_the_best_at_every_position(seed: int, shape: str, attention: AttentionKernel) -> None:
    model = lively(SHAPES[shape], attention=attention, seed=seed)
    found = generate(model, RAGGED, 100)
    assert found == [best_by_rereading(model, prompt, 100) for prompt in RAGGED]
    assert len({one for new in found for one in new}) > 4, "a model that repeats itself would not tell positions apart"


def test_prompts_are_left_alone_and_none_asked_for_is_none(model: GPT) -> None:
    prompts = [list(prompt) for prompt in RAGGED]
    generate(model, prompts, 3)
    list(stream(model, prompts[0], 3))
    assert prompts == RAGGED
    assert generate(model, RAGGED, 0) == [[]] * len(RAGGED)
    assert generate(model, [], 5) == []
    assert list(stream(model, PROMPT, 0)) == []


def test_a_stop_id_is_the_last_one(model: GPT) -> None:
    (free,) = generate(model, [PROMPT], 8)
    stop = free[3]
    assert generate(model, [PROMPT], 8, stop={stop}) == [free[: free.index(stop) + 1]]
    assert generate(model, [PROMPT], 8, stop={99}) == [free]


@pytest.mark.parametrize(("length", "expected"), [(T - 3, 4), (T - 1, 2), (T, 1)])
def test_decoding_ends_where_the_row_is_full(model: GPT, length: int, expected: int) -> None:
    prompt = (PROMPT * T)[:length]
    (found,) = generate(model, [prompt], 100)
    assert len(found) == expected
    assert generate(model, [prompt], 1) == [found[:1]]
    assert list(stream(model, prompt, 100)) == found


def test_a_full_row_does_not_end_the_others(model: GPT) -> None:
    prompts = [(PROMPT * T)[:length] for length in (T, 1, T - 1, 7)]
    found = generate(model, prompts, 100)
    assert [len(new) for new in found] == [1, T, 2, T - 6]
    assert found == [best_by_rereading(model, prompt, 100) for prompt in prompts]


# ---- rows of a batch ----


def test_a_row_says_the_same_in_any_company(model: GPT) -> None:
    seeds = [5, -5, 7, 2**70, 0]
    found = generate(model, RAGGED, 12, temperature=1.5, stop={8}, seeds=seeds)
    assert len({len(new) for new in found}) > 2, "rows that end together would prove little"
    for prompt, seed, new in zip(RAGGED, seeds, found, strict=True):
        assert generate(model, [prompt], 12, temperature=1.5, stop={8}, seeds=[seed]) == [new]
        assert list(stream(model, prompt, 12, temperature=1.5, stop={8}, seed=seed)) == new
    assert found[0] != found[3], "the same prompt, but another seed"


def test_rows_that_have_ended_are_no_longer_read(model: GPT, reads: list[tuple[int, ...]]) -> None:
    prompts = [PROMPT] * 40
    found = generate(model, prompts, 11, temperature=2.0, stop={8}, seeds=3)
    going_on = [sum(len(new) > step for new in found) for step in range(1, max(map(len, found)))]
    assert reads == [(1, len(PROMPT)), *((rows, 1) for rows in going_on)]
    assert len(set(going_on)) > 5


def test_one_seed_gives_each_row_its_own(model: GPT) -> None:
    many = generate(model, [PROMPT] * 30, 8, temperature=1.0, seeds=4)
    assert len(set(map(tuple, many))) > 20
    assert generate(model, [PROMPT] * 7, 8, temperature=1.0, seeds=4) == many[:7]
    shifted = generate(model, [PROMPT] * 30, 8, temperature=1.0, seeds=5)
    assert sum(a == b for a, b in zip(many[1:], shifted, strict=False)) < 5, "seed 5 is not seed 4, one row further"


# ---- how it is drawn ----


def test_drawing_repeats_with_its_seeds_alone(model: GPT) -> None:
    draws = generate(model, [PROMPT] * 6, 8, temperature=1.0, seeds=range(6))
    torch.manual_seed(123)
    assert generate(model, [PROMPT] * 6, 8, temperature=1.0, seeds=range(6)) == draws
    assert generate(model, [PROMPT], 8, temperature=1e-6, seeds=3) == generate(model, [PROMPT], 8)


def test_a_shorter_answer_begins_like_a_longer_one(model: GPT) -> None:
    (longer,) = generate(model, [PROMPT], 9, temperature=1.0, seeds=1)
    assert generate(model, [PROMPT], 4, temperature=1.0, seeds=1) == [longer[:4]]


def frequencies(drawn: list[list[int]]) -> torch.Tensor:
    counts = Counter(new[0] for new in drawn)
    return torch.tensor([counts[index] / len(drawn) for index in range(V)])


def probabilities(model: GPT, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]))[0, -1]
    return torch.softmax(logits / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_ids_are_drawn_as_often_as_the_softmax_says(model: GPT, temperature: float) -> None:
    expected = probabilities(model, temperature)
    found = frequencies(generate(model, [PROMPT] * 4000, 1, temperature=temperature))
    assert float((found - expected).abs().sum() / 2) < 0.04
    assert expected.max() > 1.2 / V, "an even softmax would not tell temperatures apart"


def test_the_best_are_drawn_as_often_as_among_themselves(model: GPT) -> None:
    expected = probabilities(model, 2.0)
    expected[expected < expected.topk(4).values.min()] = 0
    found = frequencies(generate(model, [PROMPT] * 4000, 1, temperature=2.0, top_k=4))
    assert not found[expected == 0].any()
    assert float((found - expected / expected.sum()).abs().sum() / 2) < 0.04
    assert generate(model, RAGGED, 9, temperature=2.0, top_k=1) == generate(model, RAGGED, 9)
    everything = generate(model, RAGGED, 9, temperature=2.0, top_k=10**6)
    assert all(0 <= one < V for new in everything for one in new)


@pytest.mark.parametrize("top_k", [None, 3, V])
def test_banned_ids_are_never_said(model: GPT, top_k: int | None) -> None:
    (best,) = generate(model, [PROMPT], 1)
    banned = {best[0], 0, V - 1}
    (second,) = generate(model, [PROMPT], 1, banned=banned)
    allowed = [index for index in range(V) if index not in banned]
    assert second[0] == max(allowed, key=lambda index: float(probabilities(model, 1.0)[index]))
    drawn = generate(model, [PROMPT] * 200, 9, temperature=50.0, top_k=top_k, banned=banned)
    said = {one for new in drawn for one in new}
    assert not said & banned
    assert said == set(allowed)


def test_only_what_has_a_probability_is_drawn_at_the_very_edges() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(5, -1)
    assert draw(probabilities, [0.0, 0.499999, 0.5, 0.999999, 1 - 2**-53]).flatten().tolist() == [1, 1, 3, 3, 3]


def test_one_id_that_is_left_is_said(model: GPT) -> None:
    banned = set(range(V)) - {7}
    for temperature, top_k in ((0.0, None), (1.0, None), (1.0, 5)):
        found = generate(model, [PROMPT] * 50, 4, temperature=temperature, top_k=top_k, banned=banned)
        assert found == [[7] * 4] * 50


# ---- streams ----


def test_a_stream_gives_an_id_before_it_reads_it(model: GPT, reads: list[tuple[int, ...]]) -> None:
    (expected,) = generate(model, [PROMPT], 8)
    reads.clear()
    ids = stream(model, PROMPT, 8)
    assert reads == []
    assert list(islice(ids, 3)) == expected[:3]
    assert reads == [(1, len(PROMPT)), (1, 1), (1, 1)]


def test_a_conversation_reads_what_is_new(model: GPT, reads: list[tuple[int, ...]]) -> None:
    reader, said = KVCache(model), [3, 1]
    for turn in ([4, 1], [5, 9], [2]):
        said += turn
        reads.clear()
        answer = list(stream(reader, said, 3))
        assert [answer] == generate(model, [said], 3)
        said += answer
        read_before = 0 if turn == [4, 1] else 1  # of an answer the last id is chosen, but not read
        first = 4 if turn == [4, 1] else len(turn) + read_before
        assert reads[0] == (1, first)


def test_a_stream_that_is_broken_off_can_be_gone_on_from(model: GPT, reads: list[tuple[int, ...]]) -> None:
    reader = KVCache(model)
    begun = list(islice(stream(reader, PROMPT, 8), 3))
    reads.clear()
    rest = list(stream(reader, [*PROMPT, *begun], 5))
    assert reads[0] == (1, 1)
    assert [begun + rest] == generate(model, [PROMPT], 8)


# ---- misuse ----


@pytest.mark.parametrize("length", [0, T + 1])
@pytest.mark.parametrize("new_tokens", [0, 5])
def test_a_prompt_that_no_row_holds_is_refused(model: GPT, length: int, new_tokens: int) -> None:
    for refused in (
        lambda: generate(model, [PROMPT, [1] * length], new_tokens),
        lambda: stream(model, [1] * length, 5),
    ):
        with pytest.raises(ValueError, match=f"the prompt has {length} ids: give 1 to {T}"):
            refused()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, not -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, not nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, not inf"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"banned": {V}}, f"banned ids must be of the vocabulary, 0 to {V - 1}"),
        ({"banned": {-1}}, f"banned ids must be of the vocabulary, 0 to {V - 1}"),
        ({"banned": range(V)}, "banned holds every id"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(model: GPT, arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        generate(model, [PROMPT], 1, **arguments)
    if "seeds" not in arguments:
        with pytest.raises(ValueError, match=told):
            stream(model, PROMPT, 1, **arguments)


# ---- devices and precisions ----


def test_a_model_that_is_training_goes_on_training(model: GPT) -> None:
    training = lively(CONFIG)
    training.compile_training()
    training.train()
    with torch.compiler.set_stance("fail_on_recompile"):
        found = generate(training, RAGGED, 5)
        next(stream(training, PROMPT, 5))
    assert training.training
    assert found == generate(lively(CONFIG), RAGGED, 5)


def test_bfloat16_says_much_the_same() -> None:
    exact = generate(lively(SHAPES["two heads share"]), RAGGED, 6)
    rounded = generate(lively(SHAPES["two heads share"], torch.bfloat16), RAGGED, 6)
    same = sum(a == b for new, other in zip(exact, rounded, strict=True) for a, b in zip(new, other, strict=True))
    assert same > 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_says_what_a_cpu_does(shape: str) -> None:
    model = lively(SHAPES[shape])
    asked = [{}, {"temperature": 1.0, "seeds": 3}, {"temperature": 1.0, "top_k": 5, "banned": {1, 2}}]
    on_the_cpu = [generate(model, RAGGED, 100, **arguments) for arguments in asked]
    model.to("cuda")
    assert [generate(model, RAGGED, 100, **arguments) for arguments in asked] == on_the_cpu
