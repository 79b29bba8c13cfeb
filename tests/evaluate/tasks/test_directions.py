"""Metrics of a model in its own and in the other direction, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bwlm.evaluate.tasks.directions import direction_metrics


def rows(*correct: float, rule: str = "conditional", control: str | None = None) -> list[dict[str, Any]]:
    return [
        {"item": f"i{n}", "form": "cloze", "rule": rule, "control": control, "correct": share}
        for n, share in enumerate(correct)
    ]


def test_a_model_of_one_direction_has_a_gap() -> None:
    examples = {"forward": rows(1, 1, 0, 1), "backward": rows(0, 1, 0, 0)}
    [forward] = direction_metrics("arc", "forward", examples)
    assert (forward.native, forward.crossed, forward.difference, forward.items) == (0.75, 0.25, 0.5, 4)
    low, high = forward.interval
    assert low < 0.5 < high
    [backward] = direction_metrics("arc", "backward", examples)
    assert (backward.native, backward.crossed, backward.difference) == (0.25, 0.75, -0.5)
    assert backward.interval == pytest.approx((-high, -low))
    assert backward.words.startswith(
        "arc, cloze, conditional: 25.0% in its own direction, 75.0% in the other: -50.0 points"
    )


def test_a_bidirectional_model_has_a_balance() -> None:
    [both] = direction_metrics("arc", "bidirectional", {"forward": rows(1, 1, 0, 1), "backward": rows(0, 1, 0, 0)})
    assert (both.native, both.crossed, both.difference) == (0.5, None, 0.5)
    assert "50.0% over both directions; forward minus backward +50.0 points" in both.words


def test_controls_other_rules_and_attempts_are_kept_apart() -> None:
    forward = rows(1, 0) + rows(0, 0, rule="answer_first") + rows(0, 0, control="prior") + rows(0, 0)  # two attempts
    [one] = direction_metrics("gsm8k", "forward", {"forward": forward, "backward": rows(0, 0)})
    assert (one.rule, one.native, one.items) == ("conditional", 0.25, 2)


def test_a_permuted_model_and_one_reading_alone_have_no_metrics() -> None:
    examples = {"forward": rows(1), "backward": rows(1)}
    assert not list(direction_metrics("arc", "permuted", examples))
    assert not list(direction_metrics("arc", "forward", {"forward": rows(1)}))
