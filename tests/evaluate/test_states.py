"""States and attention are of the same text in every reading, each taken where the model has read it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bwlm.directions import READINGS
from bwlm.evaluate.states import ActivationProbe
from bwlm.model.gpt import GPT
from bwlm.model.observe import attention_statistics
from bwlm.model.shape import GPTConfig
from bwlm.record.researchlog_schema import MAP_POSITIONS
from bwlm.text.batches import open_rows
from bwlm.text.direction import SpecialIds, arrange
from bwlm.text.prepare import Prepared
from tests.conftest import SEQUENCE_LENGTH, VOCAB_SIZE

CONFIG = GPTConfig(VOCAB_SIZE, depth=2, width=32, heads=2, kv_heads=2, sequence_length=SEQUENCE_LENGTH)
READ = [*((reading, False) for reading in READINGS), ("forward", True), ("backward", True)]
"""(reading, marked)"""


@pytest.fixture
def view(prepared: Prepared) -> ActivationProbe:
    return ActivationProbe(
        rows=open_rows(str(prepared.folder), "validation"),
        windows=np.array([1, 3, 4, 6, 9, 10, 12, 15, 20, 21]),
        special=SpecialIds.from_tokenizer(prepared.tokenizer),
        tokens=200,
        device=torch.device("cpu"),
        masked=False,
    )


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


Place = tuple[int, int, int]
"""window, segment, index in reading order"""
ByHand = tuple[list[int], dict[Place, int], list[int]]
"""The ids of a window as a model reads them, where each token stands in them, and each id's segment"""


def rows_by_hand(view: ActivationProbe, reading: str, marked: bool, window: int) -> ByHand:
    rows, special, ids = view.rows.take(np.array([window])), view.special, []
    where: dict[Place, int] = {}
    segments: list[int] = []
    marker = {"forward": special.forward, "backward": special.backward}
    ends = np.cumsum(rows.lengths)
    order = range(len(ends))[::-1] if reading == "backward" else range(len(ends))
    for ordinal, segment in enumerate(order):
        length, end = rows.lengths[segment], ends[segment]
        ids += [special.bos, *([marker[reading]] if marked else [])]
        for index in arrange(np.arange(length), reading, view.rows.width).tolist():
            where[window, segment, index] = len(ids)
            ids.append(int(rows.tokens[end - length + index]))
        segments += [ordinal] * (len(ids) - len(segments))
    if rows.whole[order[-1]]:
        ids.append(special.bos)
        segments.append(segments[-1])
    missing = view.rows.width + 1 - len(ids)
    return ids + [special.pad] * missing, where, segments + segments[-1:] * missing


def chosen_by_hand(view: ActivationProbe) -> list[Place]:
    """Evenly over the tokens of the first eight windows."""
    places = [
        (int(window), segment, index)
        for window in view.windows[:8]
        for segment, length in enumerate(view.rows.take(np.array([window])).lengths)
        for index in range(length)
    ]
    count = min(view.tokens, len(places))
    return [places[int(place)] for place in np.linspace(0, len(places) - 1, count)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("reading", "marked"), READ)
def test_each_state_is_that_of_its_token(
    view: ActivationProbe, model: GPT, reading: str, marked: bool, masked: bool
) -> None:
    view = replace(view, masked=masked)
    states = view.states(model, reading, marked)
    assert states.shape == (CONFIG.depth + 1, 200, CONFIG.width)
    assert states.dtype == np.float16
    tokens, expected = [], []
    for window, segment, index in chosen_by_hand(view):
        ids, where, segments = rows_by_hand(view, reading, marked, window)
        place = where[window, segment, index]
        tokens.append(ids[place])
        inside = torch.tensor([segments[:-1]]) if masked else None
        with torch.no_grad():
            expected.append([state[0, place] for state in model.states(torch.tensor([ids[:-1]]), inside)])
    assert view.tokens_of()["token"].tolist() == tokens
    assert view.tokens_of()["window"].tolist() == [window for window, _, _ in chosen_by_hand(view)]
    by_hand = np.array([[state.numpy() for state in token] for token in expected]).transpose(1, 0, 2)
    np.testing.assert_allclose(states.astype(np.float32), by_hand, rtol=2e-3, atol=2e-3)
    # in the embedding's output a state is its token's
    embedded = torch.nn.functional.rms_norm(model.embedding.weight[tokens], (CONFIG.width,))
    np.testing.assert_allclose(states[0].astype(np.float32), embedded.detach().numpy(), rtol=2e-3, atol=2e-3)


def test_all_tokens_are_inputs_in_every_reading(view: ActivationProbe) -> None:
    """A row's last id is only predicted: no state is its."""
    view = replace(view, tokens=10**6)
    for reading, marked in READ:
        for window in view.windows[:8].tolist():
            where = rows_by_hand(view, reading, marked, window)[1]
            places = [where[place] for place in chosen_by_hand(view) if place[0] == window]
            assert max(places) < view.rows.width


@pytest.mark.parametrize("tokens", [1, 7, 1000, 10**6])
def test_as_many_tokens_as_were_asked_for_or_there_are(view: ActivationProbe, model: GPT, tokens: int) -> None:
    view = replace(view, tokens=tokens)
    rows = view.rows.take(view.windows[:8])
    count = min(tokens, len(rows.tokens))
    found: dict[str, NDArray[Any]] = view.tokens_of()
    assert {name: len(values) for name, values in found.items()} == {"token": count, "window": count}
    assert view.states(model, "backward", False).shape[1] == count
    if tokens == 10**6:
        assert set(found["window"].tolist()) == set(view.windows[:8].tolist())


@pytest.mark.parametrize("windows", [1, 3])
def test_fewer_windows_than_would_be_looked_at(view: ActivationProbe, model: GPT, windows: int) -> None:
    few = replace(view, windows=view.windows[:windows])
    assert set(few.tokens_of()["window"].tolist()) == set(view.windows[:windows].tolist())
    assert few.states(model, "forward", False).shape[1] == len(few.tokens_of()["token"])
    assert few.attention(model, "forward", False).entropy.shape == (CONFIG.depth, CONFIG.heads)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("reading", "marked"), READ)
def test_attention_is_that_of_the_first_two_windows_without_padding(
    view: ActivationProbe, model: GPT, reading: str, marked: bool, masked: bool
) -> None:
    found = replace(view, masked=masked).attention(model, reading, marked)
    rows = [rows_by_hand(view, reading, marked, int(window)) for window in view.windows[:2]]
    ids = torch.tensor([row[0][:-1] for row in rows])
    segments = torch.tensor([row[2][:-1] for row in rows]) if masked else None
    expected = attention_statistics(model, ids, segments, ids != view.special.pad, MAP_POSITIONS)
    for name, figure in vars(expected).items():
        assert torch.allclose(getattr(found, name), figure, rtol=1e-5), name


def test_looking_leaves_the_model_in_training(view: ActivationProbe, model: GPT) -> None:
    model.train()
    view.states(model, "forward", False)
    view.attention(model, "forward", False)
    assert model.training
