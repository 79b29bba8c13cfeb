"""Room for cells, asked of a real Ray: what other work leaves, part by part."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bwlm.cluster.placement import FurtherPlaces, bundles_of, count_places, need_words
from bwlm.config import ResourceSettings
from tests.cluster.heads import Head, second_node


def holder(cpus: float) -> Any:
    """An actor that holds CPUs of the tests' Ray."""
    import ray

    @ray.remote
    class Holder:
        def here(self) -> None: ...

    actor = Holder.options(num_cpus=cpus).remote()
    ray.get(actor.here.remote())
    return actor


def test_a_launch_takes_what_other_work_leaves_and_a_spare_cpu_stays(ray_cluster: str) -> None:
    """Six CPUs: one is spared, and others hold three."""
    import ray

    needs = ResourceSettings(cpus_per_worker=2)
    assert count_places(needs, 3) == 2
    assert count_places(needs, 1) == 1
    other = holder(3)
    assert count_places(needs, 3) == 1
    ray.kill(other)
    assert count_places(ResourceSettings(workers=2, cpus_per_worker=2), 2) == 1


def test_two_launches_do_not_hold_room_from_each_other(ray_cluster: str) -> None:
    """A cell of five CPUs and the spare one fill the six: with a spare CPU for each launch neither would fit."""
    with ThreadPoolExecutor() as launches:
        asked = [launches.submit(count_places, ResourceSettings(cpus_per_worker=5), 2) for _ in range(2)]
        assert [launch.result(timeout=60) for launch in asked] == [1, 1]


class Releasing(logging.Handler):
    """Ends an actor as soon as something is logged."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor, self.lines = actor, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        import ray

        self.lines.append(record.getMessage())
        ray.kill(self.actor)


def test_a_launch_waits_until_other_work_has_gone_and_says_so(ray_cluster: str) -> None:
    released = Releasing(holder(6))
    log = logging.getLogger("bwlm.cluster.placement")
    log.addHandler(released)
    try:
        assert count_places(ResourceSettings(cpus_per_worker=2), 2) == 2
    finally:
        log.removeHandler(released)
    assert released.lines == [
        "waiting for room for 2 cells of 2 CPUs and a spare CPU: the cluster is busy with other work"
    ]


def taken(places: FurtherPlaces, wanted: int) -> int:
    """Return the number of cells that have room, once Ray has given some."""
    deadline = time.monotonic() + 30
    while not (count := places.take(wanted)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return count


def test_further_cells_get_the_room_that_comes_free_and_a_spare_cpu_stays(ray_cluster: str) -> None:
    """Cells of two CPUs: where others hold four of six there is room for one, but then for no spare CPU."""
    import ray

    places, others = FurtherPlaces(ResourceSettings(cpus_per_worker=2)), [holder(2), holder(2)]
    try:
        looks = [(time.sleep(0.1), places.take(2))[1] for _ in range(30)]
        assert looks == [0] * 30, "the cell has room, but the spare CPU has none"
        ray.kill(others.pop())
        assert taken(places, 2) == 1
        others.append(holder(2))  # it has the room at once: nothing was asked for again
        assert places.take(2) == 0
        ray.kill(others.pop())
        assert taken(places, 2) == 1
    finally:
        places.forget()
        for other in others:
            ray.kill(other)
    assert count_places(ResourceSettings(cpus_per_worker=5), 1) == 1, "all room was given back"


_WITH_GPUS = """
import sys, time, ray
from bwlm.cluster.placement import count_places
from bwlm.config import ResourceSettings

ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)

@ray.remote(num_cpus=0, num_gpus=0.6)
class Holder:
    def here(self): ...

holders = [Holder.remote() for _ in range(3)]
ray.get([one.here.remote() for one in holders])
print(count_places(ResourceSettings(gpus_per_worker=1), 4))
while ray.available_resources()["GPU"] < 2.1:  # Ray takes a moment to take back the room that was asked for
    time.sleep(0.1)
print(count_places(ResourceSettings(gpus_per_worker=0.4), 9))
"""


@pytest.mark.faults
def test_parts_of_gpus_that_are_left_make_no_whole_one(head: Head, tmp_path: Path) -> None:
    """Three of four GPUs have 0.4 left: 2.2 in all, of which one is whole; parts of 0.4 fit five times."""
    with second_node(head, tmp_path / "node.log", options=("--num-gpus=4", "--num-cpus=8")):
        code = [sys.executable, "-c", _WITH_GPUS, head.gcs]
        done = subprocess.run(code, env=head.environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "5"], done.stderr[-2000:]


def test_what_a_cell_is_asked_as() -> None:
    assert bundles_of(ResourceSettings(cpus_per_worker=2)) == [{"CPU": 2.0}]
    two = ResourceSettings(workers=2, cpus_per_worker=3, gpus_per_worker=1)
    assert bundles_of(two) == [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 0.1}]
    assert need_words(two) == "2 workers of 3 CPUs and 1 GPU"
    assert need_words(ResourceSettings()) == "1 CPU"
