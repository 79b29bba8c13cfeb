"""Figures of results over several tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bwlm.evaluate.tasks.results import TaskScore, centred_means

ONE = TaskScore("r", 4, "core:a", "cloze", None, "forward", "conditional", True, "scored", accuracy=0.5, centred=0.2)


def test_the_mean_of_a_suite_has_its_continuations_in_every_rule() -> None:
    scores = [
        ONE,
        replace(ONE, rule="joint", centred=0.4),
        replace(ONE, task="core:b", centred=-0.1),
        replace(ONE, task="core:b", rule="joint", status="not_applicable", centred=None),
        replace(ONE, task="core:text", rule="exact", centred=0.5),
        replace(ONE, control="shuffled", centred=0.9),
        replace(ONE, direction="backward", centred=0.7),
        replace(ONE, task="mmlu", centred=None),
        replace(ONE, task="mmlu:anatomy", centred=None),
    ]
    conditional, joint = centred_means(scores)  # one task alone has no mean: backward
    assert (conditional.rule, conditional.tasks, conditional.missing) == ("conditional", 3, 0)
    assert conditional.centred == pytest.approx((0.2 - 0.1 + 0.5) / 3)
    assert (joint.centred, joint.tasks, joint.missing) == (pytest.approx(0.45), 2, 1)
    assert joint.words == "core, forward, joint: centred mean 0.4500 over 2 tasks; 1 without a score"


def test_a_suite_of_continuations_alone_has_a_mean_too() -> None:
    texts = [replace(ONE, task=f"core:{n}", rule="exact", centred=n / 10) for n in (1, 2)]
    [mean] = centred_means(texts)
    assert (mean.rule, mean.centred, mean.tasks) == ("exact", pytest.approx(0.15), 2)
