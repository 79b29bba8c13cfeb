"""Runs that other code trained: what is finished stays, what was begun waits for a word, what was not is today's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bwlm.analysis.runs.audit import audit
from bwlm.errors import UserError
from bwlm.grid.cells import PlannedCell, check_same, find_cells, with_code_of
from bwlm.grid.launch import run_plan
from bwlm.paths import read_json, write_json
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Cell, LaunchSettings, Plan, SchedulerSettings
from bwlm.record.checkpoint import _checksum, checkpoint_steps
from bwlm.record.code import IDENTITY_VERSION
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import modules_of
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.families import rewrite_config
from tests.grids import GridFile
from tests.runs import NewRun, in_process, losses


def by_other_code(folder: ExperimentFolder, version: int = IDENTITY_VERSION) -> None:
    """Makes a run look planned, and trained so far, with another GPT."""
    config = folder.config()
    modules = modules_of(config.experiment) | {"bwlm.model.gpt": "another"}
    rewrite_config(folder, identity=config.identity | {"code": "b" * 16}, modules=modules, identity_version=version)
    for meta in folder.checkpoints.glob("step_*/meta.json"):
        content = read_json(meta) | {"fingerprint": folder.config().fingerprint}
        del content["checksum"]
        write_json(meta, content | {"checksum": _checksum(content)})


def interrupted(folder: ExperimentFolder, at: int) -> None:
    """Makes a finished run look killed after the checkpoint of a step."""
    folder.write_status(Status())
    for step in checkpoint_steps(folder.checkpoints):
        if step > at:
            shutil.rmtree(folder.checkpoints / f"step_{step:06d}")
    journal = folder.path / "metrics.jsonl"
    kept = [line for line in journal.read_text().splitlines() if json.loads(line)["step"] <= at]
    journal.write_text("".join(f"{line}\n" for line in kept))


def planned(folder: ExperimentFolder) -> tuple[Plan, PlannedCell]:
    config = folder.config()
    cell = Cell(folder.id, config.experiment, config.steps)
    plan = Plan(folder.id, (cell,), LaunchSettings(), SchedulerSettings(), None)
    [found] = find_cells(plan, folder.path.parent)
    return plan, found


@pytest.fixture
def trained(new_run: NewRun) -> ExperimentFolder:
    folder = new_run("x")
    run_phase(folder, LocalSession(), in_process)
    folder.write_status(Status("finished", "", 12))
    return folder


def test_a_run_of_the_same_code_is_what_it_was(trained: ExperimentFolder) -> None:
    rewrite_config(trained, modules=modules_of(trained.config().experiment), identity_version=IDENTITY_VERSION)
    assert planned(trained)[1].other_code == ""


def test_a_finished_run_of_other_code_stays_and_the_module_is_named(trained: ExperimentFolder) -> None:
    by_other_code(trained)
    plan, found = planned(trained)
    assert (found.is_done, found.changed) == (True, [])
    assert found.other_code == "code: bwlm.model.gpt changed"
    check_same(found, found.changed, plan, accept_code=False)


def test_a_finished_run_of_an_older_identity_stays_with_that_reason(trained: ExperimentFolder) -> None:
    by_other_code(trained, version=1)
    plan, found = planned(trained)
    assert found.other_code == f"code: identity version 1, not comparable with today's {IDENTITY_VERSION}"
    check_same(found, found.changed, plan, accept_code=False)


def test_a_config_of_before_versions_were_counted_has_version_1(trained: ExperimentFolder) -> None:
    by_other_code(trained)
    content = read_json(trained.path / "config.json")
    for name in ("identity_version", "modules", "accepted_code", "digest"):
        del content[name]
    write_json(trained.path / "config.json", content | {"fingerprint": trained.config().fingerprint})
    config = trained.config()
    assert (config.identity_version, config.modules, config.accepted_code) == (1, {}, [])
    assert planned(trained)[1].other_code.startswith("code: identity version 1,")


def test_a_run_that_other_code_began_is_refused_unless_that_is_accepted(trained: ExperimentFolder) -> None:
    interrupted(trained, 8)
    by_other_code(trained)
    plan, found = planned(trained)
    assert found.has_begun
    with pytest.raises(UserError, match=r"x was begun by other code \(bwlm\.model\.gpt changed\): .*--accept-code"):
        check_same(found, found.changed, plan, accept_code=False)
    check_same(found, found.changed, plan, accept_code=True)


def test_a_run_without_a_checkpoint_is_todays(trained: ExperimentFolder) -> None:
    today = trained.config()
    interrupted(trained, 0)
    by_other_code(trained)
    plan, found = planned(trained)
    assert not found.has_begun
    check_same(found, found.changed, plan, accept_code=False)
    assert with_code_of(trained.config(), today, found) == today


def test_accepted_code_is_noted_once_and_counts_as_code_of_its_own(trained: ExperimentFolder) -> None:
    today = trained.config()
    interrupted(trained, 8)
    by_other_code(trained)
    config = with_code_of(trained.config(), today, planned(trained)[1])
    [accepted] = config.accepted_code
    assert (accepted["step"], accepted["code"]) == (8, today.identity["code"])
    assert "bwlm.model.gpt" in accepted["modules"]
    assert config.identity["code"] == "b" * 16, "checkpoints and records go on bearing the fingerprint that they have"
    assert config.code == config.compared["code"] == f"{'b' * 16}+{today.identity['code']}"
    trained.reconfigure(config)
    assert trained.config() == config
    assert planned(trained)[1].other_code == ""
    assert with_code_of(config, today, planned(trained)[1]).accepted_code == [accepted]


def test_pairs_of_two_codes_are_refused(new_run: NewRun) -> None:
    runs = [new_run(direction, direction=direction) for direction in ("forward", "backward")]
    assert audit(runs).passed == 1
    by_other_code(runs[0])
    found = audit(runs)
    assert found.passed == 0
    assert "code: " in found.refused[0]


@pytest.mark.usefixtures("ray_cluster")
def test_a_launch_goes_on_with_accepted_code_and_leaves_finished_cells_alone(
    grid_file: GridFile, tmp_path: Path
) -> None:
    path = grid_file(axes={"direction": ["forward", "backward"], "depth": [1], "lr": [1.0], "seed": [0]})
    plan, storage = load_grid(path, []), tmp_path / "storage"
    run_plan(plan, storage, lambda _: None)
    done, begun = (ExperimentFolder(storage, cell.id) for cell in plan.cells)
    calm, written = losses(begun), (done.path / "metrics.jsonl").stat().st_mtime_ns
    step = checkpoint_steps(begun.checkpoints)[0]
    assert step < 12
    interrupted(begun, step)
    for folder in (done, begun):
        by_other_code(folder)

    with pytest.raises(UserError, match="was begun by other code"):
        run_plan(plan, storage, lambda _: None)
    said: list[str] = []
    result = run_plan(plan, storage, said.append, accept_code=True)
    assert result.complete
    assert losses(begun) == calm
    assert begun.config().accepted_code[0]["step"] == step
    assert (done.path / "metrics.jsonl").stat().st_mtime_ns == written
    assert any("1 cell stay as they are" in line and "bwlm.model.gpt changed" in line for line in said)
    assert any("cells trained now get no verdict with those" in line for line in said)
