"""`bwlm analyze scores`: verdicts on a table or lm-eval's samples, in words, as JSON, a chart, tables; mistakes."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bwlm.stats.score_table import checked_scores
from bwlm.stats.scores import compare_scores
from tests.shell import Shell, check_mistake
from tests.stats.test_scores import GOLDEN, study, table
from tests.test_readme import ROOT, blocks, write_files

SCORES = table(GOLDEN)


def write(scores: pd.DataFrame, path: Path) -> str:
    scores.to_parquet(path) if path.suffix == ".parquet" else scores.to_csv(path, index=False)
    return path.name


def found(shell: Shell, scores: pd.DataFrame, name: str = "s.csv", *options: str) -> dict[str, Any]:
    answer: dict[str, Any] = shell.json("analyze", "scores", "--from", write(scores, shell.folder / name), *options)
    return answer


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_scores_as_json(name: str, shell: Shell) -> None:
    answer = found(shell, SCORES.assign(chance=0.25, rule="acc"), name)
    scores = compare_scores(checked_scores(SCORES))
    forward, backward = answer["arms"]
    assert (forward["task"], forward["rule"], forward["direction"]) == ("arc", "acc", "forward")
    assert (forward["seeds"], forward["items"], forward["accuracy"]) == ([0, 1, 2], 4, 0.5)
    assert forward["interval"] == list(scores.arms[0].interval)
    assert (backward["chance"], backward["per_seed"]) == (0.25, [0.25, 0.25, 0.5])
    [pair], [one] = answer["pairs"], scores.differences
    assert (pair["a"], pair["b"], pair["difference"], pair["interval"]) == (
        "forward", "backward", one.difference, list(one.interval),
    )  # fmt: skip
    assert (pair["p"], pair["p_adjusted"], pair["detectable"]) == (one.p, one.p_adjusted, one.detectable)
    assert (pair["verdict"], pair["reason"]) == (one.verdict, one.reason)
    [best] = answer["best"]
    assert (best["best"], best["not_told_from_best"], best["worse"]) == ("forward", ["backward"], [])
    assert answer["left_out"] == []
    assert [path.name for path in shell.folder.iterdir()] == [name]


def test_findings_in_words(shell: Shell) -> None:
    name = write(SCORES.assign(chance=0.5), shell.folder / "s.csv")
    answer = shell("analyze", "scores", "--from", name)
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    # worked out in tests/stats/test_scores.py; the interval is -1/6 -+ 4.302653 / 12, and 8.7735 estimated errors are
    # seen with a chance of 0.8 where 2 degrees of freedom estimate them: 8.7735 / 12
    assert (
        "arc, forward → backward: difference -0.1667, 95 % -0.5252 .. +0.1919, 3 seeds, 4 items, forward has the "
        "higher accuracy: no difference seen (seeds crossed with items, p = 0.184 (Holm over 1)); 80 % power from "
        "0.7311 on"
    ) in lines
    assert "arc, backward: cannot be told from chance (0.5000)" in lines
    [best] = [line for line in lines if "has the highest accuracy (0.5000, 95 % 0." in line]
    assert best.endswith("); backward cannot be told from it")


def test_one_seed_says_that_it_speaks_of_items_alone(shell: Shell) -> None:
    name = write(table(study((0.4, 0.6), 1)), shell.folder / "s.csv")
    out = shell("analyze", "scores", "--from", name).out
    assert "95 % over items alone" in out
    assert "too few seeds to tell (1 paired seed, a verdict needs 3; McNemar over the items, p = " in out
    assert "on, of the items alone\n" in out


def test_an_arm_alone_has_an_accuracy_and_no_pair(shell: Shell) -> None:
    alone = SCORES[SCORES["direction"] == "forward"]
    answer = found(shell, alone, "s.csv", "--output", "t.md", "--output", "c.svg")
    assert answer["pairs"] == []
    out = shell("analyze", "scores", "--from", "s.csv").out
    assert "arc: forward has accuracy 0.5000, 95 % " in out
    assert "Differences" not in out + (shell.folder / "t.md").read_text()


def test_what_is_left_out_is_told_and_hides_no_other(shell: Shell) -> None:
    rows = pd.concat([SCORES, SCORES.assign(task="hard", correct=[0] * 12 + [1, 0, 0, 0] * 3)])
    name = write(rows, shell.folder / "s.csv")
    answer = shell("analyze", "scores", "--from", name)
    assert answer.code == 0
    assert answer.err.startswith("hard: forward is left out: each score of its 4 items is 0")
    assert "arc, forward → backward" in answer.out
    assert "hard: backward has accuracy 0.2500" in answer.out


def test_any_terminal_takes_the_tables(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answers = study((0.5, 0.6, 0.7), 3)
    name = write(table(answers, "arithmetic_2da").assign(rule="acc_norm", chance=0.25), shell.folder / "s.csv")
    lines = shell("analyze", "scores", "--from", name).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "arithmetic_2da, forward → backward, no difference seen" in lines


def test_output_is_what_its_ending_says(shell: Shell) -> None:
    name = write(SCORES.assign(chance=0.25), shell.folder / "s.csv")
    outputs = ["c.svg", "c.png", "c.html", "t.csv", "t.md"]
    answer = shell("analyze", "scores", "--from", name, "--json", *(f"--output={output}" for output in outputs))
    assert answer.err == "".join(f"written: {output}\n" for output in outputs)
    content = {output: (shell.folder / output).read_bytes() for output in outputs}
    drawn = content["c.svg"].decode()
    assert "prefers-color-scheme:dark" in drawn
    assert all(word in drawn for word in ("forward", "backward", "arc", "accuracy", "dashed: chance"))
    assert content["c.png"].startswith(b"\x89PNG")
    [forward, _] = pd.read_csv(io.BytesIO(content["t.csv"]), float_precision="round_trip").to_dict("records")
    [arm, _] = json.loads(answer.out)["arms"]
    assert [forward["interval_low"], forward["interval_high"]] == arm["interval"]
    text = content["t.md"].decode()
    assert "| arc | forward | 3 | 4 | 0.5000 | " in text
    assert "Differences:" in text


def test_the_chart_draws_each_seed_and_keeps_tasks_of_other_arms_apart(shell: Shell) -> None:
    parts = [table(study((0.3, 0.5), 4)), table({"mine": study((0.7,), 1)["forward"]}, "other").assign(chance=0.5)]
    write(pd.concat(parts), shell.folder / "s.csv")
    assert shell("analyze", "scores", "--from", "s.csv", "--output", "c.svg").code == 0
    drawn = (shell.folder / "c.svg").read_text()
    assert drawn.count("#2a6fbb") >= 6  # forward: a bar, a point and four seeds
    assert drawn.count("#4b5563") >= 3  # an arm of another name


# ---- lm-eval's samples ----

# A line that lm-eval 0.4.13 wrote for a task of its own kind `multiple_choice`, without `arguments` and `resps`.
LOGGED = json.loads(
    '{"doc_id": 0, "doc": {"q": "What is 0+0?", "choices": ["0", "1", "7", "x"], "gold": 0}, "target": "0", '
    '"filter": "none", "metrics": ["acc", "acc_norm", "brier_score"], '
    '"doc_hash": "fcc8f75ee1fa74f9c002c6c90bf5a810dc02c29b4e11c59ed0875f5a7c5adcc5", '
    '"prompt_hash": "b380f6288df34d776c927becc871a1202fde6b7412b3d2e61154c00af99a0005", '
    '"target_hash": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9", '
    '"acc": 1.0, "acc_norm": 1.0, "brier_score": [0, "[0.33142403 0.26196527 0.27286159 0.13374911]"]}'
)
DATE = "2026-11-29T15-56-57.078808"


def log_samples(folder: Path, scores: Sequence[float], task: str = "arc_easy", **fields: Any) -> Path:
    """Write samples as lm-eval does: in a folder of the model below its `--output_path`."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    path = folder / "model" / f"samples_{task}_{DATE}.jsonl"
    lines = [
        LOGGED | {"doc_id": i, "acc": s, "acc_norm": s, "doc_hash": f"d{i}"} | fields for i, s in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def log_study(folder: Path, answers: Mapping[str, Mapping[int, Sequence[float]]]) -> list[str]:
    return [
        f"--from={arm}:{seed}={log_samples(folder / f'{arm}-{seed}', scores).parents[1].relative_to(folder)}"
        for arm, by_seed in answers.items()
        for seed, scores in by_seed.items()
    ]


def test_samples_of_lm_eval_are_scores(shell: Shell) -> None:
    answers = study((0.4, 0.6), 3, items=50)
    answer = shell.json("analyze", "scores", *log_study(shell.folder, answers))
    assert {(arm["task"], arm["rule"]) for arm in answer["arms"]} == {("arc_easy", "acc"), ("arc_easy", "acc_norm")}
    [expected] = compare_scores(checked_scores(table(answers))).differences
    for pair in answer["pairs"]:
        assert (pair["difference"], pair["interval"]) == (expected.difference, list(expected.interval))


def test_filters_of_lm_eval_are_rules_and_other_metrics_are_none(shell: Shell) -> None:
    path = log_samples(shell.folder / "m", [1, 0, 1], "gsm8k", metrics=["exact_match", "ter"], ter=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [
        line | {"filter": name, "exact_match": line["acc"]} for name in ("strict-match", "none") for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in logged))
    answer = shell.json("analyze", "scores", "--from", f"a:0={path.relative_to(shell.folder)}")
    assert [(arm["task"], arm["rule"]) for arm in answer["arms"]] == [
        ("gsm8k", "exact_match"),
        ("gsm8k", "exact_match, strict-match"),
    ]


def test_samples_of_another_version_of_a_task_are_not_paired(shell: Shell) -> None:
    log_samples(shell.folder / "a", [1, 0, 1])
    log_samples(shell.folder / "b", [1, 0, 0], target_hash="other")
    answer = shell("analyze", "scores", "--from", "a:0=a", "--from", "b:0=b")
    assert "arc_easy, rule acc: a and b are not compared: runs 'a' and 'b' have other content under" in answer.err


def test_a_table_stands_beside_samples(shell: Shell) -> None:
    log_samples(shell.folder / "a", [1, 0, 1])
    name = write(
        table({"mine": {0: (1, 1, 0)}}, "arc_easy").assign(rule="acc", item=["0", "1", "2"] * 1), shell.folder / "s.csv"
    )
    answer = shell.json("analyze", "scores", "--from", "a:0=a", "--from", name)
    [pair] = answer["pairs"]
    assert (pair["a"], pair["b"], pair["rule"]) == ("a", "mine", "acc")


# ---- the page ----


def test_the_docs_show_what_is_printed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = ROOT / "docs" / "statistics.md"
    write_files(page, shell.folder)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if "analyze scores" in line]
    of_table, of_samples = (shlex.split(command)[1:] for command in commands)
    answer = shell(*of_table)
    assert (answer.code, answer.err) == (0, "written: scores.svg\n")
    shown = "\n".join(line.rstrip() for line in answer.out.splitlines())
    assert f"```\n{shown}\n```\n" in page.read_text()
    for index, source in enumerate(word for word in of_samples if "=" in word):
        log_samples(shell.folder / source.partition("=")[2], [1, 0, 1, index % 2])
    answer = shell(*of_samples)
    assert (answer.code, answer.err) == (0, "")
    assert "arc_easy, rule acc_norm" in answer.out


# ---- mistakes ----

Change = Callable[[pd.DataFrame], pd.DataFrame]

TABLES: dict[str, tuple[Change, str]] = {
    "a column misspelt": (
        lambda rows: rows.rename(columns={"correct": "corect"}),
        "the scores lack column 'correct' (did you mean 'corect'?); needed: run, direction, seed, task, item, correct",
    ),
    "no rows": (lambda rows: rows.iloc[:0], "the scores hold no rows: give a row for each run and item"),
    "percent": (
        lambda rows: rows.assign(correct=100 * rows["correct"]),
        "row 1: correct of item 'q0' in run 'forward-0' is 100, outside 0..1: write 1 for a right answer, 0 for a",
    ),
    "a negative score": (
        lambda rows: rows.assign(correct=[1, -0.5, *rows["correct"][2:]]),
        "row 2: correct of item 'q1' in run 'forward-0' is -0.5, outside 0..1",
    ),
    "a word": (
        lambda rows: rows.assign(correct=["yes", *map(str, rows["correct"][1:])]),
        "row 1: correct of item 'q0' in run 'forward-0' is yes, not a number: write 1 for a right answer",
    ),
    "chance in percent": (
        lambda rows: rows.assign(chance=25),
        "row 1: chance of item 'q0' in run 'forward-0' is 25, outside 0..1: write the share of right answers of a",
    ),
    "an item twice": (
        lambda rows: pd.concat([rows, rows.iloc[5:6]]),
        "row 25: item 'q1' of arc stands in run 'forward-1' twice: keep one row",
    ),
    "two runs in a cell": (
        lambda rows: pd.concat([rows, rows[:4].assign(run="again")]),
        "direction forward, seed 0 has several runs on arc: again, forward-0; keep one of them",
    ),
    "a run of two seeds": (
        lambda rows: rows.assign(run=rows["direction"]),
        "run 'forward' has several seeds: 0, 1, 2; give each model a name of its own",
    ),
    "a seed that is no number": (
        lambda rows: rows.assign(seed=["x", *map(str, rows["seed"][1:])]),
        "seed of run 'forward-0' is x: seeds must be whole numbers",
    ),
    "no task": (
        lambda rows: rows.assign(task=[None, *rows["task"][1:]]),
        "the scores' row 1 has no task: fill it in or leave the row out",
    ),
    "two spellings": (
        lambda rows: rows.assign(task=["ARC", *rows["task"][1:]]),
        "column 'task' has both 'ARC' and 'arc': write one name one way",
    ),
    "nothing to rank": (
        lambda rows: rows.assign(correct=0),
        "arc: forward is left out: each score of its 4 items is 0, which tells nothing about other items: check how",
    ),
}


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
@pytest.mark.parametrize("mistake", TABLES)
def test_a_bad_table_is_one_line_that_names_the_file(mistake: str, name: str, shell: Shell) -> None:
    change, message = TABLES[mistake]
    write(change(SCORES), shell.folder / name)
    answer = shell("analyze", "scores", "--from", name, "--output", "c.svg")
    check_mistake(answer, f"bwlm: {name}: {message}")
    assert [path.name for path in shell.folder.iterdir()] == [name]


def test_true_and_false_and_empty_scores_are_read(shell: Shell) -> None:
    plain = found(shell, SCORES)
    assert found(shell, SCORES.assign(correct=SCORES["correct"] == 1)) == plain
    assert found(shell, SCORES.assign(correct=SCORES["correct"] == 1), "s.parquet") == plain
    holes = SCORES.assign(correct=[math.nan, *SCORES["correct"][1:]])
    assert found(shell, holes)["left_out"] == [
        "arc: forward is left out: run 'forward-0' has no finite score for 1 item, such as 'q0': score it again or "
        "leave it out"
    ]


def test_blanks_and_case_make_no_other_group(shell: Shell) -> None:
    odd = SCORES.assign(
        direction=SCORES["direction"].str.upper(),
        run=" " + SCORES["run"],
        item=SCORES["item"] + " ",
        task=["arc ", "arc"] * 12,
    )
    assert found(shell, odd) == found(shell, SCORES)


def broken_samples(folder: Path) -> None:
    log_samples(folder / "a", [1, 0, 1])
    log_samples(folder / "twice", [1, 0])
    one = folder / "twice" / "model" / f"samples_arc_easy_{DATE}.jsonl"
    one.with_name("samples_arc_easy_2026-11-30T15-56-57.078808.jsonl").write_text(one.read_text())
    log_samples(folder / "no_accuracy", [1, 0], metrics=["brier_score"])
    log_samples(folder / "old", [1, 0]).write_text(json.dumps({"doc_id": 0, "acc": 1}) + "\n")
    log_samples(folder / "list", [1, 0]).write_text("[1]\n")
    log_samples(folder / "half", [1, 0]).write_text('{"doc_id": 0, "ac')
    log_samples(folder / "percent", [100, 0])
    (folder / "empty").mkdir()
    (folder / "other.jsonl").write_text("{}\n")
    write(SCORES, folder / "s.csv")
    (folder / "s.xlsx").touch()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.csv", "absent.csv: no such file: give a table, or DIRECTION:SEED=PATH for lm-eval's samples"),
        ("s.xlsx", "s.xlsx: neither .parquet nor .csv: save the scores as one of them"),
        ("a", "a: lm-eval's samples name no direction and no seed: write --from DIRECTION:SEED=a"),
        ("a:0=s.csv", "a:0=s.csv: a table names its own directions and seeds: write --from s.csv"),
        ("a:0=absent", "a:0=absent: no such file"),
        ("a:x=a", "a:x=a: no such file: give a table, or DIRECTION:SEED=PATH"),
        ("a:0=empty", "empty: no samples_TASK_DATE.jsonl in this folder: run lm-eval with --log_samples"),
        ("a:0=other.jsonl", "other.jsonl: no samples of lm-eval: their names are samples_TASK_DATE.jsonl"),
        (
            "a:0=twice",
            f"twice: samples_arc_easy_{DATE}.jsonl and samples_arc_easy_2026-11-30T15-56-57.078808.jsonl are",
        ),
        ("a:0=no_accuracy", ".jsonl: no accuracy in it: needs a metric such as acc or exact_match for each sample"),
        ("a:0=old", ".jsonl:1: has no doc_hash: not a sample as lm-eval 0.4.13 logs it"),
        ("a:0=list", ".jsonl:1: holds a list, a sample is an object"),
        ("a:0=half", ".jsonl: cannot be read as JSON lines ("),
        ("a:0=percent", "percent: row 1: correct of item '0' in run 'percent' is 100, outside 0..1"),
    ],
)
def test_a_bad_source_is_one_line_that_names_it(source: str, message: str, shell: Shell) -> None:
    broken_samples(shell.folder)
    check_mistake(shell("analyze", "scores", "--from", source), message)


def test_sources_that_clash_are_one_line(shell: Shell) -> None:
    log_samples(shell.folder / "a", [1, 0, 1])
    log_samples(shell.folder / "b", [1, 0, 1])
    answer = shell("analyze", "scores", "--from", "x:0=a", "--from", "x:0=b")
    check_mistake(answer, "direction x, seed 0 has several runs on arc_easy, rule acc: a, b; keep one of them")
    answer = shell("analyze", "scores", "--from", "x:0=a", "--from", "y:0=a")
    check_mistake(answer, "run 'a' has several directions: x, y; give each model a name of its own")
    write(SCORES, shell.folder / "s.csv")
    answer = shell("analyze", "scores", "--from", "s.csv", "--from", "s.csv")
    check_mistake(answer, "bwlm: item 'q0' of arc stands in run 'forward-0' twice: keep one row")


def test_a_missing_source_is_one_line(shell: Shell) -> None:
    check_mistake(shell("analyze", "scores"), "--from")
