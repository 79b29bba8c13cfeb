"""pass@k: hand-worked values, and the chance that it estimates."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bwlm.stats.pass_at_k import pass_at_k


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"),
    [
        (1, 0, 1, 0),
        (1, 1, 1, 1),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # of the 6 pairs of attempts 3 hold the right one
        (5, 2, 3, 9 / 10),  # of the 10 triples only one holds none of the two
        (5, 3, 3, 1),
        (5, 0, 5, 0),
    ],
)
def test_worked_by_hand(n: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(expected)


@given(st.data())
def test_it_is_the_share_of_the_choices_of_k_attempts_that_hold_a_right_one(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations([attempt < right for attempt in range(n)], k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_fewer_attempts_than_k_cannot_tell(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= right <= n"):
        pass_at_k(n, right, k)
