"""`bwlm runs`: the family of runs as a person and as a script sees it, on folders as launches make them."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

from bwlm.paths import write_json
from bwlm.record.checkpoint import KeepPolicy, write_checkpoint
from bwlm.record.code import IDENTITY_VERSION
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import fingerprint, modules_of
from bwlm.record.grids import write_cells
from bwlm.record.lineage import LINK
from bwlm.text.prepare import Prepared
from tests.families import MIXTURE, in_grid, link_anew, rewrite_config, untrained_child, validated
from tests.faults.checkpoints import snapshot
from tests.runs import STEPS, make_run
from tests.shell import Shell, check_mistake

BWLM = Path(sys.executable).parent / "bwlm"


@pytest.fixture
def family(prepared: Prepared, shell: Shell) -> Path:
    """talk-base -> talk-mid -> talk-sft and talk-two, which runs; and alone."""
    storage = shell.storage
    base = validated(make_run(prepared, storage, "talk-base", direction="backward"), val_bpb={5: 2.75, 12: 2.5})
    mid = validated(untrained_child(base, "talk-mid", "mid"), val_bpb={5: 2.0625, 10: 2.125, 12: 2.25})
    validated(
        untrained_child(mid, "talk-sft", "sft", lr=0.5, optim={"init_lr_frac": 0.02}),
        val_bpb={12: 2.0},
        val_bpb_forward={12: 3.5},
    )
    untrained_child(mid, "talk-two", "sft", seed=7)
    make_run(prepared, storage, "alone").write_status(Status("failed", "loss nan at step 3", 3))
    return storage


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def narrow(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))


def plain(text: str) -> list[str]:
    """What is left of a terminal's lines without colours."""
    return lines(re.sub(r"\x1b\[[0-9;]*m", "", text))


# ---- tree ----


def test_a_tree_where_there_is_no_terminal(family: Path, shell: Shell) -> None:
    answer = shell("runs", "tree")
    assert answer.err == ""
    assert answer.out.isascii()
    assert answer.out.splitlines() == [
        "alone             base  forward   d1                            failed at step 3 of 12",
        "talk-base         base  backward  d1  val_bpb 2.5000            finished",
        "`-- talk-mid      mid   backward  d1  val_bpb 2.0625 at step 5  finished",
        "    +-- talk-sft  sft   backward  d1  val_bpb 2.0000            finished",
        "    `-- talk-two  sft   backward  d1                            waiting",
    ]


def test_a_tree_in_a_wide_and_in_a_narrow_terminal(family: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 90)
    wide = plain(shell("runs", "tree", "talk-sft").out)
    assert wide == [
        "talk-base         base  backward  d1  val_bpb 2.5000            finished",
        "└── talk-mid      mid   backward  d1  val_bpb 2.0625 at step 5  finished",
        "    └── talk-sft  sft   backward  d1  val_bpb 2.0000            finished",
    ]
    narrow(monkeypatch, 50)
    assert plain(shell("runs", "tree").out) == [
        "alone",
        "  base, forward, d1, failed at step 3 of 12",
        "talk-base",
        "  base, backward, d1, val_bpb 2.5000, finished",
        "└── talk-mid",
        "      mid, backward, d1, val_bpb 2.0625 at step 5,",
        "      finished",
        "    ├── talk-sft",
        "    │     sft, backward, d1, val_bpb 2.0000,",
        "    │     finished",
        "    └── talk-two",
        "          sft, backward, d1, waiting",
    ]


def test_a_checkpoint_that_is_not_the_parents_last_is_shown(family: Path, shell: Shell) -> None:
    base = ExperimentFolder(family, "talk-base")
    untrained_child(base, "early", "mid", step=8)
    untrained_child(base, "best", "mid", step=4, best=True)
    told = shell("runs", "tree", "talk-base").out
    assert told.count("from its parent's") == 2
    assert "from its parent's step 8" in told
    assert "from its parent's best, step 4" in told
    assert (
        "  parent    talk-base (base, its best, step_000004, weights abababababab)" in shell("runs", "show", "best").out
    )
    [tree] = shell.json("runs", "tree", "talk-base")
    assert {child["id"]: child["begins"] for child in tree["children"]} == {
        "best": "from its parent's best, step 4", "early": "from its parent's step 8", "talk-mid": "",
    }  # fmt: skip
    assert [row["damage"] for row in shell.json("runs", "list", "--where", "parent=talk-base")] == [[], [], []]


def test_a_tree_as_json(family: Path, shell: Shell) -> None:
    alone, base = shell.json("runs", "tree")
    listed = {run["id"]: run for run in shell.json("runs", "list")}
    assert listed["talk-base"].items() <= base.items()
    assert base.keys() - listed["talk-base"].keys() == {"steps", "grid", "best", "begins", "note", "children"}
    assert (alone["best"], alone["note"], alone["children"], alone["steps"]) == (None, "", [], STEPS)
    [mid] = base["children"]
    assert mid["best"] == {"metric": "val_bpb", "value": 2.0625, "step": 5}
    assert [child["id"] for child in mid["children"]] == ["talk-sft", "talk-two"]
    [only] = shell.json("runs", "tree", "talk-two")
    assert [run["id"] for run in only["children"][0]["children"]] == ["talk-two"]


def test_the_best_of_rl_is_the_highest_reward(family: Path, shell: Shell) -> None:
    """A reward may fall while bits per byte do too."""
    sft = ExperimentFolder(family, "talk-sft")
    rewards = {4: 0.25, 8: 0.75, 12: 0.5}
    validated(untrained_child(sft, "talk-rl", "rl"), val_reward=rewards, val_bpb={4: 2.5, 12: 2.25})
    [rl] = shell("runs", "tree", "talk-rl").out.splitlines()[-1:]
    assert rl == "        `-- talk-rl  rl    backward  d1  val_reward 0.7500 at step 8  finished"
    listed = lines(shell("runs", "list", "--sort", "-val_reward").out)
    assert listed[0].split()[-1] == "reward"
    assert listed[2].split()[-1] == "0.5000"


def test_a_missing_parent_is_told(family: Path, shell: Shell) -> None:
    link_anew(family, "talk-mid", "gone")
    answer = shell("runs", "tree", "talk-two")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "talk-mid      mid  backward  d1  val_bpb 2.0625 at step 5  finished",
        "  its parent gone is not here",
        "`-- talk-two  sft  backward  d1                            waiting",
    ]
    _, _, root = shell.json("runs", "tree")
    assert (root["id"], root["note"], len(root["children"])) == ("talk-mid", "its parent gone is not here", 2)


def test_a_circle_of_links_is_told(family: Path, shell: Shell) -> None:
    link_anew(family, "talk-mid", "talk-sft")
    told = shell("runs", "tree").out.splitlines()
    assert "  damaged links go in a circle: talk-mid > talk-sft > talk-mid" in told
    shown = [line.split("-- ")[-1].split()[0] for line in told if "circle" not in line]
    assert sorted(shown) == ["alone", "talk-base", "talk-mid", "talk-sft", "talk-two"]
    link_anew(family, "talk-mid", "talk-mid")
    assert "  damaged links go in a circle: talk-mid > talk-mid" in shell("runs", "tree").out
    assert shell.json("runs", "show", "talk-mid")["children"] == ["talk-mid", "talk-sft", "talk-two"]


@pytest.mark.parametrize("command", ["tree", "list"])
def test_a_run_with_a_damaged_link_hides_no_other(command: str, family: Path, shell: Shell) -> None:
    (family / "talk-mid" / LINK).write_text("[]")
    answer = shell("runs", command)
    assert answer.code == 0
    assert answer.err.startswith(
        "talk-mid is left out: runs/talk-mid/parent_link.json: not the link of a run to its parent"
    )
    assert answer.err.count("\n") == 1
    assert {"talk-base", "talk-sft", "talk-two", "alone"} <= set(answer.out.split())
    check_mistake(shell("runs", "tree", "talk-mid"), "talk-mid is left out: ")
    check_mistake(shell("runs", "show", "talk-mid"), "parent_link.json: not the link of a run to its parent")


def test_a_link_that_was_edited_is_named_with_what_the_settings_say(family: Path, shell: Shell) -> None:
    link_anew(family, "talk-sft", "talk-base")
    told = "parent_link.json: edited by hand (parent is talk-base, and talk-mid in config.json)"
    for command in (["list"], ["tree"], ["show", "talk-sft"]):
        answer = shell("runs", *command)
        assert answer.code == 0
        assert answer.err.startswith(f"talk-sft is damaged: {told}: put the files back"), command


def test_a_storage_that_is_a_file_is_refused(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "file").write_text("mine")
    told = "is a file: give the folder that holds the runs"
    check_mistake(shell("runs", "list", "--storage", str(tmp_path / "file")), told)


def test_a_run_of_other_code_is_shown_with_what_changed(family: Path, shell: Shell) -> None:
    folder = ExperimentFolder(family, "alone")
    assert shell.json("runs", "show", "alone")["other_code"] == ""
    modules = modules_of(folder.config().experiment) | {"bwlm.model.gpt": "another"}
    identity = folder.config().identity | {"code": "b" * 16}
    version = {"identity_version": IDENTITY_VERSION, "fingerprint": fingerprint(identity)}
    rewrite_config(folder, modules=modules, identity=identity, **version)
    assert "today's code  bwlm.model.gpt changed" in shell("runs", "show", "alone").out


def test_the_many_leaves_of_a_grid_are_one_line(prepared: Prepared, family: Path, shell: Shell) -> None:
    cells = [
        validated(in_grid(make_run(prepared, family, f"bars_s{seed}", seed=seed), "bars"), val_bpb={12: 3.0})
        for seed in range(5)
    ]
    cells[4].write_status(Status("failed", "loss nan", 3))
    mid = ExperimentFolder(family, "talk-mid")
    sweep = [untrained_child(mid, f"sweep_s{seed}", "sft", "sweep", seed=seed) for seed in range(4)]
    for name, runs in (("bars", cells), ("sweep", sweep)):
        write_cells(family, name, [run.id for run in runs])
    told = shell("runs", "tree").out.splitlines()
    assert told[1] == "5 base runs of grid bars, 4 finished, 1 failed; each: bwlm runs tree bars"
    assert told[4] == "    +-- 4 sft runs of grid sweep, all waiting; each: bwlm runs tree sweep"
    assert len(told) == 7
    assert sum(line.startswith("bars_s") for line in shell("runs", "tree", "bars").out.splitlines()) == 5
    assert shell("runs", "tree", "sweep").out.count("sweep_s") == 4
    assert len(shell.json("runs", "tree")) == 7  # a script gets all of them

    untrained_child(cells[0], "bars_s0-mid", "mid")
    told = shell("runs", "tree").out.splitlines()
    assert told[1].startswith("bars_s0 ")
    assert told[3] == "4 base runs of grid bars, 3 finished, 1 failed; each: bwlm runs tree bars"


def test_an_unknown_run_has_no_tree(family: Path, shell: Shell) -> None:
    check_mistake(shell("runs", "tree", "talk-bass"), "no such experiment or grid in")
    check_mistake(shell("runs", "tree", "../x"), "no such experiment or grid in")
    check_mistake(shell("runs", "tree", "x*"), "no experiment in")


def test_no_runs_have_an_empty_tree(shell: Shell) -> None:
    assert shell("runs", "tree").out == "0 experiments in runs\n"
    assert shell.json("runs", "tree") == []
    assert not shell.storage.exists()


# ---- show ----


def test_all_that_is_known_of_a_run(family: Path, shell: Shell) -> None:
    folder = ExperimentFolder(family, "talk-sft")
    write_checkpoint(folder.checkpoints, snapshot(STEPS), KeepPolicy())
    h5py.File(folder.path / "sft.h5", "w").close()
    os.truncate(folder.path / "sft.h5", 1500)
    (folder.path / "RESEARCH_REPORT.md").write_text("#")
    write_json(folder.path / "mlflow.json", {"run_id": "5f73"})
    (folder.evaluation("sft", "forward")).mkdir(parents=True)
    (folder.evaluation("sft", "forward") / "validation.json").write_text("{}")
    told = lines(shell("runs", "show", "talk-sft").out)
    assert told[:18] == [
        "talk-sft: finished, step 12 of 12",
        "  phase      sft",
        "  direction  backward",
        "  depth      1, 100,352 parameters",
        "  lr, seed   0.5, 0",
        "  tokens     6,144 in 12 steps",
        "  best       val_bpb 2.0000 at step 12",
        "",
        "family",
        "  parent    talk-mid (mid, its step_000012, weights abababababab)",
        "  chain     talk-base > talk-mid > talk-sft",
        "  children  none",
        "",
        "set otherwise than in talk-mid",
        "  lr                  1 -> 0.5",
        "  optim.init_lr_frac  1 -> 0.02",
        "",
        "figures (all of them: --json)",
    ]
    assert told[18:20] == ["  validation  2.0000 bits per byte (read forward 3.5000)", ""]
    kept = told[told.index("kept") + 1 :]
    size = sum(path.stat().st_size for path in folder.checkpoints.glob("*/*"))
    assert re.fullmatch(r"  folder +runs/talk-sft \([\d.]+ kB\)", kept[0])
    assert kept[1:] == [
        f"  checkpoints   step 12 ({size / 1000:.1f} kB)",
        "  research log  sft.h5 (1.5 kB)",
        "  report        RESEARCH_REPORT.md",
        "  evaluations   sft/forward/validation",
        "  besides       config.json, metrics.jsonl",
        "  MLflow run    5f73",
    ]
    made_from = " ".join(told[told.index("made from") : told.index("kept")])
    config = folder.config()
    for words in ("builtin:arithmetic x 1", config.fingerprint, config.identity["tokenizer"][:12], "python 3."):
        assert words in made_from


def test_all_that_is_known_of_a_run_as_json(family: Path, shell: Shell) -> None:
    known = shell.json("runs", "show", "talk-sft")
    [listed] = shell.json("runs", "list", "--where", "id=talk-sft")
    assert listed.items() <= known.items()
    folder = ExperimentFolder(family, "talk-sft")
    config = folder.config()
    assert known["link"] == {
        "parent": "talk-mid", "phase": "mid", "checkpoint": "step_000012", "step": 12, "sha256": "ab" * 32,
        "chain": ["talk-base", "talk-mid"], "best": False,
    }  # fmt: skip
    assert known["parent_is_here"] is True
    assert known["changed"] == {
        "lr": {"parent": 1.0, "own": 0.5},
        "optim.init_lr_frac": {"parent": 1.0, "own": 0.02},
    }
    assert known["data"] == {
        "mixture": MIXTURE,
        "skip_invalid": False,
        "digest": config.identity["data"],
        "folder": config.corpus,
    }
    assert (known["fingerprint"], known["steps"]) == (config.fingerprint, STEPS)
    assert (known["children"], known["skips"], known["holder"], known["mlflow_run"]) == ([], [], None, None)
    assert (known["checkpoints"], known["evaluations"]) == ([], [])
    assert {"bwlm", "torch", "python"} <= known["versions"].keys()
    base = shell.json("runs", "show", "talk-base")
    assert (base["link"], base["changed"], base["children"]) == (None, None, ["talk-mid"])
    assert base["data"]["source"] == config.experiment.data.source


def test_why_a_run_failed_who_holds_it_and_what_it_skips_is_shown(family: Path, shell: Shell) -> None:
    assert lines(shell("runs", "show", "alone").out)[0] == "alone: failed, step 3 of 12: loss nan at step 3"
    base = ExperimentFolder(family, "talk-base")
    child = untrained_child(base, "quick-sft", "sft")
    with child.lease():
        told = shell("runs", "show", "quick-sft").out
        assert shell.json("runs", "show", "quick-sft")["holder"]["pid"] == os.getpid()
    assert "quick-sft: running, step 0 of 12\n" in told
    assert re.search(rf"^  held by    .*:{os.getpid()}, since 2.* \(\d seconds ago\)$", told, re.MULTILINE)
    assert "  skips     mid\n" in told
    assert shell.json("runs", "show", "quick-sft")["skips"] == ["mid"]
    shutil.rmtree(base.path)
    told = shell("runs", "show", "quick-sft").out
    assert "  parent    talk-base (base, its step_000012, weights abababababab): not here, or damaged\n" in told
    assert "set otherwise" not in told


def test_a_narrow_terminal_wraps_beside_the_names(family: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 60)
    told = plain(shell("runs", "show", "talk-mid").out)
    versions = next(number for number, line in enumerate(told) if line.startswith("  versions"))
    assert told[versions + 1].startswith("               ")
    kept = told[told.index("kept") + 1]
    assert "runs/talk-mid" in kept  # in one piece, to be copied
    assert max(len(line) for line in told if line != kept) <= 60


def test_an_unknown_run_is_told_with_the_nearest(family: Path, shell: Shell) -> None:
    for command in (["show", "talk-stf"], ["delete", "talk-stf", "--yes"]):
        check_mistake(shell("runs", *command), "talk-stf: no such experiment in")
        check_mistake(shell("runs", *command), "(did you mean 'talk-sft'?); see: bwlm runs list")
    for command in (["show", "../runs"], ["delete", "..", "--yes"], ["delete", "cache", "--yes"]):
        check_mistake(shell("runs", *command), "experiment id: ")


# ---- list ----


def test_a_list_has_phases_and_parents(family: Path, shell: Shell) -> None:
    told = lines(shell("runs", "list").out)
    assert told[0].split()[:5] == ["id", "parent", "phase", "state", "step"]
    assert [line.split()[:5] for line in told[2:4]] == [
        ["alone", "base", "failed", "3"],
        ["talk-base", "base", "finished", "12", "2.5000"],
    ]
    assert told[5].split()[:5] == ["talk-sft", "talk-mid", "sft", "finished", "12"]
    assert told[-1] == "5 experiments in runs"
    bases = shell("runs", "list", "--where", "phase=base").out
    assert "parent" not in bases
    assert "2 of 5 experiments in runs" in bases


def test_a_list_is_filtered_and_sorted(family: Path, shell: Shell) -> None:
    def ids(*options: str) -> list[str]:
        return [run["id"] for run in shell.json("runs", "list", *options)]

    assert ids("--where", "val_bpb<2.4", "--where", "phase!=base") == ["talk-mid", "talk-sft"]
    assert ids("--where", "parent=talk-mid", "--sort", "-seed") == ["talk-two", "talk-sft"]
    assert ids("--sort", "-val_bpb") == ["talk-base", "talk-mid", "talk-sft", "alone", "talk-two"]
    assert ids("--sort", "val_bpb", "--where", "id=talk-*") == ["talk-sft", "talk-mid", "talk-base", "talk-two"]
    assert ids("--sort", "bpb", "--where", "bpb<2.9") == ids("--sort", "val_bpb", "--where", "val_bpb<2.9")
    told = shell("runs", "list", "--sort", "val_bpb").out
    assert re.findall(r"^(\S+) ", told, re.MULTILINE)[1:-1] == [
        "talk-sft", "talk-mid", "talk-base", "alone", "talk-two"
    ]  # fmt: skip
    check_mistake(shell("runs", "list", "--where", "val_bbp<2"), "unknown field (did you mean 'val_bpb'?)")
    check_mistake(shell("runs", "list", "--sort", "stp"), "--sort stp: unknown field (did you mean 'step'?)")


def test_a_listed_run_has_the_fields_that_scripts_rely_on(family: Path, shell: Shell) -> None:
    *_, sft, _ = shell.json("runs", "list")
    assert sft == {
        "id": "talk-sft", "phase": "sft", "direction": "backward", "depth": 1, "lr": 0.5, "seed": 0,
        "parent": "talk-mid", "state": "finished", "reason": "", "step": 12,
        "metrics": {"val_bpb": 2.0, "val_bpb_forward": 3.5}, "damage": [],
    }  # fmt: skip


def test_a_list_in_a_narrow_terminal(family: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 50)
    told = plain(shell("runs", "list").out)
    rows = {line.split()[0]: line.split()[1:] for line in told if line}
    assert rows["talk-sft"] == ["sft", "finished", "12", "2.0000", "3.5000"], "a line a run, as long as they fit"
    assert rows["alone"][:2] == ["base", "failed"]
    assert max(map(len, told[:-1])) <= 50
    narrow(monkeypatch, 40)
    told = plain(shell("runs", "list").out)
    at = told.index("talk-sft, child of talk-mid")
    assert told[at + 1].split() == ["sft", "finished", "12", "2.0000", "3.5000"]


# ---- delete ----


def test_a_run_is_deleted_and_what_stays_is_said(family: Path, shell: Shell) -> None:
    folder = in_grid(ExperimentFolder(family, "talk-sft"), "bars")
    write_json(folder.path / "mlflow.json", {"run_id": "5f73"})
    answer = shell("runs", "delete", "talk-sft", "--yes")
    assert answer.code == 0
    first, *besides = answer.out.splitlines()
    assert re.fullmatch(r"talk-sft is deleted \(finished at step 12, [\d.]+ kB\)", first)
    assert besides == ["its MLflow run 5f73 stays", "grid bars trains it again when it is launched"]
    assert sorted(path.name for path in family.iterdir() if path.name != "cache") == [
        "alone", "talk-base", "talk-mid", "talk-two"
    ]  # fmt: skip


def test_a_deletion_is_refused_in_a_line(family: Path, shell: Shell) -> None:
    check_mistake(shell("runs", "delete", "talk-mid", "--yes"), "talk-mid: talk-sft, talk-two begin from it: delete")
    check_mistake(shell("runs", "delete", "talk-sft"), "cannot ask for a confirmation, as this is no terminal")
    with ExperimentFolder(family, "talk-two").lease():
        check_mistake(shell("runs", "delete", "talk-two", "--yes"), f":{os.getpid()} trains it since")
    assert len(shell.json("runs", "list")) == 5


def test_a_damaged_run_can_be_deleted(family: Path, shell: Shell) -> None:
    for name in ("config.json", "status.json", "mlflow.json", LINK):
        (family / "alone" / name).write_text("{")
    assert re.fullmatch(r"alone is deleted \([\d.]+ k?B\)\n", shell("runs", "delete", "alone", "--yes").out)
    assert not (family / "alone").exists()


def test_several_runs_are_deleted_by_a_glob_children_first(family: Path, shell: Shell) -> None:
    check_mistake(shell("runs", "delete", "talk-base", "alone", "--yes"), "talk-base: talk-mid begins from it")
    assert len(shell.json("runs", "list")) == 5, "all of them or none"
    answer = shell("runs", "delete", "talk-*", "--yes")
    assert answer.code == 0
    assert [line.split()[0] for line in answer.out.splitlines() if " is deleted (" in line] == [
        "talk-sft", "talk-two", "talk-mid", "talk-base"
    ]  # fmt: skip
    assert [run["id"] for run in shell.json("runs", "list")] == ["alone"]


def test_a_grid_is_deleted_by_its_name(family: Path, shell: Shell) -> None:
    """The cells of a grid that exist are meant; a name that stands for nothing is told as elsewhere."""
    write_cells(family, "bars", ["alone", "talk-two", "never_begun"])
    assert shell("runs", "delete", "bars", "--yes").code == 0
    assert [run["id"] for run in shell.json("runs", "list")] == ["talk-base", "talk-mid", "talk-sft"]
    check_mistake(shell("runs", "delete", "bras*", "--yes"), "bras*: no experiment in runs matches")


def test_a_deletion_that_was_killed_is_finished(family: Path, shell: Shell) -> None:
    (family / "alone").rename(family / ".alone.0123abcd.deleted")
    assert "alone" not in shell("runs", "list").out
    assert shell("runs", "delete", "alone").out == "alone is deleted: what an earlier deletion had left of it is gone\n"
    assert not list(family.glob(".*"))


@pytest.mark.parametrize(("answer", "code"), [("yes\n", 0), ("\n", 1), ("\x04", 1)])
def test_a_person_is_asked(answer: str, code: int, family: Path) -> None:
    ours, theirs = pty.openpty()
    command = [BWLM, "runs", "delete", "alone", "--storage", str(family)]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(ours, 1024)
        os.write(ours, answer.encode())
        assert process.wait(60) == code
    os.close(ours)
    assert f"Delete {family / 'alone'} (failed at step 3, " in asked.decode().replace("\r\n", "")
    assert (family / "alone").exists() == (code != 0)


# ---- speed ----


def test_no_heavy_library_is_waited_for(family: Path) -> None:
    script = """
import contextlib, io, json, sys
from bwlm.cli import main
for command in ("list", "tree", "show talk-sft", "delete talk-two --yes"):
    sys.argv = ["bwlm", "runs", *command.split(), "--storage", sys.argv[-1]]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            assert end.code == 0
print(json.dumps([name for name in ("torch", "pandas", "scipy", "ray", "mlflow") if name in sys.modules]))
"""
    told = subprocess.run([sys.executable, "-c", script, str(family)], capture_output=True, text=True, check=True)
    found: Any = json.loads(told.stdout)
    assert found == []
