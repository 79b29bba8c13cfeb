"""Deleting a run: refused where it would hurt, and whole or not at all whenever it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder, list_experiments, parents_in
from bwlm.record.grids import cells_of, write_cells
from bwlm.record.launches import recorded_launch
from bwlm.record.lineage import LINK
from bwlm.record.removal import (
    check_deletable,
    delete,
    delete_grid,
    discard_deleted,
    runs_of_grid,
    unfinished_deletions,
)
from tests.families import in_grid, untrained_child
from tests.runs import NewRun


def test_a_deleted_run_leaves_nothing(new_run: NewRun, tmp_path: Path) -> None:
    folder, _ = new_run("gone"), new_run("stays")
    (folder.checkpoints / "step_000004").mkdir(parents=True)
    (folder.checkpoints / "step_000004" / "meta.json").write_text("{}")
    delete(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["stays"]


def test_a_parent_is_not_deleted_before_its_children(new_run: NewRun, tmp_path: Path) -> None:
    base = new_run("base")
    mid = untrained_child(base, "mid", "mid")
    leaves = [untrained_child(mid, f"sft{number}", "sft") for number in range(5)]
    with pytest.raises(UserError, match=r"^base: mid begins from it: delete that first$"):
        delete(base)
    with pytest.raises(UserError, match=r"^mid: sft0, sft1, sft2 and 2 more begin from it: delete those first$"):
        delete(mid)
    for folder in (*leaves, mid, base):
        delete(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_child_with_a_damaged_link_is_a_child(new_run: NewRun, tmp_path: Path) -> None:
    base = new_run("base")
    child = untrained_child(base, "child", "mid")
    (child.path / LINK).write_text("[]")
    assert parents_in(tmp_path) == {"base": None, "child": "base"}
    with pytest.raises(UserError, match="child begins from it"):
        delete(base)
    (child.path / "config.json").write_text("{")
    assert parents_in(tmp_path) == {"base": None, "child": None}
    delete(child)
    delete(base)


@pytest.mark.parametrize("hold", [ExperimentFolder.lease, ExperimentFolder.only_launch], ids=["trained", "launched"])
def test_a_run_that_is_trained_is_not_deleted(hold: Callable[..., ExperimentFolder], new_run: NewRun) -> None:
    folder = new_run()
    with hold(ExperimentFolder(folder.path.parent, folder.id)):
        before = sorted(folder.path.iterdir())
        with pytest.raises(UserError, match=rf"^run: .*:{os.getpid()} trains it since 2.* ago\): wait for it, or end"):
            delete(folder)
        assert sorted(folder.path.iterdir()) == before
    delete(folder)
    assert not folder.path.exists()


def test_a_linked_folder_is_left_to_its_owner(new_run: NewRun, tmp_path: Path) -> None:
    folder = new_run()
    elsewhere = tmp_path / "disk" / "run"
    elsewhere.parent.mkdir()
    folder.path.rename(elsewhere)
    folder.path.symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"run: a symbolic link to .*: delete link and folder by hand"):
        delete(folder)
    assert folder.exists()


def test_a_run_that_cannot_be_read_can_be_deleted(new_run: NewRun) -> None:
    folder = new_run()
    for name in ("config.json", "status.json", LINK):
        (folder.path / name).write_text("{")
    check_deletable(folder)
    delete(folder)
    assert not folder.path.exists()


def test_a_disk_that_refuses_is_told(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run()

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(UserError, match=r"/run: cannot be deleted \(Permission denied\): make it and .* writable"):
            delete(folder)
    assert folder.status().state == "waiting"  # nobody holds it any more
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"run is deleted, but not all of it could be: remove .*\.run\..*\.deleted by"):
        delete(folder)
    assert list_experiments(folder.path.parent) == []


# ---- grids ----


@pytest.fixture
def grid(new_run: NewRun, tmp_path: Path) -> Path:
    """Grid `bars`: a base with a child, a cell that has not begun, and one that a later launch left out; and a run."""
    base = in_grid(new_run("bars_base"), "bars")
    untrained_child(base, "bars_mid", "mid", "bars")
    in_grid(new_run("bars_left_out"), "bars")
    new_run("alone")
    write_cells(tmp_path, "bars", ["bars_base", "bars_mid", "bars_never"])
    return tmp_path


def test_a_deleted_grid_leaves_no_run_and_no_folder(grid: Path) -> None:
    assert [folder.id for folder in runs_of_grid(grid, "bars")] == ["bars_base", "bars_left_out", "bars_mid"]
    delete_grid(grid, "bars")
    assert sorted(path.name for path in grid.iterdir()) == ["alone", "grids"]
    assert list((grid / "grids").iterdir()) == []


def test_a_grid_that_others_need_is_not_deleted(grid: Path) -> None:
    child = untrained_child(ExperimentFolder(grid, "bars_mid"), "mine", "sft")
    with pytest.raises(UserError, match=r"^bars_mid: mine begins from it: delete that first$"):
        delete_grid(grid, "bars")
    delete(child)
    with recorded_launch(grid / "grids" / "bars"), pytest.raises(UserError) as caught:
        delete_grid(grid, "bars")
    assert f":{os.getpid()} runs it since " in str(caught.value)
    assert str(caught.value).endswith("ago): bwlm grid stop bars first")
    with ExperimentFolder(grid, "bars_left_out").lease(), pytest.raises(UserError, match="trains it since"):
        delete_grid(grid, "bars")
    assert len(list_experiments(grid)) == 4, "all of it or nothing"


def test_the_deletion_of_a_grid_goes_on_where_it_was_cut_off(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []

    def cut_off(folder: ExperimentFolder, *arguments: object) -> None:
        if gone:
            raise KeyboardInterrupt
        gone.append(folder.id)
        delete(folder, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr("bwlm.record.removal.delete", cut_off)
        with pytest.raises(KeyboardInterrupt):
            delete_grid(grid, "bars")
    assert gone == ["bars_mid"], "children go first"
    assert cells_of(grid, "bars") == ["bars_base", "bars_mid", "bars_never"]
    delete_grid(grid, "bars")
    assert [folder.id for folder in list_experiments(grid)] == ["alone"]
    (grid / "grids" / ".bars.0123abcd.deleted").mkdir()
    assert [path.name for path in unfinished_deletions(grid)] == [".bars.0123abcd.deleted"]
    discard_deleted(grid)
    assert list((grid / "grids").iterdir()) == []


# ---- kill -9 ----

_KILLED_AT_EACH_BOUNDARY = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.removal import delete

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "os.truncate"}
template, home = map(Path, sys.argv[1:])
for number in count():
    storage = home / f"{number:03}"
    shutil.copytree(template, storage)
    if (child := os.fork()) == 0:
        left = number

        def before_change(event, arguments):
            global left
            # below the storage, or relative to an open folder of it
            if event in CHANGES and (str(arguments[0])[:1] != "/" or str(arguments[0]).startswith(str(storage))):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(before_change)
        delete(ExperimentFolder(storage, "run"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Without what says who holds or held it."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.lstrip(".").startswith(("lease.", "launch."))}


def test_whenever_a_deletion_is_killed_the_run_is_there_whole_or_not_at_all(new_run: NewRun, tmp_path: Path) -> None:
    """The danger is what is no run any more but has checkpoints, from which the next one of that id would go on."""
    template = tmp_path / "template"
    template.mkdir()
    new_run("run").path.rename(template / "run")
    for step in ("step_000004", "step_000008"):
        saved = template / "run" / "checkpoints" / step
        saved.mkdir(parents=True)
        for name in ("model.safetensors", "meta.json"):
            (saved / name).write_text(step)
    whole = contents(template / "run")
    home = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", _KILLED_AT_EACH_BOUNDARY, str(template), str(home)], check=True)

    outcomes = set()
    for storage in sorted(home.iterdir()):
        folder = ExperimentFolder(storage, "run")
        assert [run.id for run in list_experiments(storage)] == (["run"] if folder.path.exists() else [])
        if folder.path.exists():
            assert contents(folder.path) == whole
            assert folder.status().state == "waiting"
            assert folder.config().id == "run"
            delete(folder)
            outcomes.add("whole")
        else:
            outcomes.add("gone in part" if unfinished_deletions(storage, "run") else "gone")
            discard_deleted(storage)
        assert list(storage.iterdir()) == []
    assert outcomes == {"whole", "gone in part", "gone"}
    assert len(list(home.iterdir())) > 20
