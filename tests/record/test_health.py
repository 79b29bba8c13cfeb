"""A run that was edited, cut off or robbed of a file is named, with the file, and judged by nobody."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest

from bwlm.analysis.report.study import write_experiment_report, write_grid_report
from bwlm.errors import Interrupted, UserError
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import write_cells
from bwlm.record.health import DIGEST, RECORDS, readable
from bwlm.record.journal import NAME, read_journal
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import STEPS, NewFamily, NewRun, in_process
from tests.shell import Shell, check_mistake

LAST = f"checkpoints/step_{STEPS:06d}"
LOSSES = "evaluations/base/forward/validation.parquet"


@pytest.fixture
def run(new_family: NewFamily) -> ExperimentFolder:
    """A run that was trained, in a storage of its own."""
    return new_family("forward")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits a file as a person does in an editor."""
    content = read_json(path)
    change(content)
    write_json(path, content)


def cut(path: Path, left: float) -> None:
    os.truncate(path, int(path.stat().st_size * left))


def as_of_an_earlier_version(run: ExperimentFolder) -> None:
    """Without digests, and without what a finished run notes of its records."""
    for name in ("config.json", "status.json"):
        edit(run.path / name, lambda content: [content.pop(field, None) for field in (DIGEST, RECORDS)] and None)


def test_a_whole_run_has_no_fault(run: ExperimentFolder) -> None:
    assert run.damage() == run.damage(thorough=False) == []
    assert {NAME, "base.h5", f"{LAST}/model.safetensors", LOSSES} < run.records_left().keys()
    as_of_an_earlier_version(run)
    assert run.damage() == run.damage(thorough=False) == []
    assert run.records_left() == {}


# ---- config.json and status.json ----


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["experiment"].update(lr=3.0), r"experiment\.lr is 3\.0, and 4\.0 in its identity"),
        (lambda c: c["experiment"]["optim"].update(grad_clip=0.5), r"experiment\.optim\.grad_clip is 0\.5"),
        (lambda c: c["identity"].update(lr=3.0), "its fingerprint is not that of its identity"),
        (lambda c: c.update(fingerprint="0" * 16), "its fingerprint is not that of its identity"),
    ],
)
def test_an_edited_config_is_refused_with_the_way_out(
    change: Callable[[dict[str, Any]], None], told: str, earlier: bool, run: ExperimentFolder
) -> None:
    if earlier:
        as_of_an_earlier_version(run)
    edit(run.path / "config.json", change)
    reason = told if earlier else "its digest differs"
    mend = "put back the file that the run was made with, or delete the run: bwlm runs delete forward"
    with pytest.raises(UserError, match=rf"^{run.path}/config\.json: edited by hand \({reason}.*\): {mend}$"):
        run.config()


def test_every_field_of_a_config_is_covered(run: ExperimentFolder) -> None:
    edit(run.path / "config.json", lambda content: content["experiment"]["evaluation"].update(tokens=512))
    assert readable([run])[0] == []
    edit(run.path / "config.json", lambda content: content["experiment"]["evaluation"].update(tokens=1024))
    assert readable([run]) == ([run], [])  # put back
    for field in ("grid", "corpus", "created"):
        other = ExperimentFolder(run.path.parent, f"copy-{field}")
        shutil.copytree(run.path, other.path)
        edit(other.path / "config.json", lambda content, field=field: content.update({field: "x"}))  # type: ignore[misc]
        assert "edited by hand" in readable([other])[1][0]


def test_what_we_write_ourselves_is_no_edit(run: ExperimentFolder) -> None:
    config = run.config()
    run.reconfigure(replace(config, compute=replace(config.compute, micro_rows=4)))
    assert run.config().compute.micro_rows == 4
    run.write_status(Status())
    assert run.status().state == "stopped"


def test_an_edited_end_is_refused_and_can_be_taken_back(run: ExperimentFolder) -> None:
    edit(run.path / "status.json", lambda content: content["metrics"].update(val_bpb=0.5))
    with pytest.raises(UserError, match=r"status\.json: edited by hand .*: write \{\} into it, and the same command"):
        run.status()
    (run.path / "status.json").write_text("{}")
    assert run_phase(run, LocalSession(), in_process).state == "finished"
    assert run.damage() == []


# ---- records ----

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    NAME: (lambda path: cut(path, 0.99), r" bytes, and .* when the run finished"),
    "base.h5": (lambda path: cut(path, 0.5), r" bytes, and .* when the run finished"),
    LOSSES: (Path.unlink, "gone"),
    f"{LAST}/model.safetensors": (lambda path: cut(path, 0.9), r" bytes, and .* when the run finished"),
    f"{LAST}/meta.json": (Path.unlink, "gone"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_was_cut_off_or_deleted_is_named_by_every_command(
    name: str, run: ExperimentFolder, new_family: NewFamily, shell: Shell
) -> None:
    other = new_family("backward")
    damage, told = DAMAGES[name]
    damage(run.path / name)
    for thorough in (False, True):
        assert any(line.startswith(f"{name}: ") for line in run.damage(thorough))
    storage = ("--storage", str(run.path.parent))
    named = (
        rf"^forward is damaged: .*{name}: .*{told}.*: put the files back, or delete the run: bwlm runs delete forward"
    )
    for command in (["list"], ["tree"], ["tree", "forward"], ["show", "forward"]):
        answer = shell("runs", *command, *storage)
        assert answer.code == 0
        assert re.search(named, answer.err), command
    [listed] = [row for row in shell.json("runs", "list", *storage) if row["id"] == "forward"]
    assert listed["damage"] == run.damage(thorough=False)
    assert shell.json("runs", "show", "forward", *storage)["damage"][0].startswith(f"{name}: ")
    answer = shell("analyze", "compare", "forward", "backward", "--json", *storage)
    assert answer.code == 0
    assert f"forward is left out: it is damaged: {name}: " in answer.err
    assert other.id in answer.out
    assert "forward" not in {row["direction"] for row in shell.json("analyze", "compare", "*", *storage)["table"]}
    check_mistake(shell("analyze", "compare", "forward", *storage), "forward is left out: it is damaged: ")


@pytest.mark.parametrize("name", ["config.json", "status.json"])
def test_a_run_whose_config_or_status_is_gone_is_named(
    name: str, run: ExperimentFolder, new_family: NewFamily, shell: Shell
) -> None:
    new_family("backward")
    (run.path / name).unlink()
    storage = ("--storage", str(run.path.parent))
    told = rf"forward is left out: (.*/)?forward/{name}: no such file"
    for command in (["runs", "list"], ["runs", "tree"], ["analyze", "compare", "*"]):
        answer = shell(*command, *storage)
        assert answer.code == 0, command
        assert re.search(told, answer.err), command
    check_mistake(shell("runs", "show", "forward", *storage), f"forward/{name}: no such file")
    assert shell("runs", "delete", "forward", "--yes", *storage).code == 0
    assert not run.path.exists()


def test_folders_of_others_are_no_runs(run: ExperimentFolder, shell: Shell) -> None:
    """An exported model has a config.json too, and a launch that was cut off made a folder without one."""
    storage = run.path.parent
    (storage / "exported").mkdir()
    (storage / "exported" / "config.json").write_text("{}")
    shutil.copytree(run.path, storage / "begun")
    (storage / "begun" / "config.json").unlink()
    shutil.rmtree(storage / "begun" / "checkpoints")
    answer = shell("runs", "list", "--storage", str(storage))
    assert answer.err == ""
    assert [row["id"] for row in shell.json("runs", "list", "--storage", str(storage))] == ["forward"]


def test_a_log_whose_values_were_edited_is_not_analysed(run: ExperimentFolder, shell: Shell) -> None:
    log = run.path / "base.h5"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    answer = shell("analyze", "positions", "forward", "--storage", str(run.path.parent))
    check_mistake(
        answer, f"{log.relative_to(Path.cwd())}: edited since the run finished (its SHA-256 differs): put the file back"
    )


def test_values_that_were_edited_are_named(run: ExperimentFolder) -> None:
    """The new value has the same length: no size tells it."""
    journal, losses = run.path / NAME, run.path / LOSSES
    text = journal.read_text()
    at = text.index('"train_loss": ') + len('"train_loss": ')
    journal.write_text(f"{text[:at]}9{text[at + 1 :]}")
    content = bytearray(losses.read_bytes())
    content[len(content) // 2] ^= 1
    losses.write_bytes(content)
    assert sorted(run.damage()) == [
        f"{LOSSES}: edited since the run finished (its SHA-256 differs)",
        f"{NAME}: edited since the run finished (its SHA-256 differs)",
    ]


def test_weights_whose_bits_flipped_are_named_where_one_run_is_shown(run: ExperimentFolder, shell: Shell) -> None:
    path = run.path / LAST / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    [fault] = shell.json("runs", "show", "forward", "--storage", str(run.path.parent))["damage"]
    assert fault == f"{LAST}/model.safetensors: damaged (its SHA-256 is not the one in meta.json)"


# ---- of runs that noted nothing: earlier versions, and runs that have not finished ----


def test_a_cut_journal_of_an_earlier_version_is_named(run: ExperimentFolder) -> None:
    as_of_an_earlier_version(run)
    cut(run.path / NAME, 0.99)
    for thorough in (False, True):
        assert run.damage(thorough) == [f"{NAME}: ends at step 11, and the run finished at step 12"]


@pytest.mark.parametrize(
    ("lost", "fault"),
    [([3], "step 5 follows step 3"), ([0], "begins at step 2"), ([3, 4, 5], "step 7 follows step 3")],
)
def test_a_gap_in_a_journal_is_named(lost: list[int], fault: str, run: ExperimentFolder) -> None:
    as_of_an_earlier_version(run)
    lines = (run.path / NAME).read_bytes().splitlines(keepends=True)
    (run.path / NAME).write_bytes(b"".join(line for index, line in enumerate(lines) if index not in lost))
    assert run.damage() == [f"{NAME}: {fault}"]


def test_a_line_of_zeros_and_lines_out_of_order_are_named(run: ExperimentFolder) -> None:
    as_of_an_earlier_version(run)
    path = run.path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], bytes(len(lines[4]) - 1) + b"\n", *lines[5:]]))
    assert run.damage() == [f"{NAME}: line 5 of 12 is damaged", f"{NAME}: step 6 follows step 4"]
    path.write_bytes(b"".join([*lines[:4], lines[5], lines[4], *lines[6:]]))
    assert run.damage() == [f"{NAME}: step 6 follows step 4"]


def test_a_log_of_an_earlier_version_that_was_cut_or_ends_early_is_named(run: ExperimentFolder) -> None:
    as_of_an_earlier_version(run)
    whole = (run.path / "base.h5").read_bytes()
    cut(run.path / "base.h5", 0.5)
    [fault] = run.damage()
    assert fault.startswith("base.h5: damaged (")
    (run.path / "base.h5").write_bytes(whole)
    with h5py.File(run.path / "base.h5", "r+") as file:
        file["train/step"].resize(STEPS - 1, axis=0)
    assert run.damage() == ["base.h5: ends at step 11 instead of 12"]


def test_a_killed_run_with_a_torn_last_line_is_whole(new_run: NewRun) -> None:
    folder = new_run("killed")

    def killed(plan: Any, first: int, last: int) -> Any:
        yield from plan.batches(first, 7)
        raise Interrupted("killed")

    run_phase(folder, LocalSession(), killed)
    assert folder.status().state == "stopped"
    cut(folder.path / NAME, 0.99)
    assert [entry.step for entry in read_journal(folder.path)] == [1, 2, 3, 4, 5, 6]
    assert folder.damage() == folder.damage(thorough=False) == []
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    assert folder.damage() == []


def test_a_long_journal_is_listed_by_its_end(run: ExperimentFolder) -> None:
    """A list of many runs reads little; whoever judges reads all."""
    as_of_an_earlier_version(run)
    entries = list(read_journal(run.path))
    long = [replace(entries[0], step=step) for step in range(1, 1001) if step != 500]
    (run.path / NAME).write_bytes(b"".join(entry.line() for entry in long))
    run.write_status(Status("finished", "", 1000))
    assert run.damage(thorough=False) == []
    assert run.damage()[0] == f"{NAME}: step 501 follows step 499"


def test_a_report_names_a_damaged_run_and_judges_without_it(run: ExperimentFolder, new_family: NewFamily) -> None:
    other = new_family("backward")
    storage = run.path.parent
    write_cells(storage, "g", [run.id, other.id])
    whole = write_grid_report(storage, "g").files[0].read_text()
    assert "forward → backward" in whole
    cut(run.path / LAST / "model.safetensors", 0.9)
    text = write_grid_report(storage, "g").files[0].read_text()
    assert "forward → backward" not in text
    assert f"forward is left out: it is damaged: {LAST}/model.safetensors: " in text
    alone = write_experiment_report(run)[0].read_text()
    assert f"**Damaged**, so that no verdict counts it: {LAST}/model.safetensors: " in alone


def test_a_run_is_read_once_however_many_ask_for_it(run: ExperimentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell's report looks at all others of its grid."""
    assert run.damage() == []
    monkeypatch.setattr("bwlm.record.health.sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    assert run.damage() == []
