"""Warnings before a launch: hand-worked sizes, and a line only where something is short."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from bwlm.plan.limits import checkpoint_bytes, plan_warnings, training_bytes
from bwlm.plan.load import plan_experiment
from bwlm.plan.machine import Machine, available_memory, machine_of
from bwlm.plan.spec import Cell, LaunchSettings
from bwlm.record.checkpoint import step_folder
from tests.runs import STEPS, NewFamily

SMALL = {
    "model.sequence_length": 64, "tokenizer.vocab_size": 300, "budget.steps": 20, "budget.batch_tokens": 512,
    "resources.cpus_per_worker": 1,
}  # fmt: skip
ONE = 4 * 87552 + 503_808
"""Bytes of a checkpoint of depth 1: weights, and 8 a weight of AdamW (2 x 300 x 64), 4 of Muon (49,152)."""
HUGE = Machine(cores=8, memory=10**15, gpus=8, gpu_memory=10**15)


def cell(depth: int = 1, **settings: Any) -> Cell:
    """`section__field` sets one of a section."""
    given = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
    flags = {"phase": "base", "direction": "forward", "depth": depth}
    return plan_experiment(flags, [f"{name}={value}" for name, value in given.items()], f"d{depth}").cells[0]


def warned(cells: list[Cell], storage: Path, machine: Machine | None = HUGE, **launch: Any) -> list[str]:
    return list(plan_warnings(cells, LaunchSettings(**launch), storage, machine))


def test_sizes_worked_by_hand() -> None:
    """Depth 1: 49,152 weights in the block, and 2 x 300 x 64; a weight and its gradient take 4 bytes each."""
    assert training_bytes(cell()) == 8 * 87552 + 503_808
    assert training_bytes(cell(optim__kind="adamw")) == 16 * 87552
    assert training_bytes(cell(resources__workers=2)) == 8 * 87552 + 503_808 - 4 * 49152 // 2


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"every": 0}, 1),
        ({"every": 5, "keep": 1}, 1),
        ({"every": 5, "keep": 2}, 2),
        ({"every": 5, "keep": 1, "keep_best": "true"}, 2),
        ({"every": 5, "keep": 1, "keep_every": 10}, 3),
        ({"every": 5, "keep": 99}, 4),
    ],
)
def test_checkpoints_are_those_that_are_kept_and_the_one_that_is_written(settings: dict[str, Any], count: int) -> None:
    given = {f"checkpoint__{name}": value for name, value in settings.items()}
    assert checkpoint_bytes(cell(**given, evaluation__every=5)) == ONE * (count + 1)


def test_a_real_checkpoint_is_as_large(new_family: NewFamily) -> None:
    run = new_family("forward")
    path = step_folder(run.checkpoints, STEPS)
    found = sum((path / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    planned = checkpoint_bytes(Cell("forward", run.config().experiment, STEPS))
    assert planned // 4 == pytest.approx(found, abs=8192)  # three are kept; names and shapes are not counted


def test_a_grid_that_fits_has_no_warning(tmp_path: Path) -> None:
    assert warned([cell(depth) for depth in (1, 2, 3)], tmp_path / "runs") == []
    assert not (tmp_path / "runs").exists()


def test_cells_that_do_not_fit_into_memory_together(tmp_path: Path) -> None:
    each = training_bytes(cell())
    cells = [cell()] * 6
    assert warned(cells, tmp_path, Machine(4, 4 * each)) == []
    assert warned(cells, tmp_path, Machine(4, 3 * each)) == [
        "memory: 4 workers at once hold at least 4.8 MB of weights, gradients and optimizer (largest cell: d1), and "
        "this machine has 3.6 MB: launch.concurrency=3"
    ]
    assert warned(cells, tmp_path, Machine(4, 3 * each), concurrency=3) == []
    [line] = warned([cell(), cell(2)], tmp_path, Machine(4, each))
    assert "largest cell: d2" in line
    assert line.endswith("this machine has 1.2 MB: lower depth")


def test_a_model_that_does_not_fit_on_a_gpu(tmp_path: Path) -> None:
    on_gpu = cell(resources__gpus_per_worker=1)
    [line] = warned([on_gpu] * 4, tmp_path, Machine(4, 1, 2, training_bytes(on_gpu) - 1))
    assert line.startswith("memory: 1 worker at once hold")
    assert line.endswith("and a GPU has 1.2 MB: lower depth")


@pytest.mark.parametrize(("gpus", "found"), [(0, "no GPU"), (1, "1 GPU")])
def test_gpus_that_are_not_there(gpus: int, found: str, tmp_path: Path) -> None:
    asked = [cell(), cell(2, resources__gpus_per_worker=1, resources__workers=2)]
    assert warned(asked, tmp_path, Machine(4, 10**15, gpus, 10**15)) == [
        f"GPUs: a cell asks for 2 (resources.workers x resources.gpus_per_worker), and this machine has {found}: "
        "resources.gpus_per_worker=0 trains on the CPU"
    ]
    assert warned(asked, tmp_path, None) == [], "a cluster's machines are others"


def test_a_disk_that_is_too_full_names_the_larger_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1_000_000))
    [line] = warned([cell(checkpoint__every=1, checkpoint__keep=9)], tmp_path / "runs")
    assert f"8.5 MB of checkpoints, and {tmp_path / 'runs'} has 1.0 MB free: checkpoint.keep=1 takes less" in line
    [line] = warned([cell(research_log__tokens=1, budget__batch_tokens=65536)], tmp_path)
    assert "research_log.tokens=0 takes less" in line


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [line] = warned([cell()], tmp_path / "file" / "runs")
    assert line.startswith(f"storage: {tmp_path / 'file' / 'runs'} is not writable")


def test_a_width_that_is_rounded_is_told_with_its_sizes(tmp_path: Path) -> None:
    cells = [cell(depth, model__head_dim=48) for depth in (1, 2, 3)]
    assert warned(cells, tmp_path) == [
        "width: model.head_dim=48 does not divide 64 x depth at depth 1, 2, so the width is rounded up (128 to 144 at "
        "depth 2): a head_dim that divides 64 rounds none"
    ]


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1_000_000), ("max\n", None), (None, None)])
def test_a_containers_limit_of_memory_counts(limit: str | None, expected: int | None, tmp_path: Path) -> None:
    file = tmp_path / "memory.max"
    own = available_memory(file)
    if limit is not None:
        file.write_text(limit)
    assert available_memory(file) == (expected or own)


def test_a_cluster_is_not_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert machine_of([cell()]) is None
