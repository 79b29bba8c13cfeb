"""What a run that exists takes over from a new launch, and what stays with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bwlm.config import Experiment
from bwlm.grid.cells import going_on
from bwlm.model.compute import Compute
from bwlm.record.fingerprint import differences, identity
from bwlm.record.lineage import RunConfig

COMPUTE = Compute("bfloat16", "blocked", 512, True, 4, 2)


def run(precision: str = "bfloat16", **settings: Any) -> RunConfig:
    content = {"direction": "forward", "depth": 1, "budget": {"steps": 5}} | settings
    experiment = Experiment.model_validate(content)
    fields = identity(experiment, data="d", tokenizer="t", precision=precision, steps=5)
    return RunConfig("x", experiment, fields, 5, replace(COMPUTE, precision=precision), "corpus", "tokenizer")


def test_where_it_runs_and_what_it_keeps_is_taken_over_and_how_it_computes_stays() -> None:
    known = run()
    asked = run("float32", resources={"workers": 3, "cpus_per_worker": 5}, checkpoint={"every": 7})
    taken = going_on(known, asked)
    assert taken.experiment.resources == asked.experiment.resources
    assert taken.experiment.checkpoint == asked.experiment.checkpoint
    assert taken.compute == COMPUTE.with_threads(5)
    assert taken.compute.reasons["threads"] == "5 a worker"
    assert not differences(known.identity, taken.identity)  # planned on a machine that multiplies bfloat16 itself
    assert taken.fingerprint == known.fingerprint


def test_how_it_computes_changes_where_that_is_asked_for() -> None:
    known, asked = run(), run("float32", compute={"attention": "sdpa"})
    asked = replace(asked, compute=Compute("float32", "sdpa", 0, False, 2, 1))
    assert going_on(known, asked).compute == Compute("bfloat16", "sdpa", 0, False, 2, 1).with_threads(1)


def test_another_precision_that_is_asked_for_is_another_run() -> None:
    known, asked = run(), run("float32", compute={"precision": "float32"})
    assert differences(known.identity, going_on(known, asked).identity)
