"""Cells that the scheduler stopped: they keep checkpoints, stay out of verdicts, and go on by request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bwlm.analysis.runs.findings import find
from bwlm.errors import UserError
from bwlm.grid.cells import PlannedCell, find_cells
from bwlm.grid.continued import choose_stopped, is_continued, reopen
from bwlm.grid.launch import run_plan
from bwlm.grid.scheduling import DirectionwiseASHA, build_scheduler
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Cell, LaunchSettings, Plan, SchedulerSettings
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import read_journal
from bwlm.train.termination import Termination
from tests.analysis.storage import finish, make_cell
from tests.grids import GridFile
from tests.runs import NewRun
from tests.shell import Shell

EARLY = Status("stopped", "by the scheduler at step 10", 10)


def plan_of(folders: list[ExperimentFolder]) -> Plan:
    configs = [folder.config() for folder in folders]
    cells = tuple(Cell(config.id, config.experiment, config.steps) for config in configs)
    return Plan("g", cells, LaunchSettings(), SchedulerSettings(kind="asha"), "name: g")


@pytest.fixture
def cells(new_run: NewRun) -> list[ExperimentFolder]:
    """Three rates of one direction: finished, stopped early, not begun."""
    made = [new_run(f"g_forward_d1_lr{lr:g}_s0", lr=lr) for lr in (1.0, 0.5, 0.25)]
    made[0].write_status(Status("finished", "", 12))
    made[1].write_status(EARLY)
    return made


def test_ids_and_globs_choose_the_stopped_ones(cells: list[ExperimentFolder], tmp_path: Path) -> None:
    plan, stopped = plan_of(cells), cells[1].id

    def chosen(*names: str) -> list[str]:
        return [one.cell.id for one in choose_stopped(plan, tmp_path, list(names))]

    assert chosen(stopped) == chosen("g_forward_*") == chosen("*0.5*", stopped) == [stopped]
    for name, told in {
        cells[0].id: f"are continued; `bwlm grid run g --storage {tmp_path}` trains the others",
        cells[2].id: "is waiting: only cells that the scheduler stopped early are continued",
        "g_backward_*": "the scheduler has stopped no such cell of g",
        stopped[:-1] + "7": f"no such cell of g (did you mean '{stopped}'?)",
    }.items():
        with pytest.raises(UserError) as caught:
            chosen(name)
        assert told in str(caught.value)


def test_a_reopened_cell_goes_on_and_competes_with_nobody(cells: list[ExperimentFolder], tmp_path: Path) -> None:
    plan, folder = plan_of(cells), cells[1]
    [planned] = choose_stopped(plan, tmp_path, [folder.id])
    assert planned.is_done
    [_, going_on, _] = find_cells(replace(plan, continued=frozenset({folder.id})), tmp_path)
    assert not going_on.is_done, "a launch that continues it trains it"
    assert folder.status() == EARLY
    reopen(folder)
    reopen(folder)
    [again] = choose_stopped(plan, tmp_path, [folder.id])
    assert not again.is_done
    assert is_continued(folder)
    others = [PlannedCell(cell, ExperimentFolder(tmp_path, cell.id), Status(), []) for cell in plan.cells]
    scheduler = build_scheduler(plan, others, tmp_path, Termination())
    assert isinstance(scheduler, DirectionwiseASHA)
    strata = scheduler._strata
    assert strata[cells[0].id] == strata[cells[2].id] != strata[folder.id]
    folder.write_status(Status("finished", "", 20))
    with pytest.raises(UserError, match="is finished: only cells"):
        choose_stopped(plan, tmp_path, [folder.id])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "launch.limit.money: g_forward_d1_lr1_s0 has no price"),
        (["budget.steps=20"], "cell g_forward_d1_lr1_s0 and 1 more exist with other settings (steps: 12 -> 20)"),
    ],
    ids=["a fault of the launch", "other settings"],
)
def test_a_launch_that_is_refused_leaves_the_cell_stopped(
    settings: list[str], told: str, cells: list[ExperimentFolder], grid_file: GridFile, shell: Shell
) -> None:
    path = grid_file(
        axes={"direction": ["forward"], "depth": [1], "lr": [1.0, 0.5], "seed": [0]},
        evaluation={"every": 5, "tokens": 1024},
        launch={"limit": {"money": 5.0}},
    )
    stopped = cells[1]
    storage = str(stopped.path.parent)
    changes = [word for one in settings for word in ("--set", one)]
    answer = shell("grid", "continue", str(path), stopped.id, "--storage", storage, *changes)
    assert answer.code == 2
    assert told in answer.err
    assert stopped.status() == EARLY
    assert not is_continued(stopped)


def test_a_stopped_cell_takes_no_part_in_a_verdict(tmp_path: Path) -> None:
    """Not even if its loss was the lowest when it was stopped, as at a rate that overfits."""
    losses = {"forward": [3.0] * 8, "backward": [3.1] * 8}
    best = {"forward": [0.1] * 8, "backward": [0.1] * 8}
    cells = [
        finish(make_cell(tmp_path, direction, seed=seed, lr=lr), best if lr == 0.5 else losses)
        for direction in ("forward", "backward")
        for seed in (0, 1, 2)
        for lr in (1.0, 0.5)
    ]
    stopped = [cell for cell in cells if cell.config().experiment.lr == 0.5]
    assert {rate.lr for rate in find(cells).best} == {0.5}
    for cell in stopped:
        cell.write_status(EARLY)
    findings = find(cells)
    assert {rate.lr for rate in findings.best} == {1.0}
    [gap] = findings.gaps
    assert gap.gap_nats == pytest.approx(0.01)
    for cell in stopped:
        cell.write_status(Status("finished", "", 20))
    assert {rate.lr for rate in find(cells).best} == {0.5}, "trained to their end they count like any other"


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_cells_that_asha_stopped_are_trained_to_their_end(grid_file: GridFile, tmp_path: Path, shell: Shell) -> None:
    """With the losses of a run that was never stopped: from its checkpoint, and past every later rung."""
    rates = [1.0, 0.001, 0.0005, 0.0001]
    settings = {
        "axes": {"direction": ["forward"], "depth": [1], "lr": rates, "seed": [0]},
        "budget": {"steps": 30, "batch_tokens": 512},
        "evaluation": {"every": 5, "tokens": 1024},
        "checkpoint": {"every": 5},
    }
    storage, calm_storage = tmp_path / "storage", tmp_path / "calm"
    path = grid_file(**settings, scheduler={"kind": "asha", "grace_steps": 5}, launch={"concurrency": 2})
    result = run_plan(load_grid(path, []), storage, lambda _: None)
    stopped = [cell for cell in result.cells if cell.state == "stopped"]
    assert stopped
    saved = {cell.id: checkpoint_steps(ExperimentFolder(storage, cell.id).checkpoints) for cell in stopped}
    assert all(steps and steps[-1] <= cell.step < 30 for cell, steps in zip(stopped, saved.values(), strict=True))
    first, *others = [cell.id for cell in stopped]

    answer = shell("grid", "continue", str(path), first, "--storage", str(storage))
    assert answer.code == 0, answer.err
    document = shell.json("grid", "status", str(path), "--storage", str(storage))
    states = {cell["id"]: cell["state"] for cell in document["cells"]}
    assert states[first] == "finished"
    assert {states[other] for other in others} <= {"stopped"}
    run_plan(load_grid(path, ["scheduler.kind=fifo"]), calm_storage, lambda _: None)

    def losses(root: Path) -> list[tuple[int, float]]:
        return [(entry.step, entry.metrics["train_loss"]) for entry in read_journal(root / first)]

    assert losses(storage) == losses(calm_storage)
    assert [step for step, _ in losses(storage)] == list(range(1, 31))
