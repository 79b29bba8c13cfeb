"""A range of workers: what it may be, which counts it leaves, and that it is no part of what a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bwlm.cluster.capacity import cpus_of_cell
from bwlm.cluster.placement import bundles_of
from bwlm.config import Experiment, ResourceSettings, WorkerRange
from bwlm.errors import UserError
from bwlm.plan.limits import plan_warnings
from bwlm.plan.load import load_grid, plan_experiment
from bwlm.plan.resolve import worker_counts
from bwlm.plan.spec import LaunchSettings
from bwlm.record.fingerprint import identity
from tests.grids import GridFile


def resources(settings: Any) -> ResourceSettings:
    return ResourceSettings.model_validate({"workers": settings, "cpus_per_worker": 2})


def experiment(grid_file: GridFile, *settings: str) -> Experiment:
    return load_grid(grid_file(), list(settings)).cells[0].experiment


def test_a_range_is_planned_by_its_fewest_workers() -> None:
    elastic, one, three = resources({"min": 2, "max": 4}), resources(1), resources(3)
    assert elastic.workers == WorkerRange(min=2, max=4)
    assert [(each.fewest, each.most) for each in (elastic, one, three)] == [(2, 4), (1, 1), (3, 3)]
    assert [each.drives_group for each in (resources({"min": 1, "max": 1}), one, three)] == [True, False, True]
    assert bundles_of(elastic) == [{"CPU": 2.0}, {"CPU": 2.0}, {"node:__internal_head__": 0.001}]
    assert cpus_of_cell(elastic) == 4
    assert elastic.with_workers(3) == three


def test_a_range_is_stored_as_it_was_given_and_a_number_as_ever() -> None:
    for settings in ({"min": 1, "max": 4}, 3):
        stored = resources(settings).model_dump(mode="json")
        assert stored == {"workers": settings, "cpus_per_worker": 2, "gpus_per_worker": 0}
        assert ResourceSettings.model_validate(stored) == resources(settings)


def test_a_range_changes_nothing_of_what_a_run_is(grid_file: GridFile) -> None:
    """The identity holds no range and no number of workers, and the batch that depth chooses stays the same."""
    without = "budget={steps: 12}"
    plain, elastic = (experiment(grid_file, without, *more) for more in ([], ["resources.workers={min: 1, max: 4}"]))
    fields = {"data": "d", "tokenizer": "t", "precision": "float32", "steps": 12}
    assert identity(plain, **fields) == identity(elastic, **fields)


@pytest.mark.parametrize(
    ("rows", "settings", "counts"),
    [
        (8, "{min: 1, max: 4}", (1, 2, 4)),
        (8, "{min: 2, max: 8}", (2, 4, 8)),
        (7, "{min: 1, max: 4}", (1,)),
        (8, "2", (2,)),
    ],
)
def test_counts_share_the_rows_of_a_step(
    grid_file: GridFile, rows: int, settings: str, counts: tuple[int, ...]
) -> None:
    found = experiment(grid_file, f"resources.workers={settings}", f"budget.batch_tokens={64 * rows}")
    assert worker_counts(found) == counts


def test_counts_share_the_prompts_of_an_rl_step_too() -> None:
    known = Experiment.model_validate(
        {
            "phase": "rl",
            "parent": "p",
            "direction": "forward",
            "depth": 1,
            "data": {"mixture": {"gsm8k": 1.0}},
            "model": {"sequence_length": 64},
            "budget": {"steps": 3, "batch_tokens": 64 * 12},
            "rl": {"prompts": 6, "samples": 4, "new_tokens": 16},
            "resources": {"workers": {"min": 1, "max": 4}},
        }
    )
    assert worker_counts(known) == (1, 2, 3)


def test_a_plan_says_which_counts_a_cell_can_have(grid_file: GridFile, tmp_path: Path) -> None:
    def warned(settings: str) -> list[str]:
        cells = load_grid(grid_file(), [f"resources.workers={settings}"]).cells
        return list(plan_warnings(cells, LaunchSettings(), tmp_path, None))

    assert warned("{min: 1, max: 4}") == [
        "workers: of 1 to 4 only 1, 2, 4 share the rows of a step evenly, so a cell has one of these "
        "(resources.workers)"
    ]
    assert warned("{min: 1, max: 2}") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resources.workers={min: 3, max: 4}"], "8 rows a step cannot be shared by resources.workers.min=3: take a"),
        (["resources.workers={min: 3, max: 1}"], r"workers: a range goes from min up to max: write {min: 1, max: 4}"),
        (["resources.workers={min: 0, max: 1}"], r"workers: a range goes from min up to max: write {min: 1, max: 4}"),
        (["resources.workers={min: 1, most: 4}"], r"\(found {'min': 1, 'most': 4}\)"),
        (["resources.workers={min: 1, max: 4, by: 2}"], r"a range goes from min up to max"),
        (["resources.workers={min: 1, max: 1.5}"], r"a range goes from min up to max"),
        (["resources.workers=0"], r"--set resources.workers: input should be greater than or equal to 1"),
        (["resources.workers=many"], r"--set resources.workers: must be a whole number.*found 'many'"),
        (["resources={workers: {min: 1, max: 2}, gpus_per_worker: 0.5}"], "several workers need a GPU each.*workers 2"),
    ],
)
def test_what_is_no_range_is_refused_in_one_line(grid_file: GridFile, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_grid(grid_file(), settings)
    assert "\n" not in str(refused.value)


def test_an_experiment_of_the_command_line_takes_a_range_too(corpus: Path) -> None:
    flags = {"phase": "base", "direction": "forward", "depth": 1}
    plan = plan_experiment(flags, [f"data.source={corpus}", "resources.workers={min: 1, max: 2}"], "x")
    assert plan.cells[0].experiment.resources.workers == WorkerRange(min=1, max=2)
