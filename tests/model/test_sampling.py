"""The choice of the next id: each filter by hand, and draws as often as the filtered probabilities say."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from bwlm.model.sampling import Sampling, choose

P = [0.5, 0.25, 0.15, 0.1]
"""Probabilities of four ids."""
LOGITS = torch.tensor([P]).log()


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS, rows: list[list[int]] | None = None) -> list[float]:
    """How often each id is chosen in 4,000 draws."""
    draws = 4_000
    random = [Random(f"{n}") for n in range(draws)]
    chosen = choose(logits.expand(draws, -1), sampling, random, (rows or [[]]) * draws)
    counts = Counter(chosen)
    return [counts[id] / draws for id in range(logits.size(1))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),  # squares, 0.345 in all
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, P),
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # the first id reaches 0.5
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.9}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"min_p": 0.3}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),  # at least 0.15
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"banned": frozenset({0})}, [0, 0.5, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),  # of 0.9: 0.556, then 0.833 reaches 0.8
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
    ],
)
def test_ids_are_chosen_as_often_as_the_filters_say(settings: dict[str, Any], expected: list[float]) -> None:
    found = frequencies(Sampling(**({"temperature": 1.0} | settings)))
    assert found == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_equal_ids_are_left_out_together() -> None:
    assert frequencies(Sampling(1.0, top_p=0.3), torch.zeros(1, 4)) == pytest.approx([0.25] * 4, abs=0.03)


def test_the_penalty_divides_positive_logits_of_the_row_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    assert choose(logits, Sampling(repetition_penalty=2.0), [], [[0]]) == [1]  # 2 becomes 1
    assert choose(logits, Sampling(repetition_penalty=2.0), [], [[0, 1]]) == [0]  # 1 and 0.75
    low = torch.tensor([[-1.0, -1.2]])
    assert choose(low, Sampling(repetition_penalty=2.0), [], [[0]]) == [1]  # -1 becomes -2
    assert logits.tolist() == [[2.0, 1.5, -1.0, pytest.approx(-1.2)]], "the logits themselves stay"


def test_rows_of_a_batch_are_penalised_each_by_its_own_ids() -> None:
    logits = torch.tensor([[2.0, 1.5], [2.0, 1.5]])
    assert choose(logits, Sampling(repetition_penalty=2.0), [], [[0], []]) == [1, 0]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
    ],
)
def test_values_out_of_their_range_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Sampling(**settings)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e300])
def test_the_extremes_of_all_settings_still_choose_an_id(penalty: float, temperature: float) -> None:
    logits = torch.tensor([[15.0, -15.0, 14.0, 0.0]])  # as large as the model's cap lets them be
    sampling = Sampling(temperature, top_p=1e-12, repetition_penalty=penalty)
    assert choose(logits, sampling, [Random("0")], [[0, 1]])[0] in range(4)


@pytest.mark.parametrize("banned", [{4}, {-1}, {0, 1, 2, 3}])
def test_banned_ids_leave_something_of_the_vocabulary(banned: set[int]) -> None:
    with pytest.raises(ValueError, match="banned"):
        Sampling(banned=frozenset(banned)).check_vocabulary(4)
