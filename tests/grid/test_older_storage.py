"""A storage that an earlier version wrote, before modules had other names: all of it can be read, and goes on.

`tests/data/storage_identity_2.tar.xz` holds a grid of two directions with an SFT run after each, its text and its grid
file, without charts, MLflow's artifacts and the states of the optimizers.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from bwlm.record.experiment import ExperimentFolder
from tests.shell import Shell
from tests.shell import shell as shell

pytestmark = pytest.mark.usefixtures("ray_cluster")

ARCHIVE = Path(__file__).parents[1] / "data" / "storage_identity_2.tar.xz"
FORWARD, BACKWARD = "old_forward_d1_lr1_s0", "old_backward_d1_lr1_s0"
RUNS = [f"{name}-{phase}" for name in (BACKWARD, FORWARD) for phase in ("base", "sft")]


@pytest.fixture
def older(shell: Shell) -> Shell:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(shell.folder, filter="data")
    (shell.folder / "storage").rename(shell.storage)
    return shell


def weights(storage: Path) -> dict[str, bytes]:
    return {str(path.relative_to(storage)): path.read_bytes() for path in storage.glob("*/checkpoints/*/*.safetensors")}


def test_an_earlier_versions_storage_is_read_and_goes_on(older: Shell) -> None:
    listed = {row["id"]: row for row in older.json("runs", "list")}
    assert sorted(listed) == RUNS
    assert {row["state"] for row in listed.values()} == {"finished"}
    assert not any(row["damage"] for row in listed.values())
    assert older("runs", "tree").code == 0
    for run in RUNS:
        assert older.json("runs", "show", run)["id"] == run
    assert older("analyze", "compare", f"{FORWARD}-base", f"{BACKWARD}-base").code == 0
    assert older("analyze", "positions", f"{FORWARD}-base").code == 0
    assert "too few seeds to tell" in older("analyze", "gap", "old").out
    assert older("export", f"{FORWARD}-sft", "hf").code == 0
    evaluated = older.json("eval", f"{FORWARD}-sft")
    assert {row["task"] for row in evaluated} == {"documents", "conversations"}

    before = weights(older.storage)
    again = older("grid", "run", "old.yaml")
    assert again.code == 0, again.err
    assert "4 cells stay as they are" in again.err
    assert "identity version 2" in again.err
    assert weights(older.storage) == before, "a finished cell was trained again"

    child = older("train", "--phase", "mid", "--parent", f"{BACKWARD}-base@best", "--id", "child",
                  "--set", "budget.steps=2", "--set", "data.mixture={talks: 1.0}")  # fmt: skip
    assert child.code == 0, child.err
    folder = ExperimentFolder(older.storage, "child")
    assert (folder.status().state, folder.parent()) == ("finished", f"{BACKWARD}-base")
    link = folder.link()
    assert link is not None
    assert (link.step, link.best) == (4, True)
    assert "parent: old_backward_d1_lr1_s0-base, its best, step 4." in (folder.path / "RESEARCH_REPORT.md").read_text()
