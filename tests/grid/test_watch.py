"""The watch over a launch: what it counts, what stops it, and whom it tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import yaml

from bwlm.errors import Paused, UserError
from bwlm.grid import watch
from bwlm.grid.launch import run_plan
from bwlm.grid.scheduling import CellStates
from bwlm.grid.watch import LaunchWatch, watched
from bwlm.plan.load import load_grid
from bwlm.plan.spec import LaunchSettings, Plan
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import Journal
from bwlm.record.launches import Usage, ask_to_stop, launches_of
from bwlm.train.termination import TERMINATED, Termination
from tests.grids import GridFile
from tests.runs import NewRun

CELL, OTHER = "g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks every hundredth of a second, and SIGTERM ends this process as it ends the command."""

    def end(signum: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "_WRITE_SECONDS", 0.01)
    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def plan_of(grid_file: GridFile) -> Callable[..., Plan]:
    return lambda **launch: load_grid(grid_file(launch=launch), [])


def home(storage: Path) -> Path:
    return storage / "grids" / "g"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def launch(plan: Plan, storage: Path, body: Callable[[LaunchWatch], object]) -> tuple[list[str], BaseException | None]:
    """Runs `body` as a launch's training; what was shown, and how it ended."""
    shown: list[str] = []
    try:
        with watched(plan, storage, False, shown.append) as over, over.pausing():
            body(over)
    except (Paused, SystemExit, UserError, RuntimeError) as error:
        return shown, error
    return shown, None


def never_ends(watch: LaunchWatch) -> None:
    until(lambda: False)


def test_a_request_stops_a_launch_and_says_how_it_goes_on(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    def asked(over: LaunchWatch) -> None:
        assert ask_to_stop(home(tmp_path / "runs"), "elsewhere:7")
        never_ends(over)

    shown, error = launch(plan_of(), tmp_path / "runs", asked)
    assert isinstance(error, Paused)
    assert error.exit_code == 75
    assert str(error).startswith(
        "g is stopped: `bwlm grid stop` asked for it (elsewhere:7): 0 of 2 cells finished, 2 waiting, "
    )
    command = f"bwlm grid run g --storage {tmp_path}/runs"
    assert str(error).endswith(f"FLOPs left; to resume, run the same command, or: {command}")
    assert shown == ["the launch stops: `bwlm grid stop` asked for it (elsewhere:7): each cell saves a checkpoint"]


def test_a_signal_of_others_is_no_request(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    def signalled(over: LaunchWatch) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        never_ends(over)

    shown, error = launch(plan_of(), tmp_path / "runs", signalled)
    assert isinstance(error, SystemExit)
    assert shown == []


def test_after_training_a_request_comes_too_late(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """The launch ends by itself then: its report is not cut off."""
    with watched(plan_of(), tmp_path / "runs", False, lambda _: None) as over:
        with over.pausing():
            pass
        ask_to_stop(home(tmp_path / "runs"), "elsewhere:7")
        time.sleep(0.1)
    assert over.reason == ""


def test_hours_are_those_of_each_launch(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_of(limit={"hours": 0.1 / 3600})
    for _ in range(2):  # a second launch has its own
        began = time.monotonic()
        _, error = launch(plan, tmp_path / "runs", never_ends)
        assert "launch.limit.hours=2.77778e-05 is reached" in str(error)
        assert time.monotonic() - began >= 0.1


def test_money_is_that_of_all_launches(grid_file: GridFile, tmp_path: Path) -> None:
    """A cell of two CPUs at 3600 an hour costs 2 a second."""
    settings = {"limit": {"money": 1.0}, "price": {"cpu_hour": 3600.0}}
    plan = load_grid(grid_file(launch=settings, resources={"workers": 2, "cpus_per_worker": 1}), [])

    def half_a_second(over: LaunchWatch) -> None:
        over.began(CELL, 0)
        over.moved(CELL, {"workers": 2})
        until(lambda: over._usage_now().cost(0.0, 3600.0) >= 0.6)

    def goes_on(over: LaunchWatch) -> None:
        over.began(OTHER, 0)
        over.moved(OTHER, {"workers": 2})
        never_ends(over)

    assert launch(plan, tmp_path / "runs", half_a_second)[1] is None
    began = time.monotonic()
    _, error = launch(plan, tmp_path / "runs", goes_on)
    assert isinstance(error, Paused)
    assert time.monotonic() - began < 0.5, "the first launch had spent 0.6 of 1.0"
    assert "launch.limit.money=1 is reached, 1." in str(error)
    _, error = launch(plan, tmp_path / "runs", never_ends)
    assert isinstance(error, UserError)
    assert "of 1 are spent by earlier launches of g: raise it" in str(error)


def test_what_cells_use_is_counted_while_they_run(grid_file: GridFile, tmp_path: Path) -> None:
    """Two cells of two workers with three CPUs each."""
    plan = load_grid(grid_file(resources={"workers": 2, "cpus_per_worker": 3}), [])
    whole = plan.cells[0].flops_until(12) - plan.cells[0].flops_until(4)

    def trains(over: LaunchWatch) -> None:
        over.began(CELL, 4)
        over.began(OTHER, 0)
        for cell in (CELL, OTHER):
            over.moved(cell, {"workers": 2})
        time.sleep(0.1)
        over.moved(CELL, {"step": 6})
        over.moved(CELL, {"step": 12})
        over.moved(CELL, {"step": 12, "scoring": True})
        over.released(CELL)
        over.released(CELL)
        [running] = [entry.usage for entry in launches_of(home(tmp_path / "runs")) if entry.holder]
        until(lambda: launches_of(home(tmp_path / "runs"))[0].usage.flops == whole)
        assert running.end == ""

    assert launch(plan, tmp_path / "runs", trains)[1] is None
    [entry] = launches_of(home(tmp_path / "runs"))
    usage = entry.usage
    assert 0.4 <= usage.worker_seconds <= 4 * usage.seconds
    assert usage.cpu_seconds == pytest.approx(3 * usage.worker_seconds)
    assert usage.gpu_seconds == 0
    assert (usage.flops, usage.end) == (whole, "incomplete")
    assert usage.pace_flops == whole - (plan.cells[0].flops_until(6) - plan.cells[0].flops_until(4))
    assert 0 < usage.pace_seconds <= usage.seconds - 0.1


@pytest.mark.parametrize("workers", [1, 2, {"min": 1, "max": 2}])
def test_a_cell_that_waits_for_a_node_costs_nothing(
    workers: int | dict[str, int], grid_file: GridFile, new_run: NewRun
) -> None:
    """A single worker is there with its trial, a group of workers at the first report; none once the trial is lost."""
    plan = load_grid(grid_file(resources={"workers": workers}), [])
    folder = new_run(CELL)
    trial = SimpleNamespace(config={"cell": CELL, "resources": {"workers": workers}})

    def is_paid(over: LaunchWatch) -> bool:
        before = over._usage_now().worker_seconds
        time.sleep(0.01)
        return over._usage_now().worker_seconds > before

    def trains(over: LaunchWatch) -> None:
        states = CellStates(folder.path.parent, cast(Any, Mock()), Termination(), over)
        for _ in range(2):
            states.on_trial_start(0, [], trial)
            assert is_paid(over) == (workers == 1)
            states.on_trial_result(0, [], trial, {"workers": 2})
            assert is_paid(over)
            states.on_trial_recover(0, [], trial)  # its node is gone, and Tune waits for another
            assert not is_paid(over)

    assert launch(plan, folder.path.parent, trains) == ([], None)


def test_a_launch_that_trains_nothing_is_not_watched(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    with watched(plan_of(notify="exit 1"), tmp_path / "runs", True, lambda _: None) as over, over.pausing():
        assert not over._thread.is_alive()
    assert not (tmp_path / "runs").exists()


# ---- notices ----


@pytest.fixture
def notices(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "notices").read_text().splitlines()]

    return read


def told(tmp_path: Path) -> str:
    return f"(cat; echo) >> {tmp_path}/notices"


def test_failures_divergence_and_the_end_are_told(
    plan_of: Callable[..., Plan], tmp_path: Path, notices: Callable[[], list[dict[str, Any]]]
) -> None:
    def fails(over: LaunchWatch) -> None:
        for cell in (CELL, OTHER):
            over.began(cell, 0)
        over.ended(CELL, Status("failed", "loss nan at step 3", 3, diverged=3))
        over.ended(OTHER, Status("failed", "crashed, see error.txt: OSError", 5))
        over.ended(OTHER, Status("finished", "", 12))

    launch(plan_of(notify=told(tmp_path)), tmp_path / "runs", fails)
    diverged, failed, end = notices()
    assert (diverged["event"], diverged["cell"], diverged["step"]) == ("divergence", CELL, 3)
    assert diverged["text"] == f"g: {CELL} failed: loss nan at step 3"
    assert (failed["event"], failed["cell"], failed["step"]) == ("failure", OTHER, 5)
    assert (end["event"], end["outcome"], end["cells"]) == ("end", "incomplete", {"waiting": 2})
    assert end["text"] == "g: incomplete: 0 of 2 cells finished, 2 waiting"
    assert {one["grid"] for one in (diverged, failed, end)} == {"g"}


@pytest.mark.parametrize(
    ("act", "outcome", "reason"),
    [
        (lambda over: ask_to_stop(over._record.home, "a:1") and never_ends(over), "stopped", "`bwlm grid stop` asked"),
        (lambda over: os.kill(os.getpid(), signal.SIGTERM), "interrupted", "SIGTERM"),
        (lambda over: (_ for _ in ()).throw(RuntimeError("Ray is gone\nfor good")), "error", "Ray is gone"),
    ],
)
def test_the_end_says_how(
    act: Callable[[LaunchWatch], Any],
    outcome: str,
    reason: str,
    plan_of: Callable[..., Plan],
    tmp_path: Path,
    notices: Callable[[], list[dict[str, Any]]],
) -> None:
    launch(plan_of(notify=told(tmp_path)), tmp_path / "runs", act)
    [end] = notices()
    assert (end["event"], end["outcome"]) == ("end", outcome)
    assert end["reason"].startswith(reason)
    assert "\n" not in end["reason"]


def test_a_stall_is_told_once_until_the_cell_moves_again(
    plan_of: Callable[..., Plan], tmp_path: Path, notices: Callable[[], list[dict[str, Any]]]
) -> None:
    storage = tmp_path / "runs"
    (storage / CELL).mkdir(parents=True)
    journal = Journal(ExperimentFolder(storage, CELL).path)

    def stalls(over: LaunchWatch) -> None:
        over.began(CELL, 0)
        running = over._running[CELL]
        over.moved(CELL, {"step": 1, "scoring": True})
        time.sleep(0.2)
        assert not running.is_stalled, "a cell that is scored does no step"
        over.moved(CELL, {"step": 1, "scoring": False})
        for step in (1, 2):
            journal.append(step, {"train_loss": 3.0})
            until(lambda: not running.is_stalled)
            until(lambda: running.is_stalled)

    shown, _ = launch(plan_of(notify=told(tmp_path), stall_minutes=0.1 / 60), storage, stalls)
    events = [notice["event"] for notice in notices()]
    assert events == ["stall", "stall", "end"]
    assert shown[0] == (
        f"stalled: {CELL} has done no step for 0 seconds; bwlm grid status g shows its worker and its log"
    )


def test_a_journal_that_grows_in_the_bucket_is_no_stall(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is on another machine: its journal grows here when it is brought."""
    storage = tmp_path / "runs"
    (storage / CELL).mkdir(parents=True)
    journal = Journal(ExperimentFolder(storage, CELL).path)
    brought: list[Path] = []

    def bring(path: Path) -> None:
        brought.append(path)
        journal.append(len(brought), {"train_loss": 3.0})

    monkeypatch.setattr(watch, "fetch", bring)

    def trains(over: LaunchWatch) -> None:
        over.began(CELL, 0)
        until(lambda: len(brought) > 3)

    shown, _ = launch(plan_of(stall_minutes=0.1 / 60), storage, trains)
    assert shown == []
    assert set(brought) == {storage / CELL / "metrics.jsonl"}


_HOLDER = """
import ctypes, sys, time
from pathlib import Path
from bwlm.record.lease import take
lease = take(Path(sys.argv[1]), 1.0, 0.1, lambda: False)
ctypes.CDLL(None).prctl(15, b"ray::train")
print("held", flush=True)
time.sleep(600)
"""
"""A process that holds a lease of a second, under a name of Ray's workers."""


@pytest.mark.parametrize("scoring", [False, True])
def test_a_frozen_worker_is_ended_and_a_busy_one_is_left(
    scoring: bool, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    """Also where it scores tasks, which no step tells of: a long scoring is no stall."""
    storage, workers = tmp_path / "runs", {}
    for cell in (CELL, OTHER):
        (storage / cell).mkdir(parents=True)
        words = [sys.executable, "-c", _HOLDER, str(storage / cell / "lease.json")]
        workers[cell] = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        for worker in workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"held\n"
        workers[CELL].send_signal(signal.SIGSTOP)

        def stalls(over: LaunchWatch) -> None:
            for cell in workers:
                over.began(cell, 0)
                over.moved(cell, {"step": 1, "scoring": scoring})
            until(lambda: scoring or all(running.is_stalled for running in over._running.values()))
            until(lambda: workers[CELL].poll() is not None)

        shown, error = launch(plan_of(stall_minutes=0.1 / 60), storage, stalls)
        assert error is None
        assert workers[CELL].returncode == -signal.SIGKILL
        assert workers[OTHER].poll() is None
        told = f":{workers[CELL].pid} is frozen, and is ended: the cell resumes from its last checkpoint"
        assert [line for line in shown if "frozen" in line and told in line]
        assert not any(line.startswith(f"{OTHER}: its worker") for line in shown)
        assert sum(line.startswith("stalled: ") for line in shown) == (0 if scoring else 2)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


# ---- settings ----


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"limit": {"hours": 0}}, "launch.limit.hours: input should be greater than 0"),
        ({"limit": {"hour": 1}}, "launch.limit.hour: unknown field (did you mean 'hours'?)"),
        ({"price": {"cpu_hour": -1}}, "launch.price.cpu_hour: input should be greater than or equal to 0"),
        ({"notify": "https://hooks.slack.com/services/T/B/x"}, "launch.notify: holds the secret path of a web hook"),
        ({"notify": "https://h/?token=x"}, "launch.notify: holds a secret in token="),
    ],
)
def test_what_cannot_be_meant_is_refused(launch: dict[str, Any], message: str, grid_file: GridFile) -> None:
    with pytest.raises(UserError) as caught:
        load_grid(grid_file(launch=launch), [])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("price", "gpus", "missing"),
    [
        ({}, 0, "launch.price.cpu_hour, the price of one CPU for an hour"),
        ({"gpu_hour": 2.0}, 0, "launch.price.cpu_hour, the price of one CPU for an hour"),
        ({"cpu_hour": 1.0}, 1, "launch.price.gpu_hour, the price of one GPU for an hour"),
    ],
)
def test_a_launch_with_a_limit_of_money_needs_a_price_for_what_its_cells_use(
    price: dict[str, float], gpus: int, missing: str, grid_file: GridFile, tmp_path: Path
) -> None:
    settings = {"limit": {"money": 5.0}, "price": price}
    plan = load_grid(grid_file(launch=settings, resources={"gpus_per_worker": gpus, "cpus_per_worker": 4}), [])
    with pytest.raises(UserError) as caught:
        run_plan(plan, tmp_path / "runs", lambda _: None)
    assert str(caught.value) == f"launch.limit.money: {CELL} has no price: set {missing}"
    assert not (tmp_path / "runs").exists()


def test_the_price_of_a_cell_is_that_of_its_workers(grid_file: GridFile) -> None:
    prices = {"price": {"cpu_hour": 1.0, "gpu_hour": 2.5}}
    plan = load_grid(grid_file(launch=prices, resources={"gpus_per_worker": 1, "cpus_per_worker": 4}), [])
    assert plan.launch.price.per_hour(plan.cells[0].experiment.resources) == 2.5 + 4
    assert LaunchSettings.model_validate(yaml.safe_load("limit: {hours: 1}")).limit.hours == 1


def test_a_usage_without_time_costs_nothing() -> None:
    assert Usage().cost(5.0, 5.0) == 0.0


def test_workers_that_come_are_counted_from_then_on(grid_file: GridFile, tmp_path: Path) -> None:
    """A cell of one to four workers: its reports say how many."""
    plan = load_grid(grid_file(resources={"workers": {"min": 1, "max": 4}, "cpus_per_worker": 3}), [])
    whole = plan.cells[0].flops_until(12)
    seconds: list[float] = []

    def trains(over: LaunchWatch) -> None:
        over.began(CELL, 0)
        over.moved(CELL, {"workers": 1})
        time.sleep(0.1)
        over.moved(CELL, {"step": 6, "workers": 1})
        seconds.append(over._usage_now().worker_seconds)
        over.moved(CELL, {"step": 7, "workers": 4})
        time.sleep(0.1)
        over.moved(CELL, {"step": 12, "workers": 4})
        over.released(CELL)

    assert launch(plan, tmp_path / "runs", trains)[1] is None
    [entry] = launches_of(home(tmp_path / "runs"))
    assert 0.1 <= seconds[0] < 0.3
    assert entry.usage.worker_seconds >= 0.5, "0.1 s of one and 0.1 s of four"
    assert entry.usage.cpu_seconds == pytest.approx(3 * entry.usage.worker_seconds)
    assert entry.usage.flops == pytest.approx(whole)
