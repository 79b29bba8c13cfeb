"""Links to parents, and the family that they make: nothing is lost and nothing hangs, whatever they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bwlm.errors import UserError
from bwlm.record.lineage import LINK, Lineage, LineageNode, ParentLink, check_order, read_link, skipped, write_link

MID = ParentLink("talk-base", "base", "step_000020", 20, "5a" * 32, ["talk-base"])


# ---- links ----


def test_a_link_is_read_back(tmp_path: Path) -> None:
    write_link(tmp_path, MID)
    assert read_link(tmp_path) == MID
    write_link(tmp_path, None)
    assert read_link(tmp_path) is None


def test_a_link_of_an_earlier_version_was_to_the_last_checkpoint(tmp_path: Path) -> None:
    write_link(tmp_path, MID)
    content = json.loads((tmp_path / LINK).read_text())
    assert content.pop("best") is False
    (tmp_path / LINK).write_text(json.dumps(content))
    assert read_link(tmp_path) == MID


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        {},
        {"parent": "a"},
        {"parent": 5},
        {"checkpoint": None},
        {"sha256": ["5a"]},
        {"step": "20"},
        {"step": True},
        {"phase": "pretraining"},
        {"phase": ["base"]},
        {"chain": "talk-base"},
        {"chain": [5]},
        {"besides": 1},
        {"best": "yes"},
    ],
    ids=str,
)
def test_a_damaged_link_is_told_with_its_file(damaged: Any, tmp_path: Path) -> None:
    write_link(tmp_path, MID)
    whole = json.loads((tmp_path / LINK).read_text())
    content = whole | damaged if isinstance(damaged, dict) and damaged not in ({}, {"parent": "a"}) else damaged
    (tmp_path / LINK).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"parent_link\.json: not the link of a run to its parent") as told:
        read_link(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("parent", ["../x", "", "cache", "a/b"])
def test_a_parent_is_never_a_path(parent: str, tmp_path: Path) -> None:
    write_link(tmp_path, MID)
    content = json.loads((tmp_path / LINK).read_text())
    (tmp_path / LINK).write_text(json.dumps(content | {"parent": parent}))
    with pytest.raises(UserError, match=r"parent_link\.json: parent: .* is (not a valid id|reserved)"):
        read_link(tmp_path)


@pytest.mark.parametrize(
    ("phase", "parent", "without"),
    [("mid", "base", []), ("sft", "mid", []), ("sft", "base", ["mid"]), ("rl", "sft", [])],
)
def test_what_is_skipped(phase: str, parent: str, without: list[str]) -> None:
    check_order(phase, "p", parent)
    assert skipped(phase, parent) == without


# ---- families ----

TALK = {"talk-base": None, "talk-mid": "talk-base", "talk-sft": "talk-mid", "talk-two": "talk-mid", "alone": None}


def ids(trees: list[LineageNode]) -> list[str]:
    return [run for kin in trees for run in (kin.id, *ids(list(kin.children)))]


def test_a_family_as_a_tree() -> None:
    family = Lineage(TALK)
    mid = LineageNode("talk-mid", (LineageNode("talk-sft"), LineageNode("talk-two")))
    assert family.trees() == [LineageNode("alone"), LineageNode("talk-base", (mid,))]
    assert family.children("talk-mid") == ["talk-sft", "talk-two"]
    assert family.children("talk-sft") == []
    assert family.ancestors("talk-two") == ["talk-mid", "talk-base"]
    assert family.ancestors("talk-base") == []
    assert family.descendants("talk-base") == ["talk-mid", "talk-sft", "talk-two"]


def test_around_a_run_are_its_ancestors_and_descendants_alone() -> None:
    family = Lineage(TALK)
    assert ids(family.around(["talk-two"]).trees()) == ["talk-base", "talk-mid", "talk-two"]
    assert ids(family.around(["talk-base"]).trees()) == ["talk-base", "talk-mid", "talk-sft", "talk-two"]
    assert ids(family.around(["talk-sft", "alone"]).trees()) == ["alone", "talk-base", "talk-mid", "talk-sft"]
    assert family.around([]).trees() == []


def test_a_run_whose_parent_is_gone_stands_at_the_top_and_says_so() -> None:
    family = Lineage({"a": "gone", "b": "a", "c": "gone"})
    note = "its parent gone is not here"
    assert family.trees() == [LineageNode("a", (LineageNode("b"),), note), LineageNode("c", (), note)]
    assert family.children("gone") == ["a", "c"]
    assert family.ancestors("b") == ["a"]
    assert family.around(["b"]).trees() == [LineageNode("a", (LineageNode("b"),), note)]


def test_a_circle_is_told_once_and_hides_nobody() -> None:
    family = Lineage({"b": "c", "c": "a", "a": "b", "child": "a", "its": "child", "alone": None})
    [alone, circle] = sorted(family.trees(), key=lambda kin: kin.id != "alone")
    assert alone == LineageNode("alone")
    assert circle.note == "damaged links go in a circle: a > c > b > a"
    assert circle == LineageNode(
        "a", (LineageNode("c", (LineageNode("b"),)), LineageNode("child", (LineageNode("its"),))), circle.note
    )
    assert family.ancestors("its") == ["child", "a", "b", "c"]
    assert family.descendants("a") == ["c", "child", "b", "its"]
    assert ids(family.around(["its"]).trees()) == ["a", "c", "b", "child", "its"]


def test_a_run_that_is_its_own_parent() -> None:
    family = Lineage({"a": "a", "b": "a"})
    assert family.trees() == [LineageNode("a", (LineageNode("b"),), "damaged links go in a circle: a > a")]
    assert family.ancestors("a") == []
    assert family.descendants("a") == ["b"]


RUNS = "abcdefg"


@given(st.dictionaries(st.sampled_from(RUNS), st.none() | st.sampled_from(RUNS + "xy")), st.sets(st.sampled_from(RUNS)))
def test_whatever_links_say_each_run_appears_once(parents: dict[str, str | None], chosen: set[str]) -> None:
    family = Lineage(parents)
    assert sorted(ids(family.trees())) == sorted(parents)

    def check(kin: LineageNode) -> None:
        for child in kin.children:
            assert parents[child.id] == kin.id
            assert not child.note
            check(child)

    for kin in family.trees():
        assert bool(kin.note) == (parents[kin.id] is not None)
        check(kin)
    part = ids(family.around(chosen & parents.keys()).trees())
    assert chosen & parents.keys() <= set(part) <= parents.keys()
    assert len(set(part)) == len(part)
