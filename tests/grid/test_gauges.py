"""Gauges of cells: what is set after each event, with a recorder in the place of Ray's gauges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import Mock

import pytest

from bwlm.grid import gauges as module
from bwlm.grid.gauges import CELLS, LOSS_FINITE, CellGauges
from bwlm.grid.scheduling import CellStates
from bwlm.plan.load import load_grid
from bwlm.record.experiment import Status
from bwlm.train.termination import Termination
from tests.grids import GridFile
from tests.runs import NewRun

FORWARD, BACKWARD = "g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"
WAIT = 60.0
"""Most seconds until a condition holds."""
Values = dict[tuple[str, str], float]
"""Values that were set last, by gauge and by cell or state."""


class Recorder:
    """Gauge that keeps what is set."""

    values: ClassVar[Values] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name, self._keys = name, set(tag_keys)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self._keys
        assert math.isfinite(value)
        self.values[self._name, tags.get("cell") or tags["state"]] = value


@pytest.fixture
def workers() -> int:
    return 1


@pytest.fixture
def gauges(workers: int, monkeypatch: pytest.MonkeyPatch, grid_file: GridFile) -> Iterator[CellGauges]:
    monkeypatch.setattr(module, "Gauge", Recorder)
    monkeypatch.setattr(module, "_SET_SECONDS", 0.001)
    monkeypatch.setattr(Recorder, "values", {})
    plan = load_grid(grid_file(resources={"workers": workers}), [], None)
    with CellGauges("g", plan.cells, {cell.id: Status() for cell in plan.cells}) as found:
        yield found


def until(holds: Callable[[Values], bool]) -> None:
    end = time.monotonic() + WAIT
    while not holds(Recorder.values.copy()):
        assert time.monotonic() < end, Recorder.values
        time.sleep(0.001)


def states(values: Values) -> dict[str, float]:
    return {state: value for (name, state), value in values.items() if name == CELLS and value}


def test_figures_are_set_again_and_again(gauges: CellGauges) -> None:
    until(lambda values: states(values) == {"waiting": 2})
    gauges.began(FORWARD, 4)
    gauges.moved(FORWARD, {"step": 5, "train_loss_smooth": 3.5, "mfu": 0.25, "unknown": 1.0, "val_bpb": math.nan})
    until(lambda values: states(values) == {"waiting": 1, "running": 1})
    until(lambda values: values.get(("bwlm_step", FORWARD)) == 5)
    expected = {("bwlm_step", 5.0), ("bwlm_loss", 3.5), ("bwlm_mfu", 0.25), (LOSS_FINITE, 1.0)}
    for _ in range(2):  # Ray would have forgotten them
        Recorder.values.clear()
        until(lambda values: {(name, v) for (name, of), v in values.items() if of == FORWARD} == expected)


def test_an_ended_cell_is_set_no_more(gauges: CellGauges) -> None:
    for cell in (FORWARD, BACKWARD):
        gauges.began(cell, 0)
        gauges.moved(cell, {"step": 12, "train_loss_smooth": 2.0})
    gauges.released(FORWARD)
    gauges.ended(FORWARD, Status("finished", step=12))
    gauges.released(BACKWARD)  # its worker died; it is tried again
    until(lambda values: states(values) == {"finished": 1, "waiting": 1})
    Recorder.values.clear()
    until(lambda values: states(values) == {"finished": 1, "waiting": 1})
    assert not any(of in (FORWARD, BACKWARD) for _, of in Recorder.values)


@pytest.mark.parametrize("workers", [2])
def test_a_group_of_workers_waits_for_nodes_until_its_first_report(gauges: CellGauges) -> None:
    gauges.began(FORWARD, 0)
    Recorder.values.clear()
    until(lambda values: states(values) == {"waiting": 2})
    gauges.moved(FORWARD, {"workers": 2})
    until(lambda values: states(values) == {"waiting": 1, "running": 1})


def test_a_cell_whose_worker_is_lost_waits(gauges: CellGauges, new_run: NewRun) -> None:
    folder = new_run(FORWARD)
    trial = SimpleNamespace(config={"cell": FORWARD, "resources": {}})
    states_of_cells = CellStates(folder.path.parent, cast(Any, Mock()), Termination(), gauges)
    states_of_cells.on_trial_start(0, [], trial)
    states_of_cells.on_trial_result(0, [], trial, {"step": 5, "train_loss_smooth": 3.5})
    until(lambda values: values.get(("bwlm_loss", FORWARD)) == 3.5)
    states_of_cells.on_trial_recover(0, [], trial)
    until(lambda values: states(values) == {"waiting": 2})
    Recorder.values.clear()
    until(lambda values: states(values) == {"waiting": 2})
    assert not any(of == FORWARD for _, of in Recorder.values)


def test_a_cell_that_diverged_keeps_its_last_finite_loss(gauges: CellGauges) -> None:
    gauges.began(FORWARD, 0)
    gauges.moved(FORWARD, {"step": 7, "train_loss_smooth": 9.5})
    gauges.released(FORWARD)
    gauges.ended(FORWARD, Status("failed", "diverged", 8, {}, diverged=8))
    until(lambda values: values.get((LOSS_FINITE, FORWARD)) == 0)
    Recorder.values.clear()
    until(lambda values: values.get(("bwlm_loss", FORWARD)) == 9.5 and values.get(("bwlm_step", FORWARD)) == 8)
    assert states(Recorder.values) == {"failed": 1, "waiting": 1}
