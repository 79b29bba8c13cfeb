"""The command line: what its cheap commands print, and that a mistake is one line, exit code 2 and nothing made."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import jsonschema
import pytest
import typer
import yaml
from typer.models import OptionInfo

from bwlm import cli
from bwlm.cli.terminal import print_json
from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.format import short_number
from bwlm.model.compute import Compute
from bwlm.plan.load import plan_experiment
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import identity
from bwlm.record.grids import write_cells
from bwlm.record.journal import Journal
from bwlm.record.run_config import RunConfig
from bwlm.settings_file import parse_setting, parse_yaml
from bwlm.stats.power import detectable_gap
from tests.shell import Answer, Shell, check_mistake

BWLM = Path(sys.executable).parent / "bwlm"
GRIDS = sorted((Path(__file__).parents[1] / "grids").glob("*.yaml"))
CHILDREN = {"sft_lr"}
"""Grids that begin from a run."""

GOOD = """\
name: bars
axes: {direction: [forward, backward], depth: [1, 2], lr: [0.5], seed: [0]}
model: {sequence_length: 64}
tokenizer: {vocab_size: 300}
budget: {steps: 5, batch_tokens: 256}
"""


def make_run(storage: Path, name: str, state: Status | None = None, steps: int = 0) -> ExperimentFolder:
    folder = ExperimentFolder(storage, name)
    direction, depth = name.split("_")[1:3]
    settings = {key: value for key, value in parse_yaml(GOOD, "").content.items() if key not in ("name", "axes")}
    cell = {"direction": direction, "depth": int(depth.removeprefix("d")), "lr": 0.5, "seed": 0}
    experiment = Experiment.model_validate(settings | cell)
    fields = identity(experiment, data="d", tokenizer="t", precision="float32", steps=5)
    folder.create(
        RunConfig(
            name, experiment, fields, 5, Compute("float32", "sdpa", 0, False, 8, 1), "/corpus", "/tokenizer", "bars"
        )
    )
    journal = Journal(folder.path)
    for step in range(1, steps + 1):
        journal.append(step, {"train_loss": 3.0, "tokens_per_second": 100.0})
    journal.close()
    if state is not None:
        folder.write_status(state)
    return folder


# ---- help ----


def commands(app: typer.Typer, *above: str) -> Iterator[tuple[str, ...]]:
    for command in app.registered_commands:
        assert command.callback is not None
        yield (*above, command.name or command.callback.__name__)
    for group in app.registered_groups:
        assert group.name is not None
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, *above, group.name)


@pytest.mark.parametrize("command", commands(cli.app), ids=" ".join)
def test_every_command_has_help_with_an_example(command: tuple[str, ...], shell: Shell) -> None:
    answer = shell(*command, "--help")
    assert answer.code == 0
    assert f"Example: bwlm {' '.join(command)}" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", answer.out).split())
    assert "<bool>" not in answer.out, "a flag takes no value"


@pytest.mark.parametrize("command", [(), ("grid",), ("runs",)])
def test_no_command_shows_the_commands(command: tuple[str, ...], shell: Shell) -> None:
    answer = shell(*command)
    assert "Commands" in answer.out + answer.err
    assert answer.code in (0, 2)


def test_windows_is_told_in_a_line() -> None:
    """Not by the ImportError of a module that nobody knows."""
    code = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; from bwlm.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    told = "bwlm: runs on Linux, and this is win32: on Windows use WSL\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told)


def test_the_version_is_that_of_the_package(shell: Shell) -> None:
    assert shell("--version") == (0, f"bwlm {version('bwlm')}\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --dpeth 4", "--dpeth: no such option (did you mean --depth?); other settings are changed by --set"),
        ("train --learning-rate 0.01", "--learning-rate: no such option (did you mean --lr?); other settings"),
        ("train --weight-decay=0.1", "--weight-decay: no such option (did you mean --set optim.weight_decay=VALUE?)"),
        ("train --budget.steps 4", "--budget.steps: no such option (did you mean --set budget.steps=VALUE?)"),
        ("train --batch-size 4", "(did you mean --set compute.device_batch_size=VALUE?)"),
        ("grid run g.yaml --lr 4", "--lr: no such option (did you mean --set lr=VALUE?)"),
        (
            "train --xyzzy",
            "--xyzzy: no such option: settings are changed by --set FIELD=VALUE, and docs/grids.md lists",
        ),
        ("runs list --stroage x", "No such option: --stroage (Possible options: --storage)"),
    ],
)
def test_an_unknown_option_names_the_nearest_setting(words: str, told: str, shell: Shell) -> None:
    check_mistake(shell(*words.split()), told)


# ---- plan and status ----


def test_a_plan_as_json(shell: Shell) -> None:
    document = shell.json("grid", "plan", shell.file(GOOD))
    assert document.keys() == {"grid", "cells", "detectable", "time", "warnings"}
    assert document["grid"] == "bars"
    assert [cell["id"] for cell in document["cells"]] == [
        f"bars_{direction}_d{depth}_lr0.5_s0" for direction in ("forward", "backward") for depth in (1, 2)
    ]
    # depth 1: 49152 in the block, 300 x 64 twice; FLOPs a token 6 x (49152 + 19200) + 12 x 64 x 64
    first = document["cells"][0]
    assert {name: first[name] for name in ("params", "tokens", "flops", "state", "reason")} == {
        "params": 87552, "tokens": 1280, "flops": 1280 * 459264, "state": "waiting", "reason": "",
    }  # fmt: skip
    # a frame of 200 kB, 1024 states of 64 twice, 5 steps of little else
    assert 400_000 < first["log_bytes"] < 3_000_000
    assert not shell.storage.exists()


def test_a_plan_warns_of_what_cannot_be_here_and_makes_nothing(shell: Shell) -> None:
    grid = shell.file(GOOD)
    (shell.folder / "file").touch()
    asked = ("--set", "resources.gpus_per_worker=1", "--set", "model.head_dim=48", "--storage", "file/runs")
    answer = shell("grid", "plan", grid, *asked)
    assert answer.code == 0
    warned = [line for line in answer.out.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warned] == ["width", "GPUs", "storage"]
    listed = [f"warning: {line}" for line in shell.json("grid", "plan", grid, *asked)["warnings"]]
    assert [line.replace(f"{shell.folder}/", "") for line in listed] == warned
    assert shell.json("grid", "plan", grid)["warnings"] == []
    check_mistake(shell("grid", "run", grid, *asked), "storage: ")


def test_a_launch_warns_before_it_starts(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("here it starts")

    monkeypatch.setattr("bwlm.grid.launch.run_plan", refuse)
    for command in (["grid", "run", shell.file(GOOD)], ["train", "--direction", "forward", "--depth", "1"]):
        answer = shell(*command, "--set", "model.head_dim=48")
        warning, end = answer.err.splitlines()
        assert warning.startswith("warning: width: model.head_dim=48 does not divide")
        assert end == "bwlm: here it starts"


def test_plan_and_status_show_what_is_done(shell: Shell) -> None:
    grid = shell.file(GOOD)
    make_run(shell.storage, "bars_forward_d1_lr0.5_s0", Status("finished", "", 5, {"val_bpb": 1.5}))
    make_run(shell.storage, "bars_forward_d2_lr0.5_s0", Status("failed", "loss nan at step 3", 2))
    make_run(shell.storage, "bars_backward_d1_lr0.5_s0", steps=3)
    for command in ("plan", "status"):
        cells = shell.json("grid", command, grid)["cells"]
        assert [(c["state"], c["reason"]) for c in cells] == [
            ("finished", ""), ("failed", "loss nan at step 3"), ("stopped", ""), ("waiting", "")
        ]  # fmt: skip
        assert cells[0]["metrics"] == {"val_bpb": 1.5}
        assert cells[2]["step"] == 3
    edited = shell.json("grid", "plan", grid, "--set", "budget.steps=6")["cells"]
    assert [c["reason"] for c in edited] == ["exists with other settings (steps: 5 -> 6)"] * 3 + [""]
    answer = shell("grid", "plan", grid)
    assert "loss nan at step 3" in answer.out
    assert answer.err == ""
    status = shell("grid", "status", grid)
    assert "1 of 4 cells finished" in status.out


def test_status_shows_cells_that_have_not_begun_and_takes_the_name_of_a_grid(shell: Shell) -> None:
    grid = shell.file(GOOD)
    make_run(shell.storage, "bars_forward_d1_lr0.5_s0", Status("finished", "", 5, {"val_bpb": 1.5}))
    told = shell("grid", "status", grid).out
    ids = [
        "bars_forward_d1_lr0.5_s0",
        *(f"bars_{cell}_lr0.5_s0" for cell in ("forward_d2", "backward_d1", "backward_d2")),
    ]
    states = ["finished", "waiting", "waiting", "waiting"]
    assert [tuple(line.split()[:2]) for line in told.splitlines()[3:7]] == list(zip(ids, states, strict=True))
    check_mistake(shell("grid", "status", "bars"), "bars: no such file, and no grid of this name in runs")
    write_cells(shell.storage, "bars", ids)
    (shell.storage / "grids" / "bars" / "grid.yaml").write_text(GOOD)
    assert shell("grid", "status", "bars").out == told
    check_mistake(shell("grid", "status", "bras"), "(did you mean 'bars'?)")
    check_mistake(shell("grid", "status", "gg.yaml"), "(did you mean 'g.yaml'?)")


def test_a_plan_tells_a_changed_setting_first_and_the_text_that_is_read(shell: Shell) -> None:
    make_run(shell.storage, "bars_forward_d1_lr0.5_s0", Status("finished", "", 5))
    (shell.folder / "notes").mkdir()
    for name in "ab":
        (shell.folder / "notes" / f"{name}.txt").write_text("a note")
    grid = shell.file(GOOD + "data: {source: notes}\n")
    assert "\ntext: notes, 2 files, 12 B\n" in shell("grid", "plan", grid).out
    missing = shell("grid", "plan", grid, "--set", "data.source=nots")
    assert missing.code == 0
    assert f"\nwarning: data.source: nots (from the working folder, {shell.folder}) does not exist: " in missing.out
    assert "\ntext: builtin:pydocs\n" in shell("grid", "plan", grid, "--set", "data.source=builtin:pydocs").out
    changed = shell("grid", "plan", grid, "--set", "budget.steps=6").out
    first = next(line for line in changed.splitlines() if line.startswith("bars_forward_d1"))
    assert first.endswith("  other settings")
    other = (
        "bars_forward_d1_lr0.5_s0: its run read builtin:pydocs, and the grid names notes: refused unless its content is"
    )
    told = shell("grid", "plan", grid).out
    assert other in told
    assert next(line for line in told.splitlines() if line.startswith("bars_forward_d1")).endswith(
        "  finished, on other text"
    )
    read = [cell["other_text"] for cell in shell.json("grid", "plan", grid)["cells"]]
    assert read == ["builtin:pydocs", "", "", ""], "the others have not begun"
    same = shell("grid", "plan", grid, "--set", "data.source=builtin:pydocs").out
    assert "its run read" not in same
    assert "on other text" not in same


def test_an_unknown_command_is_told_with_those_that_there_are(shell: Shell) -> None:
    check_mistake(
        shell("runs", "rename", "a", "b"), "runs rename: no such command: give one of list, tree, show, delete"
    )
    check_mistake(shell("analyse"), "bwlm: analyse: no such command: give one of train, ")


def test_the_faults_of_a_text_are_told_before_ray_starts(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bwlm.cluster.session.open_cluster", None)
    (shell.folder / "notes").mkdir()
    for name in "ab":
        (shell.folder / "notes" / f"{name}.txt").write_text(f"note {name}")
    answer = shell("grid", "run", shell.file(GOOD + "data: {source: notes}\n"))
    assert answer.code == 2
    assert "the text to train on (1 document, 6 B) yields only " in answer.err
    assert not (shell.storage / "grids").exists()


def test_a_run_whose_text_is_being_prepared_is_listed_as_starting(shell: Shell) -> None:
    with ExperimentFolder(shell.storage, "early").only_launch():
        assert "\nstarting, text not ready yet: early\n" in shell("runs", "list").out
        for command in ("show", "delete"):
            answer = shell("runs", command, "early")
            assert answer.code == 2
            assert "starts it since " in answer.err
    assert "starting" not in shell("runs", "list").out


def test_a_storage_that_does_not_exist_is_named(shell: Shell) -> None:
    told = shell("runs", "list").out
    assert told == "0 experiments in runs, which does not exist: --storage or BWLM_STORAGE names another folder\n"
    assert shell.json("runs", "list") == []


def test_a_plan_counts_a_failed_cell_as_to_do_and_one_that_asha_stopped_as_done(shell: Shell) -> None:
    grid = shell.file(GOOD)
    make_run(shell.storage, "bars_forward_d1_lr0.5_s0", Status("finished", "", 5))
    make_run(shell.storage, "bars_forward_d2_lr0.5_s0", Status("failed", "loss nan at step 3", 2))
    make_run(shell.storage, "bars_backward_d1_lr0.5_s0", Status("stopped", "by the scheduler", 3))
    cells = shell.json("grid", "plan", grid)["cells"]
    assert [cell["done"] for cell in cells] == [True, False, True, False]
    left = short_number(cells[1]["flops"] + cells[3]["flops"])
    assert f"FLOPs in all, {left} to do; " in shell("grid", "plan", grid).out


def test_a_plan_for_people(shell: Shell) -> None:
    answer = shell("grid", "plan", shell.file(GOOD), "--set", "axes.seed=[0,1]", "--storage", "elsewhere")
    assert answer.code == 0
    assert "bars: 8 cells" in answer.out
    assert "87.6k" in answer.out
    assert "storage elsewhere\n" in answer.out


def test_a_plan_says_what_gap_its_seeds_could_see(shell: Shell) -> None:
    grid = shell.file(GOOD.replace("seed: [0]", "seed: [0, 1, 2, 3, 4]"))
    known = shell.json("grid", "plan", grid, "--seed-noise", "0.006")["detectable"]
    told = shell("grid", "plan", grid, "--seed-noise", "0.006").out.splitlines()[-1]
    # two pairs, so each is tested at 0.025; tests/stats/test_power.py checks the figure behind it
    gap = detectable_gap(5, power=0.8, family=2)
    assert gap is not None
    assert known == {
        "power": 0.8, "seed_noise": 0.006, "family": 2,
        "pairs": [
            {
                "size": size, "a": "forward", "b": "backward", "seeds": 5, "fewest_seeds": 5, "choosing_seeds": None,
                "gap_sd": gap, "gap_nats": gap * 0.006,
            }
            for size in ("d1", "d2")
        ],
    }  # fmt: skip
    words = f"{gap * 0.006:.4f} nats per token for 2 pairs with 5 seeds, at a seed noise of 0.006"
    assert told == f"smallest gap seen with 80 % power (Holm over 2): {words}"
    in_sd = f"{gap:.2f} standard deviations of the paired seed difference for 2 pairs with 5 seeds"
    assert shell("grid", "plan", grid).out.splitlines()[-1].endswith(f": {in_sd}")
    assert shell.json("grid", "plan", grid)["detectable"]["pairs"][0]["gap_nats"] is None
    few = shell("grid", "plan", shell.file(GOOD)).out.splitlines()[-1]
    assert few == "no verdict for 2 pairs with 1 seed (it needs 3)"
    for wrong in ("0", "-1", "nan", "inf"):
        check_mistake(shell("grid", "plan", grid, f"--seed-noise={wrong}"), "--seed-noise: ")


def test_storage_comes_from_option_environment_or_file(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = shell.file(GOOD + "launch: {storage: from-file}\n")
    assert "storage from-file\n" in shell("grid", "plan", grid).out
    assert "storage option\n" in shell("grid", "plan", grid, "--storage", "option").out
    monkeypatch.setenv("BWLM_STORAGE", str(shell.folder / "env"))
    assert "storage env\n" in shell("grid", "plan", shell.file(GOOD)).out


@pytest.mark.parametrize("path", [path for path in GRIDS if path.stem not in CHILDREN], ids=lambda path: path.name)
def test_every_shipped_grid_plans(path: Path, shell: Shell) -> None:
    document = shell.json("grid", "plan", str(path))
    assert document["grid"] == path.stem
    assert all(cell["state"] == "waiting" and cell["flops"] > 0 for cell in document["cells"])


def test_the_schema_knows_the_shipped_grids(shell: Shell) -> None:
    answer = shell("grid", "schema")
    schema = json.loads(answer.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in GRIDS:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "g", "axes": {}, "modle": {}}, schema)


# ---- runs ----


def test_a_run_that_cannot_be_read_hides_no_other(shell: Shell) -> None:
    make_run(shell.storage, "bars_forward_d1")
    damaged = make_run(shell.storage, "bars_backward_d1").path / "config.json"
    damaged.write_text("{")
    answer = shell("runs", "list", "--json")
    assert [run["id"] for run in json.loads(answer.out)] == ["bars_forward_d1"]
    assert answer.err.startswith(f"bars_backward_d1 is left out: {damaged.relative_to(shell.folder)}: not valid JSON")


def test_runs_as_json(shell: Shell) -> None:
    assert shell.json("runs", "list") == []
    assert not shell.storage.exists()
    metrics = {"val_bpb": 1.5, "val_bpb_forward": 1.4, "val_bpb_backward": 1.6, "tokens_per_second": 100.0}
    make_run(shell.storage, "bars_backward_d2", Status("finished", "", 5, metrics))
    make_run(shell.storage, "bars_forward_d1", steps=3)
    finished, stopped = shell.json("runs", "list")
    expected = {
        "id": "bars_backward_d2", "phase": "base", "direction": "backward", "depth": 2, "lr": 0.5, "seed": 0,
        "parent": None, "state": "finished", "step": 5, "metrics": metrics,
    }  # fmt: skip
    assert expected.items() <= finished.items()
    assert (stopped["id"], stopped["state"], stopped["step"]) == ("bars_forward_d1", "stopped", 3)


def test_a_running_cells_step_grows(shell: Shell) -> None:
    folder = make_run(shell.storage, "bars_forward_d1", steps=1)
    with folder.lease():
        for step in (2, 3):
            journal = Journal(folder.path, step - 1)
            journal.append(step, {"train_loss": 1.0})
            journal.close()
            [run] = shell.json("runs", "list")
            assert (run["state"], run["step"]) == ("running", step)


def test_runs_for_people(shell: Shell) -> None:
    make_run(shell.storage, "bars_forward_d1", Status("finished", "", 5, {"val_bpb": 1.25}))
    answer = shell("runs", "list")
    assert "bars_forward_d1" in answer.out
    assert "1.2500" in answer.out
    assert "1 experiment in runs" in answer.out


# ---- mistakes ----

_BILLIONS = [f"--set=axes.{name}={[*range(1, 1500)]}" for name in ("seed", "evaluation.every", "checkpoint.keep")]
_AGAIN = "also: [{direction: [forward], depth: [1], lr: [0.5]}]\n"

MISTAKES = {
    "a field misspelt at the top": (GOOD.replace("model:", "modle:"), [], "g.yaml:3: modle: unknown field (did you"),
    "a field misspelt in a section": (GOOD.replace("steps", "stepz"), [], "g.yaml:5: budget.stepz: unknown field (did"),
    "an axis misspelt": (GOOD.replace("depth", "dept"), [], "g.yaml:2: axes.dept: "),
    "a setting misspelt": (GOOD, ["--set", "model.hed_dim=32"], "--set model.hed_dim: unknown field (did"),
    "a duplicate key": (GOOD + "name: bars\n", [], "g.yaml:6: name: appears twice (first on line 1)"),
    "a learning rate that is a word": (GOOD.replace("[0.5]", "[nan]"), [], "g.yaml:2: lr: "),
    "a learning rate that is no number": (GOOD.replace("[0.5]", "[.nan]"), [], "g.yaml:2: lr: "),
    "a depth that is a truth": (GOOD.replace("[1, 2]", "[true]"), [], "g.yaml:2: depth: "),
    "an unknown direction": (GOOD.replace("backward", "bakward"), [], "(did you mean 'backward'?)"),
    "an axis without values": (GOOD.replace("seed: [0]", "seed: []"), [], "g.yaml:2: axes.seed: needs a list"),
    "a value twice": (GOOD.replace("[1, 2]", "[2, 2]"), [], "g.yaml:2: axes.depth: 2 appears twice"),
    "more cells than the cap": (GOOD, ["--set", "launch.max_cells=3"], "4 cells, more than launch.max_cells=3"),
    "billions of cells": (GOOD, _BILLIONS, "more than launch.max_cells=1000"),
    "a name that climbs": (GOOD.replace("name: bars", "name: ../x"), [], "g.yaml:1: name: '../x' is not a valid id"),
    "a batch of broken rows": (GOOD.replace("256", "100"), [], "g.yaml:5: budget.batch_tokens: 100 is not a multiple"),
    "a batch that workers cannot share": (GOOD, ["--set", "resources.workers=3"], "take a multiple of 192"),
    "two horizons": (GOOD.replace("steps: 5", "steps: 5, tokens: 9"), [], "g.yaml:5: budget: needs exactly one of"),
    "heads that do not divide": (GOOD, ["--set", "model.kv_heads=3"], "heads 1 is not a multiple of kv_heads 3"),
    "fixed and an axis": (GOOD + "seed: 3\n", [], "g.yaml:6: seed: a fixed value here and an axis in axes: keep one"),
    "a cell asked for twice": (GOOD + _AGAIN, [], "also.0: cell bars_forward_d1_lr0.5_s0 appears twice"),
    "a setting without a value": (GOOD, ["--set", "seed"], "--set seed: write it as field=value"),
    "bad syntax": (GOOD + "x: [1\n", [], "g.yaml:"),
    "no text": ("", [], "g.yaml: name: missing: add it"),
    "an address": (GOOD, ["--storage", "ftp://host/x"], "storage: 'ftp://host/x' is neither a folder nor a bucket"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_made(mistake: str, command: str, shell: Shell) -> None:
    text, options, message = MISTAKES[mistake]
    check_mistake(shell("grid", command, shell.file(text), *options), message)
    assert [path.name for path in shell.folder.iterdir()] == ["g.yaml"]


def options_of(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Yields every option and argument of every command: its place, and typer's record of it."""
    for group in app.registered_groups:
        yield from options_of(group.typer_instance)
    for command in app.registered_commands:
        for name, kind in get_type_hints(command.callback, include_extras=True).items():
            yield f"{command.name or command.callback.__name__} {name}", kind


def test_every_option_that_is_an_integer_takes_it_in_any_form() -> None:
    integers = {
        place: next(option for option in kind.__metadata__ if isinstance(option, OptionInfo))
        for place, kind in options_of(cli.app)
        if get_origin(kind) is Annotated and int in (kind.__origin__, *get_args(kind.__origin__))
    }
    assert {place.split()[-1] for place in integers} == {
        *("depth", "seed", "rows", "resamples"),
        *("max_examples", "shots", "samples", "shown"),
        *("num_samples", "max_tokens", "top_k"),
        *("port", "slots", "waiting", "threads", "grace"),
    }
    for place, option in integers.items():
        assert option.parser is not None, place
        assert {option.parser(text) for text in ("2000", "2e3", "2_000", "2.0e3")} == {2000}, place
        for text in ("1.5", "many", "inf"):
            with pytest.raises(ValueError, match=rf"^must be a whole number, such as .* \(found {text}\)$"):
                option.parser(text)


def test_mistakes_never_wait_for_heavy_libraries(tmp_path: Path) -> None:
    """Not one of them needs Ray, MLflow or torch to be told."""
    script = """
import contextlib, io, json, sys
from bwlm.cli import main
for text, options in json.load(sys.stdin):
    open("g.yaml", "w").write(text)
    sys.argv = ["bwlm", "grid", "run", "g.yaml", *options]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main()
commands = ["analyze compare", "analyze gap", "analyze report", "analyze scaling", "eval", "export --format hf"]
for command in commands:
    sys.argv = ["bwlm", *command.split(), "nope", *(["there"] if "export" in command else [])]
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(SystemExit):
        main()
    assert "bwlm: nope: no such experiment" in told.getvalue(), told.getvalue()
heavy = ("ray", "mlflow", "torch", "pandas", "altair", "scipy")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    told = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([(text, options) for text, options, _ in MISTAKES.values()]),
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(told.stdout) == []


def test_files_that_cannot_be_read(shell: Shell) -> None:
    (shell.folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    check_mistake(shell("grid", "plan", "latin.yaml"), "latin.yaml: not UTF-8 text")
    check_mistake(shell("grid", "plan", "absent.yaml"), "absent.yaml: no such file")
    check_mistake(shell("grid", "plan", "."), ".: cannot be read (Is a directory)")


@pytest.mark.parametrize("storage", ["/proc/bwlm-runs", "g.yaml/runs"])
def test_a_storage_that_cannot_be_written_is_told_before_anything_runs(storage: str, shell: Shell) -> None:
    grid = shell.file(GOOD)
    check_mistake(shell("grid", "run", grid, "--storage", storage), "is not writable")
    check_mistake(shell("data", "prepare", "--storage", storage), "is not writable")
    assert [path.name for path in shell.folder.iterdir()] == ["g.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grid", "pln"], "pln"),
        (["grid", "plan"], "GRID.yaml"),
        (["grid", "plan", "g.yaml", "--sett", "a=1"], "--sett"),
        (["nonsense"], "nonsense"),
        (["runs", "list", "extra"], "extra"),
        (["data", "inspect", "--rows", "0"], "rows"),
        (["data", "inspect", "--rows", "many"], "'--rows': must be a whole number, such as 2000, 2_000 or 2e3"),
        (["data", "inspect", "--rows", "2e4"], "'--rows': must be at most 10000 (found 2e4)"),
        (["data", "inspect", "--direction", "bakward"], "did you mean 'backward'?"),
        (["data", "inspect", "--json"], "--direction"),
        (["data", "prepare", "--set", "data.sorce=x"], "did you mean 'source'?"),
        (["tokenizer", "show", "--set", "tokenizer.vocab_size=5"], "--set tokenizer.vocab_size: "),
        (["train", "--depth", "1"], "--direction"),
        (["train", "--direction", "bakward", "--depth", "1"], "(did you mean 'backward'?)"),
        (["train", "--direction", "backward", "--depth", "0"], "--depth: "),
        (["train", "--direction", "backward", "--depth", "many"], "--depth"),
        (["train", "--direction", "backward", "--depth", "1", "--lr", "-1"], "--lr: "),
        (["train", "--direction", "backward", "--depth", "1", "--seed", "-1"], "--seed: "),
        (["train", "--direction", "backward", "--depth", "1", "--id", "../x"], "--id: '../x' is not a valid id"),
        (["train", "--direction", "backward", "--depth", "1", "--phase", "base,rl"], "--phase: rl cannot follow base"),
        (["train", "--direction", "backward", "--depth", "1", "--set", "sed=3"], "(did you mean 'seed'?)"),
        (["train", "--direction", "backward", "--depth", "1", "--set", "launch.retries=3"], "--set launch.retries: "),
        (["train", "--direction", "backward", "--depth", "1", "--set", "budget.batch_tokens=9"], "exactly one of"),
        (["train", "--direction", "backward", "--depth", "1", "--set", "model.kv_heads=3"], "change head_dim or kv"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(arguments: list[str], words: str, shell: Shell) -> None:
    shell.file(GOOD)
    check_mistake(shell(*arguments), words)
    assert [path.name for path in shell.folder.iterdir()] == ["g.yaml"]


# ---- train ----


def test_an_experiment_is_named_and_set_by_its_command() -> None:
    flags = {"phase": "base", "direction": "backward", "depth": 2, "lr": 0.5, "seed": 3}
    plan = plan_experiment(flags, ["seed=4", "budget.steps=7", "budget.batch_tokens=4096"], None)
    [cell] = plan.cells
    assert re.fullmatch(r"base_\d{8}_backward_d2", cell.id)
    assert (plan.name, plan.is_grid, cell.steps) == (cell.id, False, 7)
    assert (cell.experiment.lr, cell.experiment.seed) == (0.5, 4)
    assert plan_experiment(flags, [], "mine").cells[0].id == "mine"


def test_sigterm_ends_a_command_that_trains_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("bwlm.grid.launch.run_plan", ask)
    before = signal.getsignal(signal.SIGTERM)
    answer = shell("grid", "run", shell.file(GOOD))
    assert answer == (143, "", "bwlm: stopped by SIGTERM; run the same command to resume\n")
    assert signal.getsignal(signal.SIGTERM) == before


# ---- the installed command ----


def run_installed(folder: Path, *arguments: str) -> Answer:
    ended = subprocess.run([BWLM, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    return Answer(ended.returncode, ended.stdout, ended.stderr)


def test_the_installed_command_plans_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(GOOD)
    answer = run_installed(tmp_path, "grid", "plan", "g.yaml", "--json")
    assert answer.code == 0
    assert answer.err == ""
    assert len(json.loads(answer.out)["cells"]) == 4
    check_mistake(run_installed(tmp_path, "grid", "plan", "g.yaml", "--set", "sed=1"), "did you mean 'seed'?")
    assert [path.name for path in tmp_path.iterdir()] == ["g.yaml"]


def test_the_job_script_is_the_same_command(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "jobs" / "run_grid.py"
    ended = subprocess.run(
        [sys.executable, script, "absent.yaml"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    check_mistake(Answer(ended.returncode, ended.stdout, ended.stderr), "absent.yaml: no such file")


def test_a_narrow_terminal_cuts_no_id_and_no_figure(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bars_bidirectional_d12_model.sequence_length2048_lr0.25_s0"
    make_run(shell.storage, name, Status("finished", "", 5, {"val_bpb": 1.25, "tokens_per_second": 1234567.0}))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    shown = shell("runs", "list").out
    assert name in shown
    assert "1,234,567" in shown
    assert "…" not in shown


def test_a_figure_that_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON knows neither NaN nor infinity, and its readers refuse the document."""
    print_json({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": {"c": None, "d": "NaN"}}


def test_the_files_of_tasks_are_those_of_this_command_also_for_a_run_that_had_finished(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of a run that is done stays as it is, and may name no files, or others."""
    called: list[dict[str, Any]] = []
    result = SimpleNamespace(cells=[SimpleNamespace(id="mine")], complete=True)
    module = sys.modules["bwlm.cli.train"]  # `cli.train` is the command
    monkeypatch.setattr(module, "launch", lambda *_: result)
    monkeypatch.setattr(module, "evaluate", lambda runs, **options: called.append(options))
    file = shell.folder / "a: #b.jsonl"
    tasks = ["--set", "evaluation.tasks=[arc_easy, 'core:x']", "--set", f"tasks.arc_easy.path='{file}'"]
    run = ["--phase", "base,eval", "--id", "mine", "--direction", "forward", "--depth", "1"]
    answer = shell("train", *run, *tasks, "--set", "tasks.mmlu.path=other", "--json")
    assert answer.code == 0, answer.err
    [options] = called
    assert options["tasks"] == "arc_easy,core:x"
    assert dict(map(parse_setting, options["set_"])) == {"tasks.arc_easy.path": str(file)}
