"""What a run says of its speed and its rest, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bwlm.train import meter as module
from bwlm.train.meter import Meter, TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its only entry is set."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def new(progress: TrainingProgress, folder: Path, steps: int = 10) -> Meter:
    return Meter(progress, steps, flops_per_token=50, peak=10_000.0, device=torch.device("cpu"), folder=folder)


def test_speed_leaves_out_the_first_two_steps(tmp_path: Path, clock: list[float]) -> None:
    meter = new(TrainingProgress(), tmp_path)
    for seconds in (60.0, 30.0):
        clock[0] += seconds
        early = meter.stepped(loss=3.0, tokens=200, step_seconds=seconds)
        assert "tokens_per_second" not in early
        assert "seconds_left" not in early
    clock[0] += 5.0  # the step, and what it waited for
    third = meter.stepped(loss=3.0, tokens=200, step_seconds=4.0)
    assert third["step_seconds"] == 4
    assert third["wait_seconds"] == 1
    assert third["tokens_per_second"] == pytest.approx(40)
    assert third["mfu"] == pytest.approx(40 * 50 / 10_000)
    assert third["seconds_left"] == pytest.approx(5.0 * 7)
    assert third["tokens"] == 600
    assert third["flops"] == 30_000


def test_the_time_of_a_validation_is_not_a_steps(tmp_path: Path, clock: list[float]) -> None:
    meter = new(TrainingProgress(), tmp_path)
    for _ in range(2):
        meter.stepped(loss=3.0, tokens=200, step_seconds=1.0)
    clock[0] += 70.0
    meter.validated()
    clock[0] += 4.0
    assert meter.stepped(loss=3.0, tokens=200, step_seconds=4.0)["tokens_per_second"] == pytest.approx(50)


def test_a_run_that_goes_on_counts_on_and_measures_its_speed_anew(tmp_path: Path, clock: list[float]) -> None:
    """It may have another number of workers now, or another machine."""
    before = TrainingProgress(step=4, tokens=800, average=1.0, seconds=8.0, timed_tokens=400)
    meter = new(before, tmp_path)
    for tokens in (1000, 1200):
        clock[0] += 50
        early = meter.stepped(loss=3.0, tokens=200, step_seconds=50.0)
        assert early["tokens"] == tokens
        assert "tokens_per_second" not in early
        assert "seconds_left" not in early
    clock[0] += 2
    assert meter.stepped(loss=3.0, tokens=200, step_seconds=2.0)["tokens_per_second"] == pytest.approx(100)
    assert before.tokens_per_second == pytest.approx(600 / 10)


def test_the_smooth_loss_has_no_bias_of_its_start(tmp_path: Path) -> None:
    meter = new(TrainingProgress(), tmp_path)
    assert meter.stepped(2.0, 1, 1.0)["train_loss_smooth"] == pytest.approx(2.0)
    assert meter.stepped(4.0, 1, 1.0)["train_loss_smooth"] == pytest.approx((0.09 * 2 + 0.1 * 4) / (1 - 0.9**2))


def test_memory_records_and_disk_are_looked_at_once_a_second(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * 70)
    (tmp_path / "base.h5").write_bytes(b"x" * 30)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    meter = new(TrainingProgress(), tmp_path)
    first = meter.stepped(1.0, 1, 1.0)
    assert first["research_log_bytes"] == 100
    assert first["memory_bytes"] > 2**20
    assert first["disk_free_bytes"] > 0
    assert "memory_bytes" not in meter.stepped(1.0, 1, 1.0)
    assert meter.resources["memory_bytes"] == first["memory_bytes"]
    clock[0] += 1.5
    assert "memory_bytes" in meter.stepped(1.0, 1, 1.0)


def test_power_is_told_where_the_driver_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 350_500)
    assert module._power(torch.device("cuda", 0)) == {"gpu_watts": 350.5}

    def silent(device: torch.device) -> int:
        raise RuntimeError("NVML: not supported")

    monkeypatch.setattr(torch.cuda, "power_draw", silent)
    assert module._power(torch.device("cuda", 0)) == {}
