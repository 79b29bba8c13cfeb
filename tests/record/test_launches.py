"""Launches of a grid on the shared storage: who runs, what was used, and a request that stops no later launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.record.launches import Usage, ask_to_stop, launches_of, living_launches, recorded_launch, total_of

HOLD = """
import sys, time
from pathlib import Path
from bwlm.record.launches import Usage, recorded_launch
with recorded_launch(Path(sys.argv[1])) as launch:
    launch.write(Usage(began=1.0, seconds=7200, worker_seconds=3600.0, cpu_seconds=7200.0))
    print(launch.name, flush=True)
    time.sleep(600)
"""


def held(home: Path) -> tuple[subprocess.Popen[str], str]:
    """A launch of another process, once it has its lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_launch_that_used_nothing_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "grids" / "g"
    with recorded_launch(home) as launch:
        [entry] = living_launches(home)
        assert (entry.name, entry.usage) == (launch.name, Usage())
        assert entry.holder is not None
        assert entry.holder.pid == os.getpid()
        assert launch.asked_to_stop() is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_launch_used_stays_after_its_end(tmp_path: Path) -> None:
    for seconds in (10.0, 20.0):
        with recorded_launch(tmp_path) as launch:
            launch.write(Usage(began=seconds, worker_seconds=seconds, gpu_seconds=2 * seconds, end="complete"))
    assert living_launches(tmp_path) == []
    entries = launches_of(tmp_path)
    assert [entry.usage.worker_seconds for entry in entries] == [10.0, 20.0]
    total = total_of([entry.usage for entry in entries])
    assert (total.began, total.worker_seconds, total.gpu_seconds) == (10.0, 30.0, 60.0)


@pytest.mark.parametrize(
    ("gpu_hour", "cpu_hour", "cost"), [(0.0, 0.0, 0.0), (3.0, 0.0, 1.5), (0.0, 0.5, 2.0), (3.0, 0.5, 3.5)]
)
def test_the_cost_is_that_of_reserved_hours(gpu_hour: float, cpu_hour: float, cost: float) -> None:
    """Half a GPU hour and four CPU hours."""
    assert Usage(gpu_seconds=1800, cpu_seconds=14_400).cost(gpu_hour, cpu_hour) == cost


@pytest.mark.processes
def test_a_request_reaches_the_launches_that_run_and_no_later_one(tmp_path: Path) -> None:
    with recorded_launch(tmp_path) as mine:
        other, name = held(tmp_path)
        try:
            asked = ask_to_stop(tmp_path, "me:1")
            assert [entry.name for entry in asked] == [entry.name for entry in living_launches(tmp_path)]
            assert {entry.name for entry in asked} == {mine.name, name}
            assert mine.asked_to_stop() == "me:1"
            with recorded_launch(tmp_path) as later:
                assert later.asked_to_stop() is None
                assert mine.asked_to_stop() == "me:1", "a launch that begins takes no request from those that run"
        finally:
            other.kill()
            other.wait()
    assert living_launches(tmp_path) == []


@pytest.mark.processes
def test_a_launch_that_died_stops_nothing(tmp_path: Path) -> None:
    """Its lease is free at once, its usage stays, and a request that names it is gone with the next launch."""
    process, name = held(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert living_launches(tmp_path) == []
    assert ask_to_stop(tmp_path, "me:1") == []
    assert json.loads((tmp_path / "stop.json").read_text())["launches"] == [name]
    with recorded_launch(tmp_path) as launch:
        assert launch.asked_to_stop() is None
        assert not (tmp_path / "stop.json").exists()
        assert [entry.usage.worker_seconds for entry in launches_of(tmp_path)] == [3600.0, 0.0]
    assert [path.name for path in (tmp_path / "launches").iterdir()] == [f"{name}.json"]


def test_without_launches_there_is_nobody_to_ask(tmp_path: Path) -> None:
    assert ask_to_stop(tmp_path, "me:1") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"launches": 3}', '{"by": "x"}', "{"])
def test_a_damaged_request_stops_nothing(content: str, tmp_path: Path) -> None:
    with recorded_launch(tmp_path) as launch:
        (tmp_path / "stop.json").write_text(content)
        assert launch.asked_to_stop() is None
        (tmp_path / "launches" / f"{launch.name}.json").write_text(content)
        assert [entry.usage for entry in launches_of(tmp_path)] == [Usage()]
