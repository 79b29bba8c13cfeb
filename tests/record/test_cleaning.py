"""`bwlm storage clean` on runs that were trained: it removes nothing that a lease holds or a child needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bwlm.record.bucket import source_folders
from bwlm.record.checkpoint import checkpoint_steps, load_weights
from bwlm.record.cleaning import Item, find_unneeded, remove
from bwlm.record.disk import KINDS, StoredFiles, bytes_in, disk_usage
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.health import readable
from bwlm.record.launches import recorded_launch
from bwlm.text.prepare import Prepared
from tests.families import rewrite_config, untrained_child
from tests.runs import STEPS, NewFamily, make_child

DAY = 86_400.0


@pytest.fixture
def run(new_family: NewFamily) -> ExperimentFolder:
    """A run that was trained, with checkpoints at steps 4, 8 and 12."""
    return new_family("forward")


def aged(path: Path, days: float = 40.0) -> Path:
    """Makes a file or folder look as if nothing had changed in it for so long."""
    then = time.time() - days * DAY
    for inner in [*path.rglob("*"), path] if path.is_dir() else [path]:
        os.utime(inner, (then, then), follow_symlinks=False)
    return path


def unneeded(storage: Path, days: float = 30.0, logs: bool = False) -> dict[str, str]:
    found = find_unneeded(StoredFiles(storage), days * DAY, logs)
    assert found.bytes == sum(item.bytes for item in found.items)
    return {str(item.path.relative_to(storage)): item.kind for item in found.items if item.path.parts[-2] != "packed"}


def remove_all(storage: Path, days: float = 30.0, logs: bool = False) -> list[str]:
    return [remove(item) for item in find_unneeded(StoredFiles(storage), days * DAY, logs).items]


def test_of_a_finished_run_older_checkpoints_go_and_the_last_stays_whole(run: ExperimentFolder) -> None:
    storage = run.path.parent
    assert checkpoint_steps(run.checkpoints) == [4, 8, STEPS]
    assert unneeded(storage) == {}, "it finished just now"
    aged(run.path)
    went = {f"{run.id}/checkpoints/step_00000{step}": "checkpoint" for step in (4, 8)}
    assert unneeded(storage) == went
    assert unneeded(storage, days=50) == {}
    weights, _ = load_weights(run.checkpoints, STEPS)
    assert set(remove_all(storage)) == {""}
    assert checkpoint_steps(run.checkpoints) == [STEPS]
    assert {path.name for path in (run.checkpoints / f"step_{STEPS:06d}").iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "rng.safetensors", "meta.json",
    }  # fmt: skip
    assert run.damage() == []
    assert all((tensor == load_weights(run.checkpoints, STEPS)[0][name]).all() for name, tensor in weights.items())
    assert unneeded(storage) == {}


@pytest.mark.parametrize(
    ("settings", "gone", "without_optimizer"),
    [({"keep_every": 8}, [4], [8]), ({"keep_every": 4}, [], [4, 8])],
)
def test_what_its_settings_keep_loses_its_optimizer_state_alone(
    settings: dict[str, int], gone: list[int], without_optimizer: list[int], run: ExperimentFolder
) -> None:
    experiment = run.config().experiment.model_dump()
    rewrite_config(run, experiment=experiment | {"checkpoint": experiment["checkpoint"] | settings})
    aged(run.path)
    expected = {f"{run.id}/checkpoints/step_{step:06d}": "checkpoint" for step in gone} | {
        f"{run.id}/checkpoints/step_{step:06d}/optimizer.safetensors": "optimizer state" for step in without_optimizer
    }
    assert unneeded(run.path.parent) == expected
    remove_all(run.path.parent)
    for step in without_optimizer:
        load_weights(run.checkpoints, step)
    assert run.damage() == []


def test_a_checkpoint_from_which_a_child_began_stays(run: ExperimentFolder) -> None:
    child = untrained_child(run, "child", "mid", step=8)
    aged(run.path)
    assert set(unneeded(run.path.parent)) == {
        f"{run.id}/checkpoints/step_000004", f"{run.id}/checkpoints/step_000008/optimizer.safetensors"
    }  # fmt: skip
    (child.path / "parent_link.json").write_text("[]")  # its config still names the parent: then all are kept
    assert set(unneeded(run.path.parent)) == {
        f"{run.id}/checkpoints/step_00000{step}/optimizer.safetensors" for step in (4, 8)
    }
    remove_all(run.path.parent)
    assert checkpoint_steps(run.checkpoints) == [4, 8, STEPS]


def test_a_checkpoint_from_which_a_child_begins_meanwhile_stays(run: ExperimentFolder) -> None:
    aged(run.path)
    items = find_unneeded(StoredFiles(run.path.parent), 30 * DAY, False).items
    untrained_child(run, "child", "mid", step=4)
    assert [remove(item) for item in items] == ["a run begins from it now", ""]
    assert checkpoint_steps(run.checkpoints) == [4, STEPS]


@pytest.mark.parametrize(
    "status",
    [
        Status("failed", "loss nan at step 3", STEPS),
        Status("stopped", "by the scheduler at step 12", STEPS),
        Status(),
    ],
    ids=lambda status: status.state,
)
def test_a_run_that_may_go_on_keeps_everything(status: Status, run: ExperimentFolder) -> None:
    run.write_status(status)
    aged(run.path)
    assert unneeded(run.path.parent, logs=True) == {}


def test_a_run_that_is_held_is_not_touched(run: ExperimentFolder) -> None:
    storage = run.path.parent
    aged(run.path)
    items = find_unneeded(StoredFiles(storage), 30 * DAY, False).items
    other = ExperimentFolder(storage, run.id)
    with other.lease(trains=False):
        assert (
            f"{run.id}: {other.lease_holder()} trains it"
            in find_unneeded(StoredFiles(storage), 30 * DAY, False).passed_over
        )
        assert unneeded(storage) == {}
        assert {remove(item) for item in items} == {f"{other.lease_holder()} trains {run.id} now"}
    assert checkpoint_steps(run.checkpoints) == [4, 8, STEPS]


def test_logs_go_on_request_and_their_run_is_not_damaged(run: ExperimentFolder) -> None:
    storage = run.path.parent
    aged(run.path)
    assert not any(kind == "research log" for kind in unneeded(storage).values())
    assert unneeded(storage, logs=True)[f"{run.id}/base.h5"] == "research log"
    before = run.status()
    remove_all(storage, logs=True)
    assert not (run.path / "base.h5").exists()
    assert run.damage() == []
    assert (run.status(), readable([run])) == (before, ([run], []))
    assert "metrics.jsonl" in run.records_left()
    (run.path / "metrics.jsonl").unlink()
    assert run.damage() == ["metrics.jsonl: gone"], "other damage still shows"


def test_texts_that_no_run_was_trained_on_go(run: ExperimentFolder) -> None:
    storage = run.path.parent
    own = Path(run.config().corpus)
    packed = storage / "cache" / "packed"
    packed.mkdir(parents=True)
    for name in (own.name, "unused", "young"):
        (packed / name / "train").mkdir(parents=True)
        (packed / name / "train" / "rows.arrow").write_bytes(b"x" * 1000)
    (storage / "cache" / "tokenizers" / "t").mkdir(parents=True)
    (storage / "cache" / "summaries" / "s").mkdir(parents=True)
    for path in (packed / "unused", packed / own.name, *(storage / "cache").glob("[ts]*/*")):
        aged(path)

    def found() -> dict[str, str]:
        items = find_unneeded(StoredFiles(storage), 30 * DAY, False).items
        return {item.path.relative_to(storage).as_posix(): item.kind for item in items if "cache" in item.path.parts}

    assert found() == {"cache/packed/unused": "packed text", "cache/summaries/s": "cache"}
    with recorded_launch(storage / "grids" / "g"):
        assert found() == {}, "a launch that prepares its text has no run yet"
    with ExperimentFolder(storage, "starting").only_launch():
        assert found() == {}, "nor has the launch of a single experiment"
    for item in find_unneeded(StoredFiles(storage), 30 * DAY, False).items:
        if "cache" in item.path.parts:
            assert remove(item) == ""
    assert sorted(path.name for path in packed.iterdir()) == sorted([own.name, "young"])
    rewrite_config(run, corpus="cache/packed/elsewhere")
    shutil.rmtree(packed / "young")
    assert found() == {f"cache/packed/{own.name}": "packed text", "cache/tokenizers/t": "source of packed text"}


def test_the_rows_of_a_mixture_stay_while_a_run_was_trained_on_it(
    run: ExperimentFolder, mixture_for: Callable[[str], Prepared]
) -> None:
    """They lie in the folders of its sources, beside its own."""
    mixture, packed = mixture_for("sft"), run.path.parent / "cache" / "packed"
    shutil.copytree(mixture.folder.parent, packed)
    chat = make_child(run, "sft", replace(mixture, folder=packed / mixture.folder.name), "chat")
    aged(packed)

    def found() -> set[Path]:
        items = find_unneeded(StoredFiles(run.path.parent), 30 * DAY, False).items
        return {item.path for item in items if item.kind == "packed text"}

    own = {packed / mixture.folder.name, *source_folders(packed / mixture.folder.name)}
    assert len(own) == 3
    assert found() == set(packed.iterdir()) - own
    shutil.rmtree(chat.path)
    assert found() == set(packed.iterdir())


def test_what_killed_processes_left_goes_once_nobody_can_want_it(run: ExperimentFolder) -> None:
    storage = run.path.parent
    left = [
        storage / ".gone.0123abcd.deleted" / "base.h5",
        storage / "grids" / ".g.0123abcd.deleted" / "grid.json",
        run.path / ".status.json.0123abcd.tmp",
        run.checkpoints / ".step_000008.0123abcd.tmp" / "model.safetensors",
        storage / "cache" / "packed" / ".0011.0123abcd.tmp" / "rows.arrow",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    at_once = {path.parent.relative_to(storage).as_posix() for path in left[:2]}
    assert set(unneeded(storage, days=0)) >= at_once
    assert not any(".tmp" in name for name in unneeded(storage, days=0)), "its writer may be about to rename it"
    for path in left:
        aged(path.parent if path.parent.name.startswith(".") else path)
    for item in find_unneeded(StoredFiles(storage), 30 * DAY, False).items:
        if item.kind == "leftover":
            assert remove(item) == ""
    assert not [path for path in storage.rglob(".*") if path.name.endswith((".tmp", ".deleted"))]
    assert run.exists()
    assert run.damage() == []


_KILLED_AT_EACH_BOUNDARY = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from bwlm.record.cleaning import find_unneeded, remove
from bwlm.record.disk import StoredFiles

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
template, home = map(Path, sys.argv[1:])
for number in count():
    storage = home / f"{number:03}"
    shutil.copytree(template, storage)
    items = find_unneeded(StoredFiles(storage), 86400.0, True).items
    assert items
    if (child := os.fork()) == 0:
        left = number

        def before_change(event, arguments):
            global left
            if event in CHANGES:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(before_change)
        for item in items:
            remove(item)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_whenever_it_is_killed_every_run_is_whole_and_the_rest_can_go(run: ExperimentFolder, tmp_path: Path) -> None:
    template, home = tmp_path / "template", tmp_path / "killed"
    template.mkdir()
    aged(run.path).rename(template / run.id)
    command = [sys.executable, "-c", _KILLED_AT_EACH_BOUNDARY, str(template), str(home)]
    subprocess.run(command, check=True)
    storages = sorted(home.iterdir())
    assert len(storages) > 10
    for storage in storages:
        folder = ExperimentFolder(storage, run.id)
        assert folder.damage() == []
        for step in checkpoint_steps(folder.checkpoints):
            assert {path.name for path in (folder.checkpoints / f"step_{step:06d}").iterdir()} >= {"model.safetensors"}
            load_weights(folder.checkpoints, step)
        aged(storage)
        remove_all(storage, days=1, logs=True)
        assert checkpoint_steps(folder.checkpoints) == [STEPS]
        assert [path.name for path in folder.checkpoints.iterdir()] == [f"step_{STEPS:06d}"]
        assert not (folder.path / "base.h5").exists()
        assert folder.damage() == []


def test_a_disk_that_refuses_is_told(run: ExperimentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(run.path)
    [first, *_] = find_unneeded(StoredFiles(run.path.parent), 30 * DAY, False).items

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    assert remove(first) == f"cannot be removed (Permission denied): make {first.path.parent} writable"
    assert run.lease_holder() is None
    assert remove(Item("leftover", run.path / "no such file", "")) == ""


def test_the_bytes_of_a_storage_by_kind_and_grid(run: ExperimentFolder) -> None:
    storage = run.path.parent
    shutil.copytree(run.path, storage / "other")
    rewrite_config(ExperimentFolder(storage, "other"), id="other", grid="bars")
    (storage / "mlflow.db").write_bytes(b"x" * 100)
    (storage / "cache" / "tokenizers").mkdir(parents=True)
    (storage / "cache" / "tokenizers" / "t").write_bytes(b"x" * 10)
    (storage / "grids" / "bars").mkdir(parents=True)
    (storage / "grids" / "bars" / "grid.json").write_bytes(b"x")
    (storage / ".gone.0123abcd.deleted").mkdir()
    (storage / ".gone.0123abcd.deleted" / "base.h5").write_bytes(b"x" * 7)
    usage = disk_usage(StoredFiles(storage))
    assert set(usage.kinds) <= set(KINDS)
    assert usage.kinds.total() == bytes_in(storage)
    saved = [path for path in run.checkpoints.rglob("*") if path.is_file()]
    optimizer = sum(path.stat().st_size for path in saved if path.name == "optimizer.safetensors")
    assert usage.kinds["optimizer states"] == 2 * optimizer
    assert usage.kinds["weights"] == 2 * (sum(path.stat().st_size for path in saved) - optimizer)
    assert usage.kinds["research logs"] == 2 * (run.path / "base.h5").stat().st_size
    assert (usage.kinds["MLflow"], usage.kinds["other caches"], usage.kinds["leftovers"]) == (100, 10, 7)
    assert usage.kinds["grids and analyses"] == 1
    assert (usage.runs, set(usage.grids)) == ({"": 1, "bars": 1}, {"", "bars"})
    assert usage.grids["bars"] == bytes_in(storage / "other")
