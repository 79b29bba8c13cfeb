"""When a cell whose workers follow the nodes begins anew, and what counts as a failure of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from bwlm.config import ResourceSettings
from bwlm.grid import elastic
from bwlm.grid.elastic import ElasticGroup, train_elastic
from bwlm.paths import write_json
from bwlm.record.experiment import WORKER, ExperimentFolder, Status
from bwlm.record.journal import Journal
from tests.runs import NewRun

GROUP = ElasticGroup(ResourceSettings(workers={"min": 1, "max": 4}), (1, 2, 4), at_once=1)  # type: ignore[arg-type]


class Rooms:
    """Stands in for Ray: tells what a cluster has room for."""

    def __init__(self) -> None:
        self.nodes, self.free, self.leaves = 1, 1, False
        self.asked: list[str] = []
        self.held = 0

    def room(self, resources: ResourceSettings, sizes: Any, held: int = 0) -> Any:
        rooms = self

        class Room:
            def __init__(self) -> None:
                rooms.held, self.sizes = rooms.held + 1, tuple(sizes)

            def size(self) -> int:
                return max([held, *(size for size in sizes if size <= rooms.free)])

            def wait(self, give_up: Callable[[], bool]) -> int:
                return self.size()

            def forget(self) -> None:
                rooms.held -= 1

        return Room()


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Rooms:
    found = Rooms()
    monkeypatch.setattr(elastic, "GroupRoom", found.room)
    monkeypatch.setattr(elastic, "sizes_for_one", lambda _, sizes, at_once: [n for n in sizes if n <= found.nodes])
    monkeypatch.setattr(elastic, "node_leaves", lambda: found.leaves)
    monkeypatch.setattr(elastic, "living_nodes", lambda: set(range(found.nodes)))
    monkeypatch.setattr(elastic, "ask_to_end", found.asked.append)
    monkeypatch.setattr(elastic, "_LOOK_SECONDS", 0.01)
    return found


class Cell:
    """A cell that trains a step every 10 ms, under its lease, until it is asked to end."""

    def __init__(self, folder: ExperimentFolder, rooms: Rooms, seconds_left: float = 100.0) -> None:
        self.folder, self.rooms, self.seconds_left = folder, rooms, seconds_left
        self.sizes: list[int] = []
        self.at_step: dict[int, Callable[[], None]] = {}
        self.last = 200

    def fit(self, size: int) -> None:
        self.sizes.append(size)
        with self.folder.lease():
            write_json(self.folder.path / WORKER, {"host": "node", "pid": len(self.sizes)})
            journal = Journal(self.folder.path, 0)
            for step in range(1, self.last + 1):
                journal.append(step, {"seconds_left": self.seconds_left})
                self.at_step.get(step, lambda: None)()
                if self.rooms.asked:
                    break
                time.sleep(0.01)
            journal.close()


def test_a_cell_is_asked_to_end_when_there_is_room_for_more(new_run: NewRun, rooms: Rooms) -> None:
    cell = Cell(new_run(), rooms)
    cell.at_step[5] = lambda: vars(rooms).update(nodes=4, free=3)
    train_elastic(cell.folder, GROUP, cell.fit)
    assert cell.sizes == [1]
    assert set(rooms.asked) == {"node:1"}
    assert rooms.held == 0, "the room was given back"
    rooms.asked.clear()
    rooms.nodes = 4
    cell.last = 3
    train_elastic(cell.folder, GROUP, cell.fit)
    assert cell.sizes == [1, 2], "three have room, and two of them share a step evenly"
    assert rooms.held == 0


def test_a_cell_that_is_nearly_done_stays_as_it_is(new_run: NewRun, rooms: Rooms) -> None:
    cell = Cell(new_run(), rooms, seconds_left=5.0)
    cell.last = 20
    cell.at_step[5] = lambda: vars(rooms).update(nodes=4, free=4)
    train_elastic(cell.folder, GROUP, cell.fit)
    assert rooms.asked == []


def test_a_cell_saves_when_the_node_of_its_driver_leaves(new_run: NewRun, rooms: Rooms) -> None:
    cell = Cell(new_run(), rooms)
    cell.at_step[5] = lambda: vars(rooms).update(leaves=True)
    train_elastic(cell.folder, GROUP, cell.fit)
    assert set(rooms.asked) == {"node:1"}


def test_nothing_is_trained_without_room(new_run: NewRun, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ElasticGroup, "wait_for_room", lambda self: 0)
    train_elastic(new_run(), GROUP, lambda size: pytest.fail("it was to end"))


def save(folder: ExperimentFolder, step: int) -> None:
    (folder.checkpoints / f"step_{step:06}").mkdir(parents=True)
    (folder.checkpoints / f"step_{step:06}" / "meta.json").write_text("{}")


def test_lost_workers_are_no_failure_of_a_cell_that_gets_on(new_run: NewRun, rooms: Rooms) -> None:
    folder = new_run()

    def loses_a_node(size: int) -> None:
        save(folder, 4)
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RayActorError, match=r"run: workers are gone: connection closed by peer") as raised:
        train_elastic(folder, GROUP, loses_a_node)
    assert raised.value.preempted

    def loses_it_at_once(size: int) -> None:
        threading.Timer(0.2, lambda: vars(rooms).update(nodes=0)).start()  # Ray learns it later than the other workers
        raise RuntimeError("no room any more")

    with pytest.raises(RayActorError, match="no room any more"):
        train_elastic(folder, GROUP, loses_it_at_once)


def test_a_cell_that_cannot_train_fails(new_run: NewRun, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run()
    monkeypatch.setattr(elastic, "_NODE_SECONDS", 0.1)
    save(folder, 4)

    def fails(size: int) -> None:
        raise RuntimeError("no such module")

    with pytest.raises(RuntimeError, match="no such module"):
        train_elastic(folder, GROUP, fails)

    def ends(size: int) -> None:
        save(folder, 8)
        folder.write_status(Status("failed", "loss nan", 8))
        raise RuntimeError("and then its process")

    with pytest.raises(RuntimeError, match="and then"):
        train_elastic(folder, GROUP, ends)


def test_a_cluster_in_trouble_ends_the_watch_and_not_the_cell(
    new_run: NewRun, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise ConnectionError("no head")

    monkeypatch.setattr(elastic, "node_leaves", broken)
    cell = Cell(new_run(), rooms)
    cell.last = 20
    train_elastic(cell.folder, GROUP, cell.fit)
    assert "run: no longer looks for more workers: no head" in caplog.text
    assert not any(thread.name == "elastic" for thread in threading.enumerate())
    assert Path(cell.folder.path / "metrics.jsonl").exists()
