"""`bwlm storage` and `bwlm grid delete`: what a person is shown and asked, and what a script gets."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bwlm.record.checkpoint import KeepPolicy, checkpoint_steps, write_checkpoint
from bwlm.record.disk import bytes_in
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import write_cells
from bwlm.text.prepare import Prepared
from tests.families import in_grid, untrained_child
from tests.faults.checkpoints import snapshot
from tests.runs import STEPS, make_run
from tests.shell import Shell, check_mistake


@pytest.fixture
def storage(prepared: Prepared, shell: Shell) -> Path:
    """Grid `bars`: a cell that finished 40 days ago and has three checkpoints, and one that waits."""
    done = in_grid(make_run(prepared, shell.storage, "bars_done"), "bars")
    in_grid(make_run(prepared, shell.storage, "bars_waits"), "bars")
    for step in (4, 8, STEPS):
        write_checkpoint(done.checkpoints, snapshot(step), KeepPolicy(3))
    done.write_status(Status("finished", "", STEPS, {"val_bpb": 2.0}))
    then = time.time() - 40 * 86_400
    os.utime(done.path / "status.json", (then, then))
    write_cells(shell.storage, "bars", ["bars_done", "bars_waits"])
    return shell.storage


def test_what_would_go_is_listed_and_stays(storage: Path, shell: Shell) -> None:
    before = bytes_in(storage)
    answer = shell("storage", "clean", "--dry-run")
    assert answer.code == 0
    assert [line.partition(": ")[0].rpartition(", ")[0] for line in answer.out.splitlines()] == [
        "checkpoint, of a finished run; kept to resume from"
    ] * 2
    assert [line.rpartition(": ")[2] for line in answer.out.splitlines()] == [
        f"runs/bars_done/checkpoints/step_{step:06d}" for step in (4, 8)
    ]
    document = shell.json("storage", "clean", "--dry-run")
    assert [item["kind"] for item in document["items"]] == ["checkpoint"] * 2
    assert {item["run"] for item in document["items"]} == {"bars_done"}
    assert document["bytes"] == sum(item["bytes"] for item in document["items"]) > 0
    assert (document["left"], document["passed_over"]) == ([], [])
    assert bytes_in(storage) == before
    assert shell.json("storage", "usage")["unneeded_bytes"] == document["bytes"]


def test_it_is_removed_once_that_is_confirmed(storage: Path, shell: Shell) -> None:
    folder = ExperimentFolder(storage, "bars_done")
    refused = shell("storage", "clean")
    assert refused.code == 2
    assert refused.err == "bwlm: cannot ask for a confirmation, as this is no terminal: add --yes\n"
    check_mistake(shell("storage", "clean", "--json"), "cannot ask for a confirmation")
    assert checkpoint_steps(folder.checkpoints) == [4, 8, STEPS]
    answer = shell("storage", "clean", "--yes")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("removed 2 items, ")
    assert checkpoint_steps(folder.checkpoints) == [STEPS]
    assert shell("storage", "clean", "--yes") == (0, "nothing to remove that is older than 30d\n", "")
    assert shell.json("storage", "clean", "--yes")["items"] == []


def test_a_run_that_begins_from_a_checkpoint_while_a_person_thinks_keeps_it(
    storage: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thinks(question: str) -> bool:
        assert question.startswith("Remove 2 items, ")
        untrained_child(ExperimentFolder(storage, "bars_done"), "child", "mid", step=4)
        return True

    monkeypatch.setattr("bwlm.cli.storage.confirmed", thinks)
    assert shell("storage", "clean").out.splitlines()[-1].startswith("removed 1 item, ")
    assert checkpoint_steps(ExperimentFolder(storage, "bars_done").checkpoints) == [4, STEPS]
    monkeypatch.setattr("bwlm.cli.storage.confirmed", lambda question: False)
    answer = shell("storage", "clean", "--older", "0h")
    assert (answer.code, answer.err) == (1, "nothing is removed\n")
    assert "optimizer state, of an earlier checkpoint of a finished run, " in answer.out


def test_what_is_held_is_named(storage: Path, shell: Shell) -> None:
    with ExperimentFolder(storage, "bars_done").lease(trains=False):
        answer = shell("storage", "clean", "--dry-run")
    assert answer.out == "nothing to remove that is older than 30d\n"
    assert answer.err.splitlines()[0].startswith("not touched: bars_done: ")
    assert answer.err.splitlines()[1].startswith("not touched: cache: ")


def test_many_items_are_summed_by_kind(storage: Path, shell: Shell) -> None:
    for number in range(30):
        (storage / f".run{number}.0123abcd.deleted").mkdir()
    told = shell("storage", "clean", "--dry-run").out.splitlines()
    assert len(told) == 5
    assert told[-1] == "each of them: --dry-run --json"
    assert any(line.split()[:1] == ["leftover"] and " 30 " in line for line in told)


@pytest.mark.parametrize("age", ["30", "d", "-1d", "3m", "1e3d", ""])
def test_an_age_that_is_none_is_refused(age: str, shell: Shell) -> None:
    check_mistake(shell("storage", "clean", f"--older={age}"), f"--older: {age!r} is not an age: write hours, days or")


def test_the_usage_of_a_storage(storage: Path, shell: Shell) -> None:
    document = shell.json("storage", "usage")
    assert document.keys() == {"storage", "bytes", "free_bytes", "kinds", "grids", "unneeded_bytes"}
    assert document["bytes"] == sum(document["kinds"].values()) == bytes_in(storage)
    runs = sum(bytes_in(path) for path in storage.glob("bars_*"))
    assert document["grids"] == [{"grid": "bars", "runs": 2, "bytes": runs}]
    told = shell("storage", "usage").out.splitlines()
    assert any(line.split()[:2] == ["optimizer", "states"] for line in told)
    assert any(line.split()[:2] == ["bars", "2"] for line in told)
    assert told[-1].startswith("bwlm storage clean would free ")
    assert told[-1].endswith(" that is older than 30d")


def test_a_storage_that_does_not_exist_is_empty(shell: Shell) -> None:
    assert shell("storage", "usage").out.startswith("0 B in runs; ")
    assert shell("storage", "clean", "--yes").out == "nothing to remove that is older than 30d\n"
    assert not shell.storage.exists()


# ---- grid delete ----


def test_a_grid_is_deleted_with_its_runs(storage: Path, shell: Shell) -> None:
    told = shell("grid", "delete", "bars", "--dry-run").out
    assert told.startswith("would delete bars (2 runs and its reports, ")
    assert told.endswith("): bars_done and 1 more\n")
    check_mistake(shell("grid", "delete", "bars"), "cannot ask for a confirmation")
    check_mistake(shell("grid", "delete", "bras", "--yes"), "bras: no grid of this name in ")
    assert len(shell.json("runs", "list")) == 2
    answer = shell("grid", "delete", "bars", "--yes")
    assert answer.code == 0
    assert answer.out.endswith("; its MLflow runs stay\n")
    assert shell.json("runs", "list") == []
    assert json.dumps(sorted(path.name for path in storage.iterdir() if path.name != "cache")) == '["grids"]'
    check_mistake(shell("grid", "delete", "bars", "--yes"), "bars: no grid of this name in ")


def test_a_grid_from_which_a_run_begins_while_a_person_thinks_stays(
    storage: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thinks(question: str) -> bool:
        assert question.startswith("Delete bars (2 runs and its reports, ")
        untrained_child(ExperimentFolder(storage, "bars_done"), "child", "mid")
        return True

    monkeypatch.setattr("bwlm.cli.grid_control.confirmed", thinks)
    check_mistake(shell("grid", "delete", "bars"), "bars_done: child begins from it: delete that first")
    assert len(shell.json("runs", "list")) == 3


def test_a_name_that_is_a_path_deletes_nothing(storage: Path, shell: Shell) -> None:
    for name in ("..", "../bars_done", ".", ""):
        check_mistake(shell("grid", "delete", name, "--yes"), "no grid of this name in ")
    assert len(shell.json("runs", "list")) == 2
