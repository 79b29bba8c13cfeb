"""Names of checkpoints: what they mean in a run's folder, and a line for each that names none."""

from __future__ import annotations

import pytest

from bwlm.errors import UserError
from bwlm.record.checkpoint import KeepPolicy, write_checkpoint
from bwlm.record.checkpoint_name import CheckpointName, run_of
from bwlm.record.experiment import ExperimentFolder
from tests.families import validated
from tests.faults.checkpoints import snapshot
from tests.runs import NewRun

BPB = {5: 2.0, 10: 1.5, 15: 1.5, 20: 1.75}
"""Validation figures by step; steps 10 and 15 are equally good."""


@pytest.fixture
def run(new_run: NewRun) -> ExperimentFolder:
    folder = new_run("a", checkpoint={"every": 5, "keep": 1}, budget={"steps": 20, "batch_tokens": 512})
    return validated(folder, val_bpb_tuning=BPB)


def save(run: ExperimentFolder, keep: KeepPolicy, figures: dict[int, float | None] | None = None) -> None:
    for step, figure in (figures or BPB).items():
        write_checkpoint(run.checkpoints, snapshot(step, figure), keep)


def refusal(run: ExperimentFolder, name: str) -> str:
    with pytest.raises(UserError) as told:
        CheckpointName.parse(name).step_in(run)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_name_is_a_run_and_the_last_a_given_or_the_best_checkpoint() -> None:
    assert [CheckpointName.parse(name) for name in ("a", "a@400", "a@best")] == [
        CheckpointName("a"), CheckpointName("a", "400"), CheckpointName("a", "best")
    ]  # fmt: skip
    assert (run_of("a@best"), run_of("a"), run_of(None)) == ("a", "a", None)


@pytest.mark.parametrize("name", ["a@", "a@last", "a@-1", "a@1.5", "a@1@2", "a@²"])
def test_a_name_that_is_none_says_how_one_looks(name: str) -> None:
    with pytest.raises(UserError, match=r"after @ comes a step or best, as in a@400 or a@best$"):
        CheckpointName.parse(name)


def test_the_best_is_the_earliest_with_the_lowest_figure(run: ExperimentFolder) -> None:
    save(run, KeepPolicy(last=4))
    found = {name: CheckpointName.parse(name).step_in(run) for name in ("a", "a@5", "a@000015", "a@best")}
    assert found == {"a": 20, "a@5": 5, "a@000015": 15, "a@best": 10}


def test_keep_best_keeps_the_best(run: ExperimentFolder) -> None:
    save(run, KeepPolicy(last=1, best=True))
    assert CheckpointName.parse("a@best").step_in(run) == 10
    assert refusal(run, "a@15") == "a: no checkpoint of step 15: choose from 10, 20"


def test_a_best_that_was_deleted_has_no_substitute(run: ExperimentFolder) -> None:
    """The best of what is left would pass for the best of the run."""
    save(run, KeepPolicy(last=1))
    assert refusal(run, "a@best") == (
        "a: a better checkpoint, of step 10 (val_bpb_tuning 1.5000), was not kept: choose from 20, or train with "
        "checkpoint.keep_best=true"
    )


def test_a_better_validation_without_a_checkpoint_is_no_better_checkpoint(run: ExperimentFolder) -> None:
    save(run, KeepPolicy(last=4))
    validated(run, val_bpb_tuning=BPB | {7: 1.0})
    assert CheckpointName.parse("a@best").step_in(run) == 10


def test_where_no_checkpoint_was_validated_none_is_the_best(run: ExperimentFolder) -> None:
    save(run, KeepPolicy(last=4), {5: None, 20: None})
    line = refusal(run, "a@best")
    assert line == "a: no checkpoint was validated at its step, so none is the best: choose from 5, 20"


def test_a_run_without_checkpoints_is_told(run: ExperimentFolder) -> None:
    assert refusal(run, "a@5").startswith("a: no checkpoint in ")
