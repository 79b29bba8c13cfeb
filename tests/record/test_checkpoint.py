"""Checkpoints: bit for bit, where the design says, kept by a policy, and made whole before older ones go."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bwlm.errors import RunError, UserError
from bwlm.record import checkpoint
from bwlm.record.checkpoint import (
    FILES,
    KeepPolicy,
    check_fits,
    checkpoint_steps,
    copy_to_host,
    load_checkpoint,
    load_newest,
    load_weights,
    read_meta,
    refuse_foreign,
    step_folder,
    steps_to_keep,
    write_checkpoint,
)
from bwlm.record.lease import LeaseLost
from tests.faults.checkpoints import ALL, flip, is_of, names, rewrite_meta, same_bits, snapshot


def save(folder: Path, step: int, last: int = 9, **options: Any) -> None:
    write_checkpoint(folder, snapshot(step, **options), KeepPolicy(last))


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    saved = snapshot(7, metric=0.1 + 0.2, direction="backward")
    saved.model["special"] = torch.tensor([-0.0, 1e-45, float("nan"), float("inf")])
    write_checkpoint(tmp_path, saved, KeepPolicy(1))
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert is_of(loaded, saved)
    assert loaded.meta["direction"] == "backward"
    weights, meta = load_weights(tmp_path, 7)
    assert same_bits(weights, saved.model)
    assert meta == loaded.meta == read_meta(tmp_path, 7)


def test_a_step_lies_where_the_design_says(tmp_path: Path) -> None:
    save(tmp_path, 400)
    assert names(tmp_path) == ["step_000400"]
    path = step_folder(tmp_path, 400)
    assert names(path) == sorted(ALL)
    meta = json.loads((path / "meta.json").read_text())
    assert meta["sha256"] == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}


def test_who_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step_000001").iterdir()} == {0o640}


def test_a_copy_has_nothing_in_common_with_its_original(tmp_path: Path) -> None:
    live = {"w": torch.arange(6.0).reshape(2, 3).T, "tied": torch.ones(2, requires_grad=True)}
    copies = copy_to_host(live)
    with torch.no_grad():
        live["w"] += 100
        live["tied"] += 100
    assert copies["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copies["tied"].tolist() == [1, 1]
    assert not copies["tied"].requires_grad
    write_checkpoint(tmp_path, checkpoint.Snapshot(1, copies, {}, {}, {}), KeepPolicy(1))  # contiguous
    assert load_weights(tmp_path, 1)[0]["w"].equal(copies["w"])


def test_no_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "absent") == []
    assert load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_none(figure: float, tmp_path: Path) -> None:
    save(tmp_path, 1, metric=figure)
    assert load_checkpoint(tmp_path, 1).metric is None


# ---- which ones stay ----

METRICS = {100: 3.0, 200: 1.0, 300: None, 400: 2.0, 500: 1.0, 600: None}


@pytest.mark.parametrize(
    ("policy", "stay"),
    [
        (KeepPolicy(last=1), {600}),
        (KeepPolicy(last=3), {400, 500, 600}),
        (KeepPolicy(last=9), set(METRICS)),
        (KeepPolicy(last=1, best=True), {200, 600}),  # the first of two equally good
        (KeepPolicy(last=2, best=True), {200, 500, 600}),
        (KeepPolicy(last=1, every=300), {300, 600}),
        (KeepPolicy(last=1, every=7), {600}),
        (KeepPolicy(last=1, best=True, every=400), {200, 400, 600}),
    ],
)
def test_what_stays(policy: KeepPolicy, stay: set[int]) -> None:
    assert steps_to_keep(METRICS, policy) == stay
    assert steps_to_keep({step: METRICS[step] for step in reversed(METRICS)}, policy) == stay


def test_where_nothing_was_measured_there_is_no_best() -> None:
    assert steps_to_keep({1: None, 2: None}, KeepPolicy(last=1, best=True)) == {2}
    assert steps_to_keep({}, KeepPolicy(best=True)) == set()


@pytest.mark.parametrize("fields", [{"last": 0}, {"last": -1}, {"every": -1}])
def test_a_policy_that_keeps_nothing_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KeepPolicy(**fields)


def test_the_policy_is_what_stays_on_disk(tmp_path: Path) -> None:
    policy = KeepPolicy(last=2, best=True, every=400)
    for step, metric in ((100, 3.0), (200, 1.0), (300, 2.0), (400, None), (500, 4.0), (600, 5.0), (1_000_000, None)):
        write_checkpoint(tmp_path, snapshot(step, metric), policy)
    assert checkpoint_steps(tmp_path) == [200, 400, 600, 1_000_000]
    assert names(tmp_path) == ["step_000200", "step_000400", "step_000600", "step_1000000"]


def test_a_process_that_lost_the_lease_renames_and_deletes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def lost() -> None:
        raise LeaseLost("another process writes")

    for step in (2, 3):
        with pytest.raises(LeaseLost):
            write_checkpoint(tmp_path, snapshot(step, generation=1), KeepPolicy(1), lost)
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert is_of(load_checkpoint(tmp_path, 2), snapshot(2))


def test_a_run_taken_up_from_an_older_checkpoint_does_not_keep_the_damaged_newer_one(tmp_path: Path) -> None:
    """It would count among the newest, and push out the good one that was just saved."""
    save(tmp_path, 100)
    save(tmp_path, 250)
    flip(tmp_path / "step_000250" / "model.safetensors", 0.5)
    save(tmp_path, 200, last=1)
    assert checkpoint_steps(tmp_path) == [200]


def test_one_that_cannot_be_judged_neither_goes_nor_pushes_out_a_good_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    flip(tmp_path / "step_000200" / "meta.json", 0.5)
    save(tmp_path, 300, last=2)
    assert checkpoint_steps(tmp_path) == [100, 200, 300]
    assert "step_000200/meta.json" in caplog.text


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step_000002" / "model.safetensors", 0.5)
    for generation in (1, 2):
        save(tmp_path, 2, generation=generation)
        assert is_of(load_checkpoint(tmp_path, 2), snapshot(2, generation=generation))
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_only_what_is_ours_is_deleted(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "checkpoints"
    for step in (1, 2):
        save(elsewhere, step)
    save(folder, 1)
    (folder / "step_000002").symlink_to(elsewhere / "step_000002")
    shutil.copytree(folder / "step_000001", folder / "step_000001.mine")
    (folder / "notes.txt").write_text("mine")
    save(folder, 3, last=1)
    assert names(folder) == ["notes.txt", "step_000001.mine", "step_000002", "step_000003"]
    assert is_of(load_checkpoint(elsewhere, 2), snapshot(2))


def test_one_that_cannot_be_deleted_is_told_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2, last=1)
    assert "step_000001: cannot be deleted (Device or resource busy): delete it by hand" in caplog.text
    assert checkpoint_steps(tmp_path) == [2]
    save(tmp_path, 3, last=1)
    assert names(tmp_path) == ["step_000003"]


def test_a_checkpoint_is_durable_before_its_name_is_and_older_ones_go_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut, which no test can make, loses what was not synced: so the order is what is tested."""
    save(tmp_path, 1)
    done: list[tuple[str, str]] = []

    def recording(name: str, described: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*given: Any, **options: Any) -> Any:
            done.append((name, described(*given)))
            return real(*given, **options)

        monkeypatch.setattr(os, name, call)

    recording("fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink().name)
    recording("rename", lambda _, new: Path(new).name)
    recording("unlink", lambda path: Path(path).name)
    save(tmp_path, 2, last=1)
    committed = done.index(("rename", "step_000002"))
    synced = {name for call, name in done[:committed] if call == "fsync"}
    assert synced >= set(ALL)
    assert any(name.startswith(".step_000002") for name in synced)
    assert done[committed + 1] == ("fsync", tmp_path.name)
    deletions = [(place, name) for place, (call, name) in enumerate(done) if call == "unlink"]
    assert deletions[0] == (committed + 2, "meta.json")
    assert done[committed + 3] == ("fsync", "step_000001")
    assert {name for _, name in deletions} == set(ALL)


# ---- whose it is ----

OURS: dict[str, object] = {"direction": "forward", "depth": 4, "vocab_size": 400, "tokenizer": "abc"}


@pytest.mark.parametrize(
    ("field", "value"), [("direction", "backward"), ("depth", 6), ("vocab_size", 4096), ("tokenizer", "def")]
)
def test_a_checkpoint_of_something_else_is_refused_before_its_tensors_are_opened(
    field: str, value: object, tmp_path: Path
) -> None:
    """Neither its file of weights nor an older checkpoint of our own is taken instead."""
    save(tmp_path, 1, **OURS)
    save(tmp_path, 2, **OURS | {field: value})
    for name in FILES:
        (tmp_path / "step_000002" / name).unlink()  # who opened one of them would say so
    told = rf"step_000002: .*{field} is {value!r}, and {OURS[field]!r} is needed.*move it"
    with pytest.raises(UserError, match=told):
        refuse_foreign(tmp_path, OURS)
    with pytest.raises(UserError, match=told):
        check_fits(tmp_path / "step_000002", read_meta(tmp_path, 2), OURS)


def test_what_a_checkpoint_does_not_say_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path, 1, direction="forward")
    with pytest.raises(UserError, match="tokenizer is None, and 'abc' is needed"):
        refuse_foreign(tmp_path, OURS)


def test_an_own_checkpoint_is_taken_and_a_damaged_one_is_no_strange_one(tmp_path: Path) -> None:
    save(tmp_path, 1, **OURS)
    save(tmp_path, 2, **OURS)
    flip(tmp_path / "step_000002" / "meta.json", 0.5)
    refuse_foreign(tmp_path, OURS)
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


@pytest.mark.parametrize("fields", [{"step": 1}, {"step": "2"}, {"sha256": None}, {"sha256": {}}])
def test_a_meta_that_is_not_of_this_step_or_vouches_for_nothing_is_refused(
    fields: dict[str, object], tmp_path: Path
) -> None:
    save(tmp_path, 2)
    rewrite_meta(tmp_path / "step_000002" / "meta.json", **fields)
    with pytest.raises(RunError, match="step_000002"):
        load_checkpoint(tmp_path, 2)


def test_where_none_is_whole_the_run_does_not_begin_anew_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first save would delete what a person, or a better disk, may still mend."""
    save(tmp_path, 1)
    flip(tmp_path / "step_000001" / "model.safetensors", 0.5)
    with pytest.raises(UserError, match=r"every checkpoint is damaged: put one back, or move the folder away to begin"):
        load_newest(tmp_path)
    assert "model.safetensors: damaged" in caplog.text
    assert load_newest(tmp_path / "never") is None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_will_not_read_now_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """An older one would be taken, and the next save would delete the newer."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    opened, read = Path.open, Path.read_bytes

    def refuse(path: Path) -> None:
        if path == tmp_path / "step_000002" / name:
            raise OSError(code, os.strerror(code))

    def failing_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        refuse(path)
        return opened(path, *args, **kwargs)

    def failing_read(path: Path) -> bytes:
        refuse(path)
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing_open)
        patched.setattr(Path, "read_bytes", failing_read)
        with pytest.raises(RunError, match=rf"step_000002/{name}: cannot be read \({os.strerror(code)}\): once it can"):
            load_newest(tmp_path)
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 2


def test_what_is_not_committed_is_never_listed_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step_000002", ".step_000003.0a1b2c3d.tmp", "step_000004.bak", "step_last"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    (tmp_path / "step_000002" / "meta.json").unlink()
    assert checkpoint_steps(tmp_path) == [1]
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_000001", "step_000004.bak", "step_000005", "step_last"]
