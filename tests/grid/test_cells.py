"""What a run that exists takes over from a new launch, and what stays with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.grid import hardware
from bwlm.grid.announce import tell_unchecked_text
from bwlm.grid.cells import PlannedCell, changes, check_same, other_settings, resume_config, with_code_of
from bwlm.grid.hardware import compiled_if_it_can
from bwlm.model.compute import Compute
from bwlm.plan.spec import Cell, LaunchSettings, Plan, SchedulerSettings
from bwlm.record.code import IDENTITY_VERSION
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import differences, identity
from bwlm.record.lineage import ParentLink
from bwlm.record.run_config import RunConfig

COMPUTE = Compute("bfloat16", "blocked", 512, True, 4, 2)


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works, without the seconds of a trial (tests/model/test_compute.py)."""
    monkeypatch.setattr(hardware, "_why_not_compile", lambda device: "")


def run(precision: str = "bfloat16", **settings: Any) -> RunConfig:
    content = {"direction": "forward", "depth": 1, "budget": {"steps": 5}} | settings
    experiment = Experiment.model_validate(content)
    fields = identity(experiment, data="d", tokenizer="t", precision=precision, steps=5)
    return RunConfig("x", experiment, fields, 5, replace(COMPUTE, precision=precision), "corpus", "tokenizer")


def test_where_it_runs_and_what_it_keeps_is_taken_over_and_how_it_computes_stays() -> None:
    known = run()
    asked = run("float32", resources={"workers": 3, "cpus_per_worker": 5}, checkpoint={"every": 7})
    taken = resume_config(known, asked)
    assert taken.experiment.resources == asked.experiment.resources
    assert taken.experiment.checkpoint == asked.experiment.checkpoint
    assert taken.compute == COMPUTE.with_threads(5)
    assert taken.compute.reasons["threads"] == "5 a worker"
    assert not differences(known.identity, taken.identity)  # planned on a machine that multiplies bfloat16 itself
    assert taken.fingerprint == known.fingerprint


def test_the_tasks_that_score_a_run_are_those_of_the_newest_launch() -> None:
    known = run(evaluation={"tasks": ["mmlu"], "max_examples": 400}, tasks={"mmlu": {"path": "/a"}})
    asked = run(evaluation={"tasks": ["arc_easy"]}, tasks={"arc_easy": {"path": "/b"}})
    taken = resume_config(known, asked).experiment
    assert (taken.evaluation, taken.tasks) == (asked.experiment.evaluation, asked.experiment.tasks)
    assert known.fingerprint == asked.fingerprint


def test_a_run_that_has_not_begun_computes_as_this_machine_does_best() -> None:
    """Unless that would be in another precision, which is part of what the run is and which sizes were chosen for."""
    known, asked = run(), replace(run(), compute=Compute("bfloat16", "sdpa", 0, False, 2, 1))
    assert resume_config(known, asked, begun=False).compute == asked.compute.with_threads(1)
    assert resume_config(known, asked).compute == COMPUTE.with_threads(1)
    other = replace(run("float32"), compute=Compute("float32", "sdpa", 0, False, 2, 1))
    assert resume_config(known, other, begun=False).compute == COMPUTE.with_threads(1)


def test_how_it_computes_changes_where_that_is_asked_for() -> None:
    known, asked = run(), run("float32", compute={"attention": "sdpa"})
    asked = replace(asked, compute=Compute("float32", "sdpa", 0, False, 2, 1))
    assert resume_config(known, asked).compute == Compute("bfloat16", "sdpa", 0, False, 2, 1).with_threads(1)


def test_another_precision_that_is_asked_for_is_another_run() -> None:
    known, asked = run(), run("float32", compute={"precision": "float32"})
    assert differences(known.identity, resume_config(known, asked).identity)


def test_a_run_whose_text_counted_by_time_stays_the_same_run_launch_after_launch(tmp_path: Path) -> None:
    """Also one that had not begun, which today's code then trains: its text keeps the digest of the older version."""
    talks = {"phase": "sft", "parent": "p", "data": {"mixture": {"talks.jsonl": 1.0}}}
    known = replace(run(**talks), identity_version=2)
    asked = replace(known, identity=known.identity | {"data": "e"}, identity_version=IDENTITY_VERSION)
    folder = ExperimentFolder(tmp_path, "x")
    planned = PlannedCell(Cell("x", known.experiment, 5), folder, Status(), [], "code: older")
    for _ in range(3):
        taken = with_code_of(known, resume_config(known, asked, begun=False), planned)
        assert other_settings(known.identity, taken.identity) == []
        known = taken
    assert known.identity["code"] == asked.identity["code"]


def test_tasks_that_are_to_score_a_run_whose_text_counted_by_time_leave_it_the_same_run() -> None:
    talks = {"phase": "sft", "parent": "p", "data": {"mixture": {"talks": 1.0}}, "tasks": {"talks": {"path": "a"}}}
    known = replace(run(**talks), identity_version=2)
    for tasks, is_same in (
        ({"talks": {"path": "a"}, "arc_easy": {"path": "arc"}}, True),
        ({"talks": {"path": "b"}}, False),
    ):
        asked = run(**talks | {"tasks": tasks, "evaluation": {"tasks": ["arc_easy"]}})
        asked = replace(asked, identity=asked.identity | {"data": "e"}, identity_version=IDENTITY_VERSION)
        assert (other_settings(known.identity, resume_config(known, asked).identity) == []) == is_same


@pytest.mark.parametrize(
    ("version", "status", "told"),
    [(2, Status("stopped", "", 3), True), (2, Status("finished", "", 5), False), (3, Status("stopped", "", 3), False)],
)
def test_a_begun_run_whose_text_counted_by_time_says_that_its_text_cannot_be_checked(
    version: int, status: Status, told: bool, tmp_path: Path
) -> None:
    """A finished run reads no text any more, and a run of today's version has a digest by content."""
    config = replace(run(phase="sft", parent="p", data={"mixture": {"talks.jsonl": 1.0}}), identity_version=version)
    folder = ExperimentFolder(tmp_path, "x")
    folder.create(config, ParentLink("p", "base", "step_000020", 20, "5a" * 32, ["p"]))
    lines: list[str] = []
    tell_unchecked_text([PlannedCell(Cell("x", config.experiment, 5), folder, status, [])], lines.append)
    assert [line.partition(":")[0] for line in lines] == ["x"] * told
    assert all("data.mixture has changed since then cannot be checked" in line for line in lines)


def test_another_text_is_told_by_name_and_the_same_name_by_short_digests() -> None:
    known = run(data={"source": "notes"})
    digests = known.identity | {"data": "a" * 64, "tokenizer": "b" * 64}
    other = known.identity | {"data": "c" * 64, "tokenizer": "d" * 64}
    known, edited = replace(known, identity=digests), replace(known, identity=other)
    assert changes(known, edited) == ["text of notes: digest aaaaaaaaaaaa -> cccccccccccc"]
    moved = replace(edited, experiment=run(data={"source": "letters", "validation": "held"}).experiment)
    assert changes(known, moved) == ["text: notes -> letters, validation held"]
    assert changes(known, replace(known, identity=digests | {"tokenizer": "d" * 64, "lr": 2.0})) == [
        "lr: 1.0 -> 2.0",
        "tokenizer: bbbbbbbbbbbb -> dddddddddddd",
    ]


def test_a_refused_launch_names_the_command_that_deletes_what_differs(tmp_path: Path) -> None:
    planned = [
        PlannedCell(Cell(name, run().experiment, 5), ExperimentFolder(tmp_path, name), Status(), ["lr: 1 -> 2"])
        for name in ("a", "b", "c")
    ]
    plan = Plan("g", tuple(one.cell for one in planned), LaunchSettings(), SchedulerSettings(), "name: g")
    for beside, told in (
        ([], r"^g: cell a exists with .* or delete it: bwlm runs delete a$"),
        (["a", "b"], r"^g: cell a and 1 more exist with .* or delete them: bwlm runs delete a b$"),
        (["a", "b", "c"], r"^g: cell a and 2 more exist with .* or delete them: bwlm runs delete g$"),
    ):
        with pytest.raises(UserError, match=told):
            check_same(planned[0], planned[0].changed, plan, accept_code=False, beside=beside)


def test_a_compiled_run_goes_on_where_the_compiler_fails_unless_compiling_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "_why_not_compile", lambda device: f"no g++ for {device}")
    taken = compiled_if_it_can(run()).compute
    assert not taken.compile
    assert taken.reasons["compile"] == "off: torch.compile fails here (no g++ for cpu)"
    assert replace(taken, compile=True, reasons={}) == COMPUTE
    with pytest.raises(
        UserError, match=r"^compute\.compile: true, but torch\.compile fails here \(no g\+\+ for cpu\): "
    ):
        compiled_if_it_can(run(compute={"compile": True}))
