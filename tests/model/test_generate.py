"""Decoding: what the model would say, a step at a time, and no further than its row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bwlm.model.generate import generate
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig

T, V = 16, 12
CONFIG = GPTConfig(vocab_size=V, depth=2, width=32, heads=4, kv_heads=2, sequence_length=T)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def test_greedy_ids_are_the_best_at_every_position(model: GPT) -> None:
    new = generate(model, PROMPT, 8)
    assert len(new) == 8
    assert len(set(new)) > 2, "a model that repeats itself would not tell positions apart"
    with torch.no_grad():
        best = model(torch.tensor([PROMPT + new[:-1]]))[0].argmax(-1)
    assert new == best[len(PROMPT) - 1 :].tolist()


def test_the_prompt_is_left_alone_and_none_asked_for_is_none(model: GPT) -> None:
    prompt = list(PROMPT)
    generate(model, prompt, 3)
    assert prompt == PROMPT
    assert generate(model, PROMPT, 0) == []


def test_a_stop_id_is_the_last_one(model: GPT) -> None:
    free = generate(model, PROMPT, 8)
    stop = free[3]
    assert generate(model, PROMPT, 8, stop={stop}) == free[: free.index(stop) + 1]
    assert generate(model, PROMPT, 8, stop={99}) == free


@pytest.mark.parametrize(("length", "expected"), [(T - 3, 4), (T - 1, 2), (T, 1)])
def test_decoding_ends_where_the_row_is_full(model: GPT, length: int, expected: int) -> None:
    prompt = (PROMPT * T)[:length]
    assert len(generate(model, prompt, 100)) == expected
    assert generate(model, prompt, 100)[:1] == generate(model, prompt, 1)


@pytest.mark.parametrize("length", [0, T + 1])
@pytest.mark.parametrize("new_tokens", [0, 5])
def test_a_prompt_that_no_row_holds_is_refused(model: GPT, length: int, new_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{length} ids to go on from: give 1 to {T}"):
        generate(model, [1] * length, new_tokens)


def test_a_negative_temperature_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="temperature"):
        generate(model, PROMPT, 1, temperature=-0.5)


def test_drawing_repeats_with_its_seed_alone(model: GPT) -> None:
    draws = [tuple(generate(model, PROMPT, 8, temperature=1.0, seed=seed)) for seed in range(6)]
    assert len(set(draws)) > 1
    torch.manual_seed(123)
    assert [tuple(generate(model, PROMPT, 8, temperature=1.0, seed=seed)) for seed in range(6)] == draws
    assert generate(model, PROMPT, 8, temperature=1e-6, seed=3) == generate(model, PROMPT, 8)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_ids_are_drawn_as_often_as_the_softmax_says(model: GPT, temperature: float) -> None:
    draws = 1500
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([PROMPT]))[0, -1] / temperature, dim=-1)
    counts = Counter(generate(model, PROMPT, 1, temperature, seed=seed)[0] for seed in range(draws))
    found = torch.tensor([counts[index] / draws for index in range(V)])
    assert float((found - expected).abs().sum() / 2) < 0.06
    assert expected.max() > 1.2 / V, "an even softmax would not tell temperatures apart"
