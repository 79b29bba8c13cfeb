"""Section of a report on scores on tasks: the figures of `bwlm analyze scores`, controls, four metrics, reasons."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bwlm.analysis.report.study import GridReport, write_experiment_report, write_grid_report
from bwlm.analysis.report.tasks import BY_RULE, task_metrics
from bwlm.directions import TEXT_READINGS, is_native
from bwlm.grid.launch import _grid_result
from bwlm.paths import read_json
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.grids import write_cells
from bwlm.record.task_results import TaskResult, result_name, write_result
from tests.analysis.storage import finish, make_cell
from tests.shell import Shell
from tests.shell import shell as shell

ITEMS = 40
RIGHT = {"forward": 0.8, "backward": 0.6, "bidirectional": 0.7}


def cell(storage: Path, direction: str, seed: int) -> ExperimentFolder:
    folder = make_cell(storage, direction, seed)
    return finish(folder, {reading: [2.0 + seed / 9, 2.1, 2.3, 2.2] for reading in TEXT_READINGS})


def score(
    folder: ExperimentFolder, task: str, correct: Callable[[str, str], list[float]], step: int | None = None
) -> None:
    """Write the result of a task of choices in both readings; `correct` says what is right, by reading and rule."""
    config = folder.config()
    name = result_name(task, step)
    for reading in TEXT_READINGS:
        scores, examples = [], []
        rules = ("conditional", "joint")
        for rule in rules:
            right = correct(reading, rule)
            row = {
                "id": folder.id, "step": step or config.steps, "task": task, "form": "cloze", "rule": rule,
                "direction": reading, "native": is_native(config.experiment.direction, reading), "status": "scored",
                "reason": "", "accuracy": sum(right) / ITEMS, "chance": 0.25, "n": ITEMS, "control": None,
            }  # fmt: skip
            scores += [row, row | {"control": "shuffled", "accuracy": 0.3}, row | {"control": "prior", "accuracy": 0.2}]
            for n, share in enumerate(right):
                examples.append({"item": f"q{n}", "group": "", "form": "cloze", "rule": rule, "correct": share})
        about = {"cloze": {"does_not_fit": 2 if task == "arc_easy" else 0}}
        scores.append(scores[0] | {"rule": "answer_first", "status": "not_applicable", "reason": "it is so anyway"}
                      | {"accuracy": None})  # fmt: skip
        columns: dict[str, list[Any]] = {name: [row[name] for row in examples] for name in examples[0]}
        columns["control"] = [None] * len(examples)
        result = TaskResult({"weights": f"{folder.id}@{step}", "right": columns["correct"]}, scores, about)
        write_result(folder.evaluation("base", reading), name, result, columns)


def drawn(folder: ExperimentFolder) -> Callable[[str, str], list[float]]:
    """Answers that are right more often in the own reading."""
    experiment = folder.config().experiment

    def correct(reading: str, rule: str) -> list[float]:
        rng = random.Random(f"{folder.id}{reading}{rule}")
        own = is_native(experiment.direction, reading)
        share = RIGHT[experiment.direction] if own else 0.3
        return [float(rng.random() < share) for _ in range(ITEMS)]

    return correct


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> list[ExperimentFolder]:
    storage = tmp_path_factory.mktemp("scored") / "runs"
    folders = [cell(storage, direction, seed) for direction in RIGHT for seed in range(3)]
    write_cells(storage, "g", [folder.id for folder in folders])
    for folder in folders:
        score(folder, "arc_easy", drawn(folder))
    return folders


@pytest.fixture(scope="module")
def report(grid: list[ExperimentFolder]) -> GridReport:
    return write_grid_report(grid[0].path.parent, "g")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_section_says_what_the_command_says(grid: list[ExperimentFolder], report: GridReport, shell: Shell) -> None:
    text = section(report.files[0].read_text(), "Tasks")
    found = shell.json("analyze", "scores", "g", "--storage", str(grid[0].path.parent))
    lines = [" ".join(row) for row in rows(text)]
    assert len(found["arms"]) == len(found["pairs"]) == 3
    for arm in found["arms"]:
        low, high = arm["interval"]
        own = "both" if arm["direction"] == "bidirectional" else arm["direction"]
        start = f"arc_easy {arm['direction']} {own} conditional 3 40 {arm['accuracy']:.4f} {low:.4f} .. {high:.4f}"
        assert f"{start} 0.2500 0.3000 0.2000" in lines
    for pair in found["pairs"]:
        [line] = [line for line in lines if line.startswith(f"arc_easy {pair['a']} → {pair['b']} 3 40")]
        assert f"{pair['difference']:+.4f}" in line
        assert line.endswith(f"**{pair['verdict']}**")
    assert "arc_easy forward backward (crossed) conditional 3 40" in "\n".join(lines)
    assert "arc_easy bidirectional backward conditional 3 40" in "\n".join(lines)


def test_the_four_metrics_of_each_direction_by_hand(grid: list[ExperimentFolder], report: GridReport) -> None:
    text = section(report.files[0].read_text(), "Tasks")
    assert "native accuracy | cross-direction accuracy | direction gap | bidirectional balance" in text
    for direction in RIGHT:
        means = {
            reading: sum(
                read_json(folder.evaluation("base", reading) / "arc_easy.json")["scores"][0]["accuracy"] / 3
                for folder in grid
                if folder.config().experiment.direction == direction
            )
            for reading in TEXT_READINGS
        }
        forward, backward = means.values()
        first = {"forward": [forward, backward], "backward": [backward, forward]}.get(direction)
        if first:
            wanted = [f"{first[0]:.4f}", f"{first[1]:.4f}", f"{first[0] - first[1]:+.4f}", "–"]
        else:
            wanted = [f"{(forward + backward) / 2:.4f}", "–", "–", f"{forward - backward:+.4f}"]
        [row] = [row[:-1] for row in rows(text) if row[1:3] == [direction, "3"]]
        assert row == ["arc_easy", direction, "3", *wanted]


def test_what_was_not_scored_is_told_with_the_reason(report: GridReport) -> None:
    text = section(report.files[0].read_text(), "Tasks")
    reason = (
        "- not applicable: it is so anyway (9 runs: arc_easy, forward, answer_first; arc_easy, backward, answer_first)"
    )
    assert reason in text
    assert "- arc_easy, cloze: 2 items longer than a row" in text


def test_other_rules_stand_in_a_section_that_opens_at_a_click(report: GridReport) -> None:
    assert " joint " in section(report.files[0].read_text(), BY_RULE)
    assert " joint " not in section(report.files[0].read_text(), "Tasks")
    page = report.files[1].read_text()
    assert f'<details><summary><h2 id="tasks-by-every-rule">{BY_RULE}</h2>' in page
    assert page.partition('<h2 id="tasks">')[2].partition("<details>")[0].count("data:image/svg+xml") == 1
    assert {"tasks.svg", "tasks.html"} <= {path.name for path in report.files}


def test_the_grids_mlflow_run_gets_the_four_metrics(report: GridReport) -> None:
    metrics = task_metrics(report.tasks)
    assert set(metrics) == {
        *(f"tasks/arc_easy/{figure}/d1_{direction}" for figure in ("native", "crossed", "direction_gap")
          for direction in ("forward", "backward")),
        "tasks/arc_easy/native/d1_bidirectional", "tasks/arc_easy/bidirectional_balance/d1_bidirectional",
    }  # fmt: skip
    assert metrics["tasks/arc_easy/direction_gap/d1_forward"] == pytest.approx(
        metrics["tasks/arc_easy/native/d1_forward"] - metrics["tasks/arc_easy/crossed/d1_forward"]
    )
    result = _grid_result(report)
    assert metrics.items() <= result.metrics.items()
    assert "cross-direction accuracy" in result.text


def test_no_section_where_no_run_has_scores_and_scoring_changes_the_report(tmp_path: Path) -> None:
    folders = [cell(tmp_path, direction, 0) for direction in ("forward", "backward")]
    write_cells(tmp_path, "g", [folder.id for folder in folders])
    before = write_grid_report(tmp_path, "g")
    assert before.tasks is None
    assert "## Tasks" not in before.files[0].read_text() + write_experiment_report(folders[0])[0].read_text()
    score(folders[0], "arc_easy", drawn(folders[0]))
    text = write_grid_report(tmp_path, "g").files[0].read_text()
    assert "- arc_easy: forward has accuracy 0." in text
    files = write_experiment_report(folders[0])
    own = section(files[0].read_text(), "Tasks")
    assert "| arc_easy | forward | backward (crossed) | conditional | 1 | 40 |" in own
    assert "| arc_easy | forward | 1 |" in own
    assert files[0].with_name("tasks.svg") in files
    assert "## Tasks" not in write_experiment_report(folders[1])[0].read_text()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_task_that_is_all_right_or_all_wrong_is_shown_and_not_judged(share: float, tmp_path: Path) -> None:
    folders = [cell(tmp_path, direction, seed) for direction in ("forward", "backward") for seed in range(3)]
    write_cells(tmp_path, "g", [folder.id for folder in folders])
    for folder in folders:
        score(folder, "arc_easy", lambda reading, rule: [share] * ITEMS)
    text = section(write_grid_report(tmp_path, "g").files[0].read_text(), "Tasks")
    assert f"forward is left out: each score of its 40 items is {share:g}" in text
    ends = {0.0: "0.0000 .. 0.0876", 1.0: "0.9124 .. 1.0000"}[share]  # Wilson's over 40 items
    assert f"| arc_easy | forward | forward | conditional | 3 | 40 | {share:.4f} | {ends} |" in text
    assert "tasks.svg" not in text


def test_a_task_without_a_meaning_in_any_run_says_so(tmp_path: Path) -> None:
    folder = cell(tmp_path, "backward", 0)
    write_cells(tmp_path, "g", [folder.id])
    row = {
        "id": folder.id, "step": 1, "task": "gsm8k", "form": "generated", "control": None, "rule": "pass@1",
        "direction": "backward", "native": True, "status": "not_applicable", "reason": "it would write the question",
        "accuracy": None, "chance": None, "n": 0,
    }  # fmt: skip
    where = folder.evaluation("base", "backward")
    write_result(where, "gsm8k", TaskResult({"weights": "w"}, [row], {}), {"item": []})
    text = section(write_grid_report(tmp_path, "g").files[0].read_text(), "Tasks")
    assert "- not applicable: it would write the question (1 run: gsm8k, backward, pass@1)" in text
    assert json.dumps(task_metrics(write_grid_report(tmp_path, "g").tasks)) == "{}"
