"""Scores of runs as a table: own readings, items paired, groups apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bwlm.analysis.runs.task_scores import Wanted, at_best_rates, load_task_scores
from bwlm.errors import UserError
from bwlm.evaluate.tasks.request import TaskRequest, read_tasks
from bwlm.evaluate.tasks.stored import RunEvaluation
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.task_results import read_examples
from bwlm.stats.score_table import checked_scores
from bwlm.stats.scores import compare_scores
from tests.runs import NewFamily
from tests.shell import Shell
from tests.shell import shell as shell

WORDS = ("sun", "sea", "sky", "ice")


@pytest.fixture
def scored(new_family: NewFamily, tmp_path: Path) -> list[ExperimentFolder]:
    """A run of each direction, scored on questions of two subjects."""
    read_tasks.cache_clear()
    path = tmp_path / "all" / "test.jsonl"
    path.parent.mkdir()
    rows = [
        {"question": f"Q{n}", "subject": "law" if n < 6 else "art", "choices": list(WORDS), "answer": n % 4}
        for n in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [new_family(direction) for direction in ("forward", "backward", "bidirectional")]
    for folder in folders:
        RunEvaluation(folder.path.parent, folder.id, (TaskRequest("mmlu", str(path), shots=0),)).scores()
    return folders


def test_each_direction_is_scored_in_its_own_reading(scored: list[ExperimentFolder]) -> None:
    rows = load_task_scores(scored, Wanted())
    assert len(rows) == 3 * 14
    assert set(rows["task"]) == {"mmlu.shots0"}
    assert set(rows["chance"]) == {0.25}
    for folder, readings in zip(scored, (["forward"], ["backward"], ["forward", "backward"]), strict=True):
        mine = rows[rows["run"] == folder.id].set_index("item")["correct"]
        tables = [read_examples(folder.evaluation("base", reading), "mmlu.shots0").to_pandas() for reading in readings]
        for item, correct in mine.items():
            each = []
            for table in tables:
                [row] = table[
                    (table["item"] == item)
                    & (table["form"] == "cloze")
                    & (table["rule"] == "conditional")
                    & table["control"].isna()
                ].to_dict("records")
                each.append(row["correct"])
            assert correct == pytest.approx(sum(each) / len(each))


def test_a_reading_that_has_no_meaning_leaves_no_scores(new_family: NewFamily) -> None:
    """A base model that reads backward cannot answer: the backward direction has no score, and nothing fails."""
    read_tasks.cache_clear()
    folders = [new_family(direction) for direction in ("forward", "backward", "bidirectional")]
    request = TaskRequest("builtin:arithmetic", max_examples=3, shots=0)
    for folder in folders:
        found = RunEvaluation(folder.path.parent, folder.id, (request,)).scores()
        assert [one.status for one in found] == ["scored", "not_applicable"]
    rows = load_task_scores(folders, Wanted())
    assert set(rows["direction"]) == {"forward", "bidirectional"}


def test_a_mean_over_readings_needs_all_of_them(scored: list[ExperimentFolder]) -> None:
    """A bidirectional model that was scored forward alone has no score of its own."""
    both = scored[2]
    (both.evaluation("base", "backward") / "mmlu.shots0.json").unlink()
    assert set(load_task_scores(scored, Wanted())["direction"]) == {"forward", "backward"}
    assert set(load_task_scores(scored, Wanted(readings=("forward",)))["run"]) == {folder.id for folder in scored}
    with pytest.raises(UserError, match="no scores of this kind"):
        load_task_scores([both], Wanted())


def test_runs_that_were_shown_other_examples_are_not_compared(scored: list[ExperimentFolder]) -> None:
    """The items are the same, but the files of the examples before them have changed in between."""
    path = scored[1].evaluation("base", "backward") / "mmlu.shots0.json"
    content = read_json(path)
    write_json(path, content | {"key": content["key"] | {"texts": "other"}})
    found = compare_scores(checked_scores(load_task_scores(scored, Wanted())))
    assert [one.pair for one in found.differences] == ["forward → bidirectional"]
    assert sum("other content under the same name" in line for line in found.left_out) == 2


def test_readings_rules_and_groups_are_settings_of_their_own(scored: list[ExperimentFolder]) -> None:
    wanted = Wanted(readings=("own", "forward"), rules=("conditional", "joint"), by_group=True)
    rows = load_task_scores(scored, wanted)
    assert set(rows["task"]) == {"mmlu.shots0:law", "mmlu.shots0:art"}
    assert len(rows) == 3 * 2 * 2 * 14
    found = compare_scores(checked_scores(rows))
    assert {arm.setting.reading for arm in found.arms} == {"own", "forward"}
    assert all(one.verdict in (None, "too few seeds to tell") for one in found.differences)  # one seed each


def test_runs_without_scores_and_unknown_results_are_named(
    new_family: NewFamily, scored: list[ExperimentFolder]
) -> None:
    assert at_best_rates(scored) == scored
    assert set(load_task_scores(scored, Wanted(tasks=("mmlu",)))["task"]) == {"mmlu.shots0"}
    path = scored[0].evaluation("base", "forward") / "mmlu.shots0.json"
    for file in (path, path.with_suffix(".parquet")):
        shutil.copy(file, file.with_stem("mmlu-law"))
    assert set(load_task_scores(scored, Wanted(tasks=("mmlu:law",)))["task"]) == {"mmlu-law"}
    with pytest.raises(UserError, match=r"--tasks: no run has a result 'mmlo' \(did you mean 'mmlu'\?\)"):
        load_task_scores(scored, Wanted(tasks=("mmlo",)))
    with pytest.raises(UserError, match=r"no scores of this kind: make some with bwlm eval"):
        load_task_scores(scored, Wanted(rules=("exact",)))


def test_the_command_compares_runs(scored: list[ExperimentFolder], shell: Shell) -> None:
    names, storage = [folder.id for folder in scored], str(scored[0].path.parent)
    found = shell.json("analyze", "scores", *names, "--storage", storage)
    assert {arm["direction"] for arm in found["arms"]} <= {"forward", "backward", "bidirectional"}
    answer = shell("analyze", "scores", *names, "--storage", storage)
    assert answer.code == 0, answer.err
    assert "rule conditional, reading own, form cloze): accuracies" in answer.out
    both = shell("analyze", "scores", *names, "--from", "x.csv", "--storage", storage)
    assert both.code == 2
    assert "give either runs or --from" in both.err
