"""Phases and directions stand in their tables: a choice by name elsewhere is one more place to touch for a new one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from bwlm.analysis.charts.style import PALETTE
from bwlm.directions import DIRECTIONS, READINGS, TEXT_READINGS, DirectionName, is_marked, opposite, own_readings
from bwlm.phases import FIRST, LATER, PHASES, PhaseName, order
from bwlm.record.researchlog_schema import GROUPS
from bwlm.trained.model_card import _READS, _SNIPPETS

ROOT = Path(__file__).parent.parent
TABLES = ("bwlm/phases.py", "bwlm/directions.py")
EXCEPTIONS = {
    "bwlm/analysis/charts/style.py": "colours are the charts' own",
    "bwlm/trained/model_card.py": "each direction's card has words of its own",
    "bwlm/trained/chat_template.py": "only text that is read forward has a template",
    "bwlm/record/fingerprint.py": "`rl` is the section of settings of that name",
    "bwlm/text/direction.py": "the transforms themselves",
    "bwlm/text/conversation.py": "the marker of a reading is a field of the tokenizer",
}
NAMES = {*PHASES, *DIRECTIONS}


def literals(path: Path) -> list[str]:
    """Names of phases and directions that a module holds as strings, docstrings aside."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]


def test_no_phase_or_direction_is_named_outside_the_tables() -> None:
    files = [path for folder in ("bwlm", "tasks", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
    allowed = {*TABLES, *EXCEPTIONS}
    found = [one for path in files if str(path.relative_to(ROOT)) not in allowed for one in literals(path)]
    assert not found, "ask bwlm/phases.py or bwlm/directions.py, or give a reason in EXCEPTIONS"


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_is_needed(name: str) -> None:
    assert literals(ROOT / name)


def test_the_tables_are_whole() -> None:
    assert tuple(PHASES) == get_args(PhaseName)
    assert tuple(DIRECTIONS) == get_args(DirectionName)
    assert (FIRST, *LATER) == tuple(PHASES)
    assert not PHASES[FIRST].follows
    for name in LATER:
        assert PHASES[name].follows
        assert all(order(before) < order(name) for before in PHASES[name].follows)
        assert PHASES[name].reads_documents or PHASES[name].defaults["data.mixture"]
    for name in PHASES:
        assert (ROOT / "bwlm" / "train" / f"{name}.py").exists()
    for name in DIRECTIONS:
        assert set(own_readings(name)) <= set(READINGS)
        assert is_marked(name) == (len(own_readings(name)) == 2)
    assert list(PALETTE) == list(DIRECTIONS), "charts leave out a direction without a colour"
    assert set(_READS) == set(_SNIPPETS) == set(DIRECTIONS), "an export needs words for its card"
    assert {f"loss_{reading}" for reading in READINGS} <= GROUPS["train"].columns.keys()
    assert [opposite(reading) for reading in TEXT_READINGS] == list(TEXT_READINGS[::-1])
