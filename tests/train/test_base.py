"""The loop and the base phase, alone in this process, with the in-process reader of the same plan."""

from __future__ import annotations

import errno
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bwlm.errors import RunError
from bwlm.model.optim import Optimizer
from bwlm.record.checkpoint import (
    KeepPolicy,
    Snapshot,
    checkpoint_steps,
    load_checkpoint,
    write_checkpoint,
)
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import Journal, read_journal
from bwlm.record.researchlog import ResearchLog
from bwlm.text.batches import Batch, DirectedPlan
from bwlm.text.direction import SpecialIds
from bwlm.train import loop
from bwlm.train import packed_phase as packed
from bwlm.train.packed_phase import build_model, loss_by_direction
from bwlm.train.records import Records
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import STEPS, NewRun, in_process, losses, weights_digest


class Killed(BaseException):
    """Stands for the end of the process: nothing in bwlm may catch it."""


def killed_at(step: int) -> Any:
    def stream(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
        for number in range(first, last):
            if number == step:
                raise Killed
            yield plan.batch(number)

    return stream


def test_a_mean_of_nothing_is_left_out_of_a_steps_metrics() -> None:
    """A reading that no row of a step has gives such a loss."""
    sums = {"some": torch.tensor([3.0, 2.0]), "none": torch.tensor([0.0, 0.0])}
    phase: Any = SimpleNamespace(measure=lambda batch, losses: sums)
    assert loop._means(phase, LocalSession(), {}, torch.zeros(1)) == {"some": 1.5}


@pytest.mark.parametrize("direction", ["forward", "backward", "bidirectional", "permuted"])
def test_a_run_learns_and_leaves_its_records(new_run: NewRun, direction: str) -> None:
    folder = new_run(direction=direction, lr=4.0)
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "finished"
    assert folder.status() == status
    assert losses(folder)[-1] < losses(folder)[0] - 0.3
    entries = list(read_journal(folder.path))
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    assert [entry.step for entry in entries if "val_bpb" in entry.metrics] == [5, 10, 12]
    assert checkpoint_steps(folder.checkpoints) == [4, 8, 12]
    meta = load_checkpoint(folder.checkpoints, 12).meta
    assert meta["direction"] == direction
    assert meta["fingerprint"] == folder.config().fingerprint
    for reading in {"forward", "backward", *([] if direction == "bidirectional" else [direction])}:
        assert (folder.evaluation("base", reading) / "validation.parquet").exists()


def test_own_figure_is_the_own_reading_and_the_mean_for_bidirectional(new_run: NewRun) -> None:
    backward = run_phase(new_run("b", direction="backward"), LocalSession(), in_process).metrics
    assert backward["val_bpb"] == backward["val_bpb_backward"] != backward["val_bpb_forward"]
    assert backward["val_bpb_tuning"] != backward["val_bpb"]
    both = run_phase(new_run("bi", direction="bidirectional"), LocalSession(), in_process).metrics
    assert both["val_bpb"] == pytest.approx((both["val_bpb_forward"] + both["val_bpb_backward"]) / 2, rel=1e-12)


@pytest.mark.parametrize("kill", [2, 4, 7, 11])
def test_resume_after_a_kill_is_exact(new_run: NewRun, kill: int) -> None:
    calm = new_run("calm")
    run_phase(calm, LocalSession(), in_process)
    cut = new_run("cut")
    with pytest.raises(Killed):
        run_phase(cut, LocalSession(), killed_at(kill))
    assert run_phase(cut, LocalSession(), in_process).state == "finished"
    assert losses(cut) == losses(calm)
    assert [entry.step for entry in read_journal(cut.path)] == list(range(1, STEPS + 1))
    assert weights_digest(cut) == weights_digest(calm)
    timed = ("tokens_per_second",)
    one, other = cut.status().metrics, calm.status().metrics
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize("kill", [8, STEPS])
def test_a_kill_straight_after_a_checkpoint_loses_no_entry(
    new_run: NewRun, kill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run()
    save = Records.save

    def save_and_die(records: Records, snapshot: Snapshot) -> None:
        save(records, snapshot)
        if snapshot.step == kill:
            raise Killed

    monkeypatch.setattr(Records, "save", save_and_die)
    with pytest.raises(Killed):
        run_phase(folder, LocalSession(), in_process)
    monkeypatch.setattr(Records, "save", save)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    entries = list(read_journal(folder.path))
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    assert "val_bpb" in entries[-1].metrics


def test_what_the_scheduler_stopped_stays_stopped(new_run: NewRun) -> None:
    folder = new_run()
    folder.write_status(Status("stopped", "by the scheduler at step 4", 4))
    assert run_phase(folder, LocalSession(), killed_at(0)).state == "stopped"


def test_a_finished_run_is_left_alone(new_run: NewRun) -> None:
    folder = new_run()
    run_phase(folder, LocalSession(), in_process)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    assert run_phase(folder, LocalSession(), killed_at(0)).state == "finished"
    assert before == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}


def test_a_kill_between_the_last_checkpoint_and_the_end_costs_nothing(new_run: NewRun) -> None:
    folder = new_run()
    finished = run_phase(folder, LocalSession(), in_process)
    folder.write_status(Status())
    again = run_phase(folder, LocalSession(), killed_at(0))
    assert again.metrics["val_bpb"] == finished.metrics["val_bpb"]


def test_rates_momentum_and_decay_follow_their_schedules(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the optimizer has them when it steps, of 12 steps with 2 up and round(0.5 x 12) down; also after a resume."""
    seen: dict[int, tuple[float, float, float]] = {}
    step = Optimizer.step

    def watched(optimizer: Optimizer) -> None:
        [matrix] = optimizer.parts["muon"].param_groups
        seen[len(seen)] = (matrix["lr"] / 0.02, matrix["momentum"], matrix["weight_decay"])
        step(optimizer)

    monkeypatch.setattr(Optimizer, "step", watched)
    optim = {"warmup_steps": 2, "warmdown_ratio": 0.5, "final_lr_frac": 0.1, "weight_decay": 0.3}
    folder = new_run(optim=optim)
    with pytest.raises(Killed):
        run_phase(folder, LocalSession(), killed_at(9))
    before = dict(seen)
    seen = {number: before[number] for number in range(8)}  # the checkpoint of step 8 is gone on from
    run_phase(folder, LocalSession(), in_process)
    rates = [0.5, 1, 1, 1, 1, 1, 1, *(1 - 0.9 * gone / 6 for gone in range(1, 6))]
    momenta = [0.85 + 0.1 * number / 300 for number in range(STEPS)]
    decays = [0.15 * (1 + math.cos(math.pi * number / STEPS)) for number in range(STEPS)]
    assert [seen[number] for number in range(STEPS)] == [
        pytest.approx(expected) for expected in zip(rates, momenta, decays, strict=True)
    ]
    logged = {entry.step - 1: entry.metrics["lr_matrix"] / 0.02 for entry in read_journal(folder.path)}
    assert [logged[number] for number in range(STEPS)] == pytest.approx(rates)


def spoilt_weights(snapshot: Snapshot) -> None:
    del snapshot.model["lm_head.weight"]


def spoilt_optimizer(snapshot: Snapshot) -> None:
    snapshot.optimizer.popitem()


def spoilt_progress(snapshot: Snapshot) -> None:
    snapshot.meta["progress"]["from_the_future"] = 1


@pytest.mark.parametrize("spoil", [spoilt_weights, spoilt_optimizer, spoilt_progress])
def test_a_checkpoint_of_another_version_is_told_by_name(new_run: NewRun, spoil: Callable[[Snapshot], None]) -> None:
    folder = new_run()
    with pytest.raises(Killed):
        run_phase(folder, LocalSession(), killed_at(9))
    saved = load_checkpoint(folder.checkpoints, 8)
    spoil(saved)
    write_checkpoint(folder.checkpoints, saved, KeepPolicy(9))
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert re.search(
        r"step_000008: not damaged, but this version of bwlm cannot load it \(.*\): resume with the version",
        status.reason,
    )
    assert checkpoint_steps(folder.checkpoints) == [4, 8]


def test_an_end_that_cannot_be_noted_keeps_its_reason(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: ExperimentFolder, status: Status) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
        raise RunError("the reason of its own")

    fine, failing = new_run("fine"), new_run("failing")
    for noting in ("finish", "write_status"):
        monkeypatch.setattr(ExperimentFolder, noting, full)
    finished = run_phase(fine, LocalSession(), in_process)
    assert (finished.state, "No space left" in finished.reason) == ("failed", True)
    failed = run_phase(failing, LocalSession(), broken)
    assert (failed.state, failed.reason) == ("failed", "the reason of its own")


def test_every_cell_of_a_process_is_compiled_anew(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a function for eight shapes and then silently runs it as it is."""
    graphs: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **options, backend=counted))
    found = []
    for head_dim in range(8, 32, 2):
        settings = {"model": {"sequence_length": 64, "head_dim": head_dim}, "compute": {"compile": True}}
        folder = new_run(f"h{head_dim}", **settings, budget={"steps": 1, "batch_tokens": 512})
        before = len(graphs)
        assert run_phase(folder, LocalSession(), in_process).state == "finished"
        found.append(len(graphs) - before)
    assert min(found) > 0


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_batch_does_not_depend_on_the_device_batch_size(new_run: NewRun, rows: int) -> None:
    whole = new_run("whole", compute={"device_batch_size": 8})
    run_phase(whole, LocalSession(), in_process)
    parts = new_run("parts", compute={"device_batch_size": rows})
    run_phase(parts, LocalSession(), in_process)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-4)
    assert losses(parts)[0] == pytest.approx(losses(whole)[0], rel=1e-6)


def test_a_loss_that_is_not_finite_names_step_and_rows(new_run: NewRun) -> None:
    folder = new_run()
    with pytest.raises(Killed):
        run_phase(folder, LocalSession(), killed_at(6))
    healthy = load_checkpoint(folder.checkpoints, 4)
    poisoned = healthy.model | {"lm_head.weight": torch.full_like(healthy.model["lm_head.weight"], math.nan)}
    write_checkpoint(folder.checkpoints, replace(healthy, model=poisoned), KeepPolicy(3))
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert "loss nan" in status.reason
    assert status == folder.status()
    assert (status.diverged, status.step) == (5, 4)  # what it had measured before is still told
    assert status.metrics["train_loss"] == list(read_journal(folder.path))[-1].metrics["train_loss"]
    assert "step 5" in status.reason
    assert "rows " in status.reason
    assert folder.status().state == "failed"


def test_every_direction_starts_from_the_same_weights_and_seeds_differ(new_run: NewRun) -> None:
    def first_weight(name: str, **settings: Any) -> torch.Tensor:
        model = build_model(new_run(name, **settings).config(), torch.device("cpu"))
        return model.state_dict()["embedding.weight"]

    forward = first_weight("f")
    assert torch.equal(forward, first_weight("b", direction="backward"))
    assert not torch.equal(forward, first_weight("s", seed=1))


def test_document_mask_changes_what_a_model_sees(new_run: NewRun) -> None:
    crossing, inside = new_run("crossing", model__document_mask=False), new_run("inside")
    run_phase(crossing, LocalSession(), in_process)
    run_phase(inside, LocalSession(), in_process)
    assert losses(crossing)[0] == pytest.approx(losses(inside)[0], rel=1e-3)
    assert losses(crossing)[3:] != losses(inside)[3:]


def test_loss_by_direction_adds_up(new_run: NewRun) -> None:
    folder = new_run(direction="bidirectional")
    run_phase(folder, LocalSession(), in_process)
    for entry in read_journal(folder.path):
        low, high = sorted(entry.metrics[f"train_loss_{name}"] for name in ("forward", "backward"))
        assert low < entry.metrics["train_loss"] < high
    backward = new_run("b", direction="backward")
    run_phase(backward, LocalSession(), in_process)
    for entry in read_journal(backward.path):
        assert entry.metrics["train_loss_backward"] == pytest.approx(entry.metrics["train_loss"], rel=1e-5)
        assert "train_loss_forward" not in entry.metrics


def test_loss_by_direction_by_hand() -> None:
    """Two segments of one row: <bos> <forward> a b, then <bos> <backward> c; padding at the end."""
    special = SpecialIds(bos=90, pad=91, forward=92, backward=93)
    batch = {
        "inputs": np.array([[90, 92, 1, 2, 90, 93, 3, 91]], dtype=np.int32),
        "targets": np.array([[-1, 1, 2, 90, -1, 3, -1, -1]], dtype=np.int32),
    }
    losses = torch.tensor([[0.0, 1.0, 2.0, 4.0, 0.0, 8.0, 0.0, 0.0]])
    sums = loss_by_direction("bidirectional", special, batch, losses)
    assert {name: values.tolist() for name, values in sums.items()} == {
        "train_loss_forward": [7, 3],
        "train_loss_backward": [8, 1],
    }
    assert loss_by_direction("permuted", special, batch, losses)["train_loss_permuted"].tolist() == [15, 4]


class AskedAt(LocalSession):
    """A session whose process is asked to end while a step is computed."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def stopping(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("step", [1, 6, STEPS])
def test_a_run_that_is_asked_to_end_saves_at_that_step_and_goes_on_as_if_nothing_had_been(
    new_run: NewRun, step: int
) -> None:
    calm, cut = new_run("calm"), new_run("cut")
    run_phase(calm, LocalSession(), in_process)
    status = run_phase(cut, AskedAt(step), in_process)
    assert step in checkpoint_steps(cut.checkpoints)
    assert (status.state, status.step) == ("finished" if step == STEPS else "stopped", step)
    assert status.ended == (step == STEPS)
    assert run_phase(cut, LocalSession(), killed_at(0) if step == STEPS else in_process).state == "finished"
    assert losses(cut) == losses(calm)
    assert weights_digest(cut) == weights_digest(calm)


@pytest.mark.parametrize(
    ("field", "value"), [("direction", "backward"), ("vocab_size", 9), ("tokenizer", "x"), ("fingerprint", "y")]
)
def test_another_models_checkpoint_is_refused_before_a_model_is_made(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    folder = new_run()
    with pytest.raises(Killed):
        run_phase(folder, LocalSession(), killed_at(6))
    saved = load_checkpoint(folder.checkpoints, 4)
    write_checkpoint(folder.checkpoints, replace(saved, meta=saved.meta | {field: value}), KeepPolicy(3))
    monkeypatch.setattr(packed, "build_model", None)
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert re.search(f"step_000004: another model's checkpoint .*{field} is", status.reason)


def test_the_best_and_every_so_many_checkpoints_stay(new_run: NewRun) -> None:
    kept = {"every": 2, "keep": 1, "keep_every": 4, "keep_best": True}
    folder = new_run(checkpoint=kept, evaluation={"every": 2, "tokens": 1024}, lr=4.0)
    run_phase(folder, LocalSession(), in_process)
    figures = {e.step: e.metrics["val_bpb_tuning"] for e in read_journal(folder.path) if "val_bpb_tuning" in e.metrics}
    best = min(figures, key=figures.__getitem__)
    assert checkpoint_steps(folder.checkpoints) == sorted({4, 8, 12, best})
    assert load_checkpoint(folder.checkpoints, 12).metric == figures[12]


def test_a_journal_that_cannot_be_written_fails_the_run_before_its_next_checkpoint(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, folder = new_run("calm"), new_run()
    run_phase(calm, LocalSession(), in_process)
    write = Journal.append

    def full_from_six(journal: Journal, step: int, metrics: dict[str, float]) -> None:
        if step >= 6:
            raise OSError(28, "No space left on device")
        write(journal, step, metrics)

    monkeypatch.setattr(Journal, "append", full_from_six)
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert re.search(r"metrics\.jsonl: cannot be written \(No space left", status.reason)
    assert checkpoint_steps(folder.checkpoints) == [4]
    monkeypatch.setattr(Journal, "append", write)
    folder.write_status(Status())
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    assert losses(folder) == losses(calm)


def test_journal_and_log_are_durable_before_their_checkpoint_and_hold_up_no_step(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, list[str]] = {"MainThread": [], "checkpoint_0": []}
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced[threading.current_thread().name] += [Path(f"/proc/self/fd/{descriptor}").resolve().name]
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = new_run()
    run_phase(folder, LocalSession(), in_process)
    own = ["metrics.jsonl", "base.h5.tail"]
    beside = synced["checkpoint_0"]
    starts = [at for at, name in enumerate(beside) if name == own[0]]
    assert len(starts) == len(checkpoint_steps(folder.checkpoints))
    assert starts[0] == 0
    assert all(beside[at : at + 2] == own and "meta.json" in beside[at + 2 :] for at in starts)
    assert not set(own) & set(synced["MainThread"])


@pytest.mark.parametrize(("owner", "named"), [(Journal, "metrics.jsonl"), (ResearchLog, "base.h5")])
def test_a_checkpoint_whose_steps_are_not_durable_is_none(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, owner: type, named: str
) -> None:
    def broken(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(owner, "sync", broken)
    folder = new_run()
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert f"{named}: cannot be written (Input/output error)" in status.reason
    assert checkpoint_steps(folder.checkpoints) == []


def test_a_validation_that_is_not_finite_fails_the_run(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, measure = new_run(), packed.Validation.metrics

    def broken(*arguments: Any) -> dict[str, float]:
        return measure(*arguments) | {"val_bpb": math.nan}

    monkeypatch.setattr(packed.Validation, "metrics", broken)
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert re.search(r"^val_bpb not finite at step 5, .*lower lr", status.reason)
    assert status.diverged == 5
    assert checkpoint_steps(folder.checkpoints) == [4]


@pytest.mark.parametrize(
    ("owner", "method", "named"),
    [(Journal, "__init__", r"metrics\.jsonl"), (packed.SegmentLosses, "save", "evaluations/base/forward")],
)
def test_what_cannot_be_written_fails_the_run_with_its_file(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, named: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = new_run()
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, full)
        status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert re.search(rf"{named}: cannot be written \(No space left on device\): free space", status.reason)
    folder.write_status(Status())
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
