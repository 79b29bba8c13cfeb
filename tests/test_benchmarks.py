"""Benchmarks run, at sizes at which their figures mean nothing: what they print is what docs and scripts rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.many_cells import copy_grid
from bwlm.record.grids import write_cells
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process, make_run
from tests.shell import Shell

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "bfloat16")


def run(name: str, *arguments: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "BWLM_STORAGE", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_steps_are_compared_with_a_minimal_gpt() -> None:
    sizes = ("--depth", "1", "--time", "64", "--rows", "2", "--vocab", "300", "--steps", "1", "--rounds", "1")
    found = json.loads(run("train_step.py", *sizes, "--variants", "bwlm-eager,minimal-default", "--json"))
    assert [row["variant"] for row in found["rows"]] == ["bwlm-eager", "minimal-default"]
    assert found["ratio_to_peer_default"] > 0
    assert 0 < found["floor_share"] < 1
    assert all(row["peak_bytes"] > 2**20 for row in found["rows"])


def test_the_step_is_timed_without_ray_and_pydantic() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['pydantic'] = None; sys.path.insert(0, 'benchmarks');"
        "import train_step; shape = train_step.Shape(1, 32, 2, 300, 1);"
        "print(train_step.measure('bwlm-eager', shape, 1, None, False)['tokens_per_second'] > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


def test_decoding_is_compared_with_rereading() -> None:
    sizes = ("--depth", "1", "--time", "64", "--vocab", "300", "--rows", "1,3", "--new", "8", "--rounds", "1")
    found = json.loads(run("decoding.py", *sizes, "--json"))
    assert [(row["precision"], row["rows"]) for row in found] == [(p, n) for p in PRECISIONS for n in (0, 1, 3)]
    assert all(row["best"] >= row["tokens_per_second"] > 0 for row in found)
    assert [row["ratio_to_rereading"] for row in found if row["rows"] == 0] == [1, 1]


def test_answers_are_written_in_batches(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(20)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--depth", "1", "--time", "128", "--vocab", "300", "--items", "4", "--new", "8", "--rounds", "1")
    [row] = json.loads(run("generate_answers.py", "--data", str(tmp_path), *sizes, "--json"))["rows"]
    assert (row["variant"], row["answers"], row["equal_answers"], row["bwlm_is_faster"]) == ("bwlm", 4, 1, 1)
    assert row["answers_per_second"] > 0


@pytest.mark.slow
def test_a_grid_is_compared_with_its_training(corpus: Path) -> None:
    sizes = ("--cells", "3", "--at-once", "1", "--seconds", "1", "--depth", "1", "--vocab", "400")
    found = json.loads(run("grid.py", "--source", str(corpus), *sizes, "--json"))
    assert found["wall_seconds"] > found["ideal_seconds"] > 3 * 0.5
    assert found["wall_over_ideal"] == pytest.approx(found["wall_seconds"] / found["ideal_seconds"])
    assert 0 < found["pause_seconds"] <= found["longest_pause_seconds"] < found["wall_seconds"]


@pytest.mark.slow
def test_what_rays_loop_costs_is_printed() -> None:
    shown = run("loop_overhead.py", "--steps", "12", "--seconds", "2", "--batch-tokens", "512")
    counted = re.findall(r"^(.+): [\d.]+ ms a step \((\d+) steps\)$", shown, re.MULTILINE)
    assert [kind for kind, _ in counted] == ["with Ray", "bare beside an idle cluster", "bare"]
    assert all(int(steps) >= 12 for _, steps in counted)
    assert re.search(r"^the loop costs [+-][\d.]+% of a step", shown, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.py", "muon.py"])
def test_others_run(name: str) -> None:
    assert "ms" in run(name)


def test_steps_inside_segments_are_compared_with_steps_that_know_none() -> None:
    sizes = ("--depth", "1", "--time", "64", "--rows", "2", "--vocab", "300", "--rounds", "1", "--modes", "eager")
    found = json.loads(run("document_mask.py", *sizes, "--json"))
    [eager] = found["modes"]
    assert [row["case"] for row in eager["cases"]] == [
        "unmasked", "one document a row", "documents of 500", "documents of 50"
    ]  # fmt: skip
    assert eager["cases"][0]["speed_to_unmasked"] == 1
    assert all(row["best"] >= row["tokens_per_second"] > 0 for row in eager["cases"])
    assert eager["compiled_anew"] == 0


def test_copies_of_a_grid_are_runs_like_others(prepared: Prepared, shell: Shell) -> None:
    """The storage that `many_cells.py` measures on: no command finds fault with it."""
    source = shell.folder / "source"
    for direction in ("forward", "backward"):
        run = make_run(prepared, source, f"one_{direction}", direction=direction)
        assert run_phase(run, LocalSession(), in_process).state == "finished"
    write_cells(source, "one", ["one_forward", "one_backward"])
    ids = copy_grid(source, "one", shell.storage, cells=6, rates=(1.0,))
    assert ids == [f"many_{direction}_d1_lr1_s{seed}" for direction in ("forward", "backward") for seed in range(3)]
    listed = shell("runs", "list", "--json")
    assert listed.err == ""
    runs = json.loads(listed.out)
    assert [(run["state"], run["seed"], run["damage"]) for run in runs] == [("finished", n, []) for n in (0, 1, 2)] * 2
    assert len({run["metrics"]["val_bpb"] for run in runs}) == 6
    [gap] = shell.json("analyze", "gap", "many", "--output", "gap.csv")
    assert gap["seeds"] == 3
    assert len(set(gap["per_seed"])) == 3
