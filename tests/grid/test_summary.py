"""Summary of a grid from its files: who trains each cell, how fast, at what cost; short also with a thousand cells."""

from __future__ import annotations

import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bwlm.cli.grid_status import Watcher
from bwlm.grid.summary import GridSummary, summarize
from bwlm.model import compute
from bwlm.paths import write_json
from bwlm.plan import machine
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Plan
from bwlm.record.experiment import LEASE, WORKER, ExperimentFolder, Status
from bwlm.record.grids import GRID_FILE, grid_folder, write_cells
from bwlm.record.journal import Journal
from bwlm.record.launches import Usage, recorded_launch
from bwlm.record.removal import delete
from bwlm.record.starts import note_start
from tests.shell import Shell
from tests.test_cli import GOOD, make_run

ROWS = [f"bars_{direction}_d{depth}_lr0.5_s0" for direction in ("forward", "backward") for depth in (1, 2)]


@pytest.fixture
def plan(shell: Shell) -> Plan:
    return load_grid(Path(shell.file(GOOD)), [], str(shell.storage))


def run(storage: Path, cell: str, state: Status | None = None, steps: int = 0) -> ExperimentFolder:
    return make_run(storage, cell, state, steps)


@contextmanager
def trained(folder: ExperimentFolder, silent: bool = False) -> Iterator[None]:
    """Held by this process as a worker holds it; if silent, as one that was frozen a minute ago."""
    with folder.lease():
        noted = {"host": socket.gethostname(), "pid": os.getpid(), "log": "/tmp/ray/worker.out"}
        write_json(folder.path / WORKER, noted)
        if silent:
            os.utime(folder.path / LEASE, (0, 0))
        yield


def standings(summary: GridSummary) -> list[str]:
    return [cell.standing for cell in summary.cells]


def test_each_cell_has_a_state_and_its_holder(plan: Plan, shell: Shell) -> None:
    first, second, third, fourth = ROWS
    run(shell.storage, first, Status("finished", "", 5))
    run(shell.storage, second, Status("stopped", "by the scheduler at step 3", 3))
    running, silent = run(shell.storage, third, steps=2), run(shell.storage, fourth, steps=1)
    with trained(running), trained(silent, silent=True):
        summary = summarize(plan, shell.storage)
        assert standings(summary) == ["finished", "stopped early", "running", "silent"]
        assert summary.counts == {"finished": 1, "stopped early": 1, "running": 1, "silent": 1}
        for cell, is_silent in zip(summary.cells[2:], (False, True), strict=True):
            assert cell.holder is not None
            assert (cell.holder["pid"], cell.holder["silent"]) == (os.getpid(), is_silent)
            assert cell.log == f"{socket.gethostname()}:/tmp/ray/worker.out"
        assert summary.tokens_per_second == 100.0
    assert standings(summarize(plan, shell.storage))[2:] == ["stopped", "stopped"]
    silent.write_status(Status("failed", "loss nan", 1))
    assert standings(summarize(plan, shell.storage))[2:] == ["stopped", "failed"]
    with trained(running):
        write_json(running.path / WORKER, {"host": socket.gethostname(), "pid": 1, "log": "/tmp/ray/before.out"})
        assert summarize(plan, shell.storage).cells[2].log is None, "the worker before this one wrote that log"


def test_pace_time_and_cost_come_from_what_launches_recorded(plan: Plan, shell: Shell) -> None:
    """Half of each of two cells in 100 s, by a launch that runs; a launch before it cost as much again."""
    for cell in ROWS[:2]:
        run(shell.storage, cell, steps=5)
    home = grid_folder(shell.storage, "bars")
    half = sum(cell.flops_until(cell.steps) for cell in plan.cells) / 2
    with recorded_launch(home) as ended:
        ended.write(Usage(1.0, 400, 400, 400, 0, 1.0, 400, 1.0, end="stopped"))
    summary = summarize(plan, shell.storage)
    assert summary.living == []
    with recorded_launch(home) as launch:
        launch.write(Usage(2.0, 110, 400, 400, 7200, half, 100, half))
        summary = summarize(plan, shell.storage)
        assert summary.flops_per_second == half / 100
        assert summary.seconds_left == pytest.approx(100 * summary.flops_left / half)
        assert summary.cells_per_hour == pytest.approx(2 * 36)
        assert (summary.usage.cpu_seconds, summary.usage.gpu_seconds) == (800, 7200)
        assert summary.money is None
        told = shell("grid", "status", "g.yaml").out.splitlines()
        assert told[0] == "bars: 0 of 4 cells finished, 2 stopped, 2 waiting"
        assert re.fullmatch(r"about \d+ \w+ left: [\d.]+\w FLOPs at 72 cells an hour", told[1])
        assert told[2].startswith("cost so far: ")
        assert told[2].endswith(" FLOPs, 0.22 worker hours, 0.22 CPU hours, 2 GPU hours")
        assert told[3].startswith(f"launch: {socket.gethostname()}:{os.getpid()} runs it since ")
        document = shell.json("grid", "status", "g.yaml", "--set", "launch.price.gpu_hour=2.5")["summary"]
        assert document["money"] == 5.0
        assert [entry["pid"] for entry in document["launches"]] == [os.getpid()]
    assert summarize(plan, shell.storage).flops_per_second == half / 100, "of the last launch, if none runs"
    assert " FLOPs at the last launch's 72 cells an hour\n" in shell("grid", "status", "g.yaml").out


@pytest.mark.parametrize("gpus", [0, 1], ids=["no GPU", "a GPU that torch cannot use"])
def test_any_machine_tells_of_a_launch_on_gpus_and_stops_it(
    gpus: int, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid that names no GPUs trains on those of the launching machine, and gives their price alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "installed_gpus", lambda: gpus)
    monkeypatch.setattr(compute, "can_use_gpus", lambda: False)
    grid = shell.file(GOOD + "launch: {limit: {money: 200}, price: {gpu_hour: 2.5, cpu_hour: 0}}\n")
    with recorded_launch(grid_folder(shell.storage, "bars")) as launch:
        launch.write(Usage(1.0, gpu_seconds=7200))
        assert shell.json("grid", "status", grid)["summary"]["money"] == 5.0
        assert shell("grid", "stop", grid, "--no-wait").code == 0
        assert launch.asked_to_stop()
    if not gpus:
        assert shell("grid", "plan", grid).code == 0


def test_resumes_and_what_they_cost_are_told(plan: Plan, shell: Shell) -> None:
    calm, often = (run(shell.storage, cell, steps=5) for cell in ROWS[:2])
    note_start(calm.path, 5, 1)
    assert "resumed: " not in shell("grid", "status", "g.yaml").out
    note_start(often.path, 5, 1)
    time.sleep(0.002)  # a step takes longer
    journal = Journal(often.path, 5)
    for step in (6, 7):
        journal.append(step, {})
    journal.close()
    for workers in (2, 1):
        note_start(often.path, 5, workers)
    told = shell("grid", "status", "g.yaml").out
    assert "resumed: 1 cell, 2 steps lost\n" in told
    assert f"other numbers of workers on the way: {often.id} (1 from step 5, 2 from step 5, 1 from step 5)\n" in told
    document = shell.json("grid", "status", "g.yaml")
    assert (document["summary"]["resumes"], document["summary"]["steps_lost"]) == (2, 2)
    assert [cell["steps_lost"] for cell in document["cells"] if cell["id"] in (calm.id, often.id)] == [0, 2]
    shown = shell("runs", "show", often.id).out
    assert "workers    1 from step 5, 2 from step 5, 1 from step 5\n" in shown
    assert "resumed    2 resumes, 2 steps lost\n" in shown
    assert "resumed" not in shell("runs", "show", calm.id).out


def test_what_a_launch_would_do_with_each_cell(plan: Plan, shell: Shell) -> None:
    first, second, third, _ = ROWS
    run(shell.storage, first, Status("finished", "", 5))
    resumable = run(shell.storage, second, steps=4)
    (resumable.checkpoints / "step_000003").mkdir(parents=True)
    (resumable.checkpoints / "step_000003" / "meta.json").write_text("{}")
    run(shell.storage, third, steps=2)
    document = shell.json("grid", "plan", "g.yaml")["cells"]
    assert [(cell["action"], cell["from_step"]) for cell in document] == [
        ("done", None), ("resume", 3), ("restart", None), ("new", None),
    ]  # fmt: skip
    told = [line.split()[5:] for line in shell("grid", "plan", "g.yaml").out.splitlines() if line.startswith("bars_")]
    assert [" ".join(words[:-1]) for words in told[:4]] == ["done", "resumes from step 3", "begins again", "new"]
    changed = shell.json("grid", "plan", "g.yaml", "--set", "budget.steps=6", "--set", "model.head_dim=32")["cells"]
    assert [cell["action"] for cell in changed] == ["changed"] * 3 + ["new"]
    told = shell("grid", "plan", "g.yaml", "--set", "budget.steps=6", "--set", "model.head_dim=32").out
    assert "changed: model.head_dim, steps" in told
    with trained(ExperimentFolder(shell.storage, third)):
        assert shell.json("grid", "plan", "g.yaml")["cells"][2]["action"] == "running"


def test_a_thousand_cells_fit_a_screen(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary, and what is not done; cells that wait are counted, and finished ones shown on request."""
    grid = shell.file(GOOD.replace("seed: [0]", f"seed: {list(range(250))}"))
    plan = load_grid(Path(grid), [], str(shell.storage))
    assert len(plan.cells) == 1000
    for cell in ROWS[:2]:
        run(shell.storage, cell, Status("finished", "", 5, {"val_bpb": 1.5}))
    failed = run(shell.storage, ROWS[2], Status("failed", "loss nan at step 3", 2))
    (failed.path / "error.txt").write_text("loss nan")
    monkeypatch.setenv("COLUMNS", "80")
    with trained(run(shell.storage, ROWS[3], steps=3)):
        told = shell("grid", "status", grid).out.splitlines()
    assert told[0] == "bars: 2 of 1000 cells finished, 1 running, 1 failed, 996 waiting"
    assert len(told) <= 12
    assert not [line for line in told if line.startswith(tuple(ROWS[:2]))]
    assert "waiting: bars_forward_d1_lr0.5_s1 and 995 more" in told
    assert f"log of {ROWS[2]}: runs/{ROWS[2]}/error.txt" in told
    assert f"log of {ROWS[3]}: {socket.gethostname()}:/tmp/ray/worker.out" in told
    assert f"{ROWS[2]}: loss nan at step 3" in told
    everything = shell("grid", "status", grid, "--all").out.splitlines()
    assert len(everything) > 1000
    assert any(line.startswith(ROWS[0]) for line in everything)


# ---- watching ----


def test_watching_prints_lines_until_all_is_done(
    plan: Plan, shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [run(shell.storage, cell, steps=3) for cell in ROWS]
    left = list(folders)

    def next_one_ends(watcher: Watcher, seconds: float) -> None:
        assert seconds > 0
        left.pop().write_status(Status("finished", "", 5))

    monkeypatch.setattr(Watcher, "wait", next_one_ends)
    told = shell("grid", "status", "g.yaml", "--watch").out.splitlines()
    others = [f"{done} of 4 cells finished, {4 - done} stopped" for done in range(4)]
    assert [line.partition(" bars: ")[2] for line in told] == [*others, "4 of 4 cells finished"]


def test_a_finished_cell_is_read_once(plan: Plan, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for cell, state in zip(ROWS, (Status("finished", "", 5), None, Status("failed", "nan", 1)), strict=False):
        run(shell.storage, cell, state, steps=1)
    watcher, read = Watcher(plan, shell.storage), list[str]()
    first = watcher.look()
    original: Callable[[ExperimentFolder], Status] = ExperimentFolder.status
    monkeypatch.setattr(ExperimentFolder, "status", lambda folder: read.append(folder.id) or original(folder))
    journal = Journal(shell.storage / ROWS[1], 1)
    journal.append(2, {"train_loss": 3.0})
    journal.close()
    second = watcher.look()
    assert set(read) == {ROWS[1], ROWS[2]}
    assert standings(second) == standings(first) == ["finished", "stopped", "failed", "waiting"]
    assert [cell.planned.status.step for cell in second.cells] == [5, 2, 1, 0]


@pytest.mark.parametrize("storage", ["", "else where"])
def test_stop_prints_a_command_that_finds_the_grid_again(storage: str, shell: Shell) -> None:
    root = shell.folder / storage if storage else shell.storage
    write_cells(root, "bars", ROWS)
    (grid_folder(root, "bars") / GRID_FILE).write_text(GOOD)
    told = shell("grid", "stop", "bars", *(["--storage", storage] if storage else [])).out
    command = told.rpartition("to resume: bwlm grid run ")[2]
    assert command == ("bars --storage 'else where'\n" if storage else "bars\n")
    assert shell("grid", "status", *shlex.split(command)).code == 0


def test_a_finished_cell_that_is_deleted_meanwhile_is_seen(plan: Plan, shell: Shell) -> None:
    for cell in ROWS:
        run(shell.storage, cell, Status("finished", "", 5))
    watcher = Watcher(plan, shell.storage)
    assert watcher.look().is_complete
    delete(ExperimentFolder(shell.storage, ROWS[0]))
    assert standings(watcher.look()) == ["waiting", *["finished"] * 3]
    run(shell.storage, ROWS[0], steps=2)
    assert standings(watcher.look()) == ["stopped", *["finished"] * 3]


def test_watching_and_json_are_not_both(shell: Shell) -> None:
    answer = shell("grid", "status", shell.file(GOOD), "--watch", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "--watch: not with --json" in answer.err
