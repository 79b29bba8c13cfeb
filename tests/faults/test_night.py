"""Faults over a grid that trains on a cluster: what is hit goes on from its last checkpoint, all else is untouched."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bwlm.record.starts import starts_of
from tests.cluster.heads import new_head
from tests.faults.night import Night

EVERY = 50
SETTINGS = (
    "name=night",
    "tokenizer.vocab_size=400",
    "model.sequence_length=64",
    "axes.direction=[forward, backward]",
    "axes.seed=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19]",
    "budget.steps=1000",
    "budget.batch_tokens=512",
    "evaluation.every=0",
    "evaluation.tokens=1024",
    f"checkpoint.every={EVERY}",
    "launch.concurrency=2",
    "launch.retries=9",
)
PAIR = (
    "name=pair",
    "axes.direction=[forward]",
    "axes.seed=[0]",
    "resources.workers=2",
    "launch.concurrency=1",
    "budget.steps=5000",
    "launch.stall_minutes=0.5",
)


@pytest.fixture(scope="module")
def night(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    home = Path(tempfile.mkdtemp(prefix="bwn-", dir="/tmp"))
    storage = tmp_path_factory.mktemp("night") / "storage"
    night = Night(new_head(home), storage, [f"data.source={corpus}", *SETTINGS])
    try:
        yield night
    finally:
        night.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


@pytest.mark.parametrize(
    "kind",
    # leases have tests of their own with clocks that jump
    ["worker", "notice", "data_task", pytest.param("clock", marks=pytest.mark.slow), "node", "driver", "head"],
)
def test_what_was_hit_goes_on_as_if_nothing_had_been(kind: str, night: Night, calm: Path) -> None:
    fault = night.hit(kind, cells=2 if kind == "node" else 1, before=700)
    for cell, seconds in night.recovered(fault).items():
        print(f"{kind}: {cell} trains again after {seconds:.1f} s")
        # of a fault without notice, those since the last checkpoint, and those done while one was being saved
        lost = starts_of(night.storage / cell)[-1].lost
        assert lost == 0 if kind == "notice" else lost < 2 * EVERY
    night.check(fault, calm)


@pytest.mark.parametrize("kind", ["trial", "hung"])
def test_a_cell_of_two_workers_too(kind: str, night: Night) -> None:
    """It trains again in other processes, and what it lost comes again, bit for bit."""
    if kind == "trial":
        night.switch(*SETTINGS, *PAIR)
    fault = night.hit(kind)
    for cell, seconds in night.recovered(fault).items():
        print(f"{kind}: {cell} trains again after {seconds:.1f} s")
    night.check_repeated(fault)
