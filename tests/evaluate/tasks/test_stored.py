"""`bwlm eval --tasks`: what is saved, what is not scored again, and what a mistake in data or command is told as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from bwlm.evaluate.tasks import request, stored
from bwlm.evaluate.tasks.request import LoadedTask, TaskRequest, sample
from bwlm.evaluate.tasks.run import evaluate_task
from bwlm.evaluate.tasks.stored import RunEvaluation
from bwlm.paths import read_json
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.tracking import Tracking
from bwlm.trained.load import load_model
from tasks import TASKS
from tests.runs import NewChild, NewFamily
from tests.shell import Shell, check_mistake
from tests.shell import shell as shell

WORDS = ("sun", "sea", "sky", "ice", "oak")


def row(n: int, **changed: Any) -> dict[str, Any]:
    """Question with three choices, as ARC's schema has it; labels are digits in every other row."""
    labels = ["A", "B", "C"] if n % 2 else ["1", "2", "3"]
    choices = [WORDS[(n + k) % 5] for k in range(3)]
    found = {"question": f"Q{n}?", "choices": {"text": choices, "label": labels}, "answerKey": labels[n % 3]}
    return found | changed


def write(folder: Path, rows: Sequence[dict[str, Any]], name: str = "test.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder / name


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    return write(tmp_path / "arc", [row(n) for n in range(12)])


@pytest.fixture(autouse=True)
def _read_anew() -> None:
    request.read_tasks.cache_clear()


def evaluate(folder: ExperimentFolder, path: Path, **fields: Any) -> list[dict[str, Any]]:
    request = TaskRequest("arc_easy", str(path), **fields)
    return [vars(score) for score in RunEvaluation(folder.path.parent, folder.id, (request,)).scores()]


def read_one(request: TaskRequest) -> LoadedTask:
    [task] = LoadedTask.read(request)
    return task


def test_every_form_control_rule_and_reading_has_a_score(new_family: NewFamily, arc: Path) -> None:
    found = evaluate(new_family("backward"), arc)
    keys = {(one["form"], one["control"], one["direction"], one["rule"]) for one in found}
    assert len(keys) == len(found)
    for form in ("cloze", "lettered"):
        for reading, rules in (("forward", 4), ("backward", 3)):
            mine = [one for one in found if (one["form"], one["direction"]) == (form, reading)]
            scored = [one for one in mine if one["status"] == "scored"]
            by_control = {
                c: [one["rule"] for one in scored if one["control"] == c] for c in {o["control"] for o in scored}
            }
            assert {name: len(of) for name, of in by_control.items()} == {
                None: rules, "shuffled": rules, "no_context": rules, "prior": 3 if reading == "forward" else 2
            }  # fmt: skip
            assert all(one["native"] == (reading == "backward") for one in mine)
            assert all(one["n"] == 12 and one["chance"] == pytest.approx(1 / 3) for one in scored)
            assert all(one["interval"][0] <= one["accuracy"] <= one["interval"][1] for one in scored)
    [left] = [one for one in found if one["form"] == "cloze" and one["status"] == "not_applicable"]
    assert (left["direction"], left["rule"], left["accuracy"]) == ("backward", "answer_first", None)


def test_examples_are_saved_with_all_scores_and_the_ids_that_were_read(new_family: NewFamily, arc: Path) -> None:
    folder = new_family("forward")
    found = evaluate(folder, arc)
    saved = read_json(folder.evaluation("base", "forward") / "arc_easy.json")
    assert saved["scores"] == json.loads(json.dumps([one for one in found if one["direction"] == "forward"]))
    assert saved["about"]["source"] == str(arc)
    table = pq.read_table(folder.evaluation("base", "forward") / "arc_easy.parquet").to_pylist()
    main = [one for one in table if (one["form"], one["control"], one["rule"]) == ("cloze", None, "conditional")]
    [score] = [o for o in saved["scores"] if (o["form"], o["control"], o["rule"]) == ("cloze", None, "conditional")]
    assert sum(one["correct"] for one in main) / 12 == score["accuracy"]
    tokenizer = load_model(folder.path.parent, folder.id).tokenizer
    assert tokenizer.decode(main[2]["ids"]) == "<|bos|>Question: Q2?\nAnswer: oak"
    assert (len(main[2]["scores"]), main[2]["answer"], main[2]["group"]) == (3, 2, "")


def test_what_was_scored_is_not_scored_again(new_family: NewFamily, arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_family("forward")
    first = evaluate(folder, arc)
    monkeypatch.setattr(stored, "load_model", lambda *_: pytest.fail("scored again"))
    assert json.dumps(evaluate(folder, arc)) == json.dumps(first)
    for changed in ("rows", "version", "damage"):
        if changed == "rows":
            request.read_tasks.cache_clear()
            write(arc.parent, [row(n) for n in range(11)])
        elif changed == "version":
            write(arc.parent, [row(n) for n in range(12)])
            request.read_tasks.cache_clear()
            monkeypatch.setattr(stored, "HARNESS_VERSION", 99)
        else:
            monkeypatch.setattr(stored, "HARNESS_VERSION", 1)
            (folder.evaluation("base", "forward") / "arc_easy.json").write_text("{")
        with pytest.raises(pytest.fail.Exception, match="scored again"):
            evaluate(folder, arc)


def test_a_trial_on_few_examples_does_not_replace_the_whole_result(new_family: NewFamily, arc: Path) -> None:
    folder = new_family("forward")
    whole = evaluate(folder, arc)
    assert {one["n"] for one in evaluate(folder, arc, max_examples=5) if one["status"] == "scored"} == {5}
    assert evaluate(folder, arc, shots=1) != whole
    names = sorted(path.name for path in folder.evaluation("base", "forward").glob("arc*.json"))
    assert names == ["arc_easy.json", "arc_easy.n5.json", "arc_easy.shots1.json"]


def test_an_earlier_checkpoint_has_its_own_result(new_family: NewFamily, arc: Path, shell: Shell) -> None:
    folder = new_family("forward")
    steps = checkpoint_steps(folder.checkpoints)
    paths = ["--tasks", "arc_easy", "--set", f"tasks.arc_easy.path={arc}", "--storage", str(folder.path.parent)]
    one = shell.json("eval", f"{folder.id}@{steps[0]}", *paths)
    assert {score["step"] for score in one} == {steps[0]}
    assert (folder.evaluation("base", "backward") / f"arc_easy@{steps[0]}.json").exists()


def test_a_phase_that_only_evaluates_scores_the_tasks_that_are_set(
    new_family: NewFamily, arc: Path, shell: Shell
) -> None:
    folder = new_family("forward")
    alone = ("train", "--phase", "eval", "--parent", folder.id, "--storage", str(folder.path.parent))
    files = ("--set", f"tasks.arc_easy.path={arc}")
    tasks = ("--set", "evaluation.tasks=[arc_easy]", "--set", "evaluation.max_examples=4", *files)
    scores = shell.json(*alone, *tasks)
    assert {score["n"] for score in scores if score["status"] == "scored"} == {4}
    assert (folder.evaluation("base", "backward") / "arc_easy.n4.json").exists()
    check_mistake(shell(*alone, *files), "--tasks")
    check_mistake(shell(*alone, "--set", "evaluation.every=3"), "--set evaluation.every: a setting of training")
    check_mistake(shell(*alone, "--seed", "3"), "--seed: a setting of training")


def test_the_run_keeps_its_lease_while_a_result_is_written(
    new_family: NewFamily, arc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, held = new_family("forward"), []
    write_result = stored.write_result

    def watched(*arguments: Any) -> None:
        held.append(ExperimentFolder(folder.path.parent, folder.id).lease_holder() is not None)
        write_result(*arguments)

    monkeypatch.setattr(stored, "write_result", watched)
    evaluate(folder, arc)
    assert held == [True, True]
    assert folder.lease_holder() is None


def test_items_that_the_run_was_trained_on_are_counted(
    new_family: NewFamily, new_child: NewChild, arc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bwlm.evaluate.tasks import seen

    folder = new_family("forward")
    assert {one["seen"] for one in evaluate(folder, arc)} == {0}  # a base run reads no conversations
    child = new_child(folder, "mid")
    items = read_one(TaskRequest("arc_easy", str(arc))).conversations
    tokenizer = load_model(folder.path.parent, folder.id).tokenizer
    known = list(TASKS["builtin:arithmetic"].conversations("train"))
    assert seen.count_seen(child, tokenizer, items) == 0
    assert seen.count_seen(child, tokenizer, [*items, known[0], known[5]]) == 2
    with monkeypatch.context() as gone:
        gone.setattr(seen, "find_packed", lambda *_: None)  # its packed text is gone
        assert seen.count_seen(child, tokenizer, items) is None
    folder.path.rename(folder.path.with_name("archived"))
    assert seen.count_seen(child, tokenizer, items) is None


def test_evaluate_task_is_the_command_in_python(new_family: NewFamily, arc: Path) -> None:
    folder = new_family("bidirectional")
    found = evaluate_task(load_model(folder.path.parent, folder.id), TaskRequest("arc_easy", str(arc)))
    rows = evaluate(folder, arc)
    for reading in ("forward", "backward"):
        [same] = [
            one
            for one in rows
            if (one["direction"], one["form"], one["control"], one["rule"]) == (reading, "cloze", None, "conditional")
        ]
        assert {name: found[reading][name] for name in ("accuracy", "interval", "chance", "n", "native")} == {
            name: same[name] for name in ("accuracy", "interval", "chance", "n", "native")
        }
        assert same["native"]


def test_the_sample_of_items_does_not_depend_on_their_order(arc: Path) -> None:
    items = read_one(TaskRequest("arc_easy", str(arc))).items["cloze"]
    some = sample(items, 5)
    assert {item.id for item in sample(items[::-1], 5)} == {item.id for item in some}
    assert [item.id for item in items if item in some] == [item.id for item in some]
    assert {item.id for item in sample(items, 3)} <= {item.id for item in some}


def test_rows_that_are_equal_have_ids_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0), row(1), row(0), row(0)])
    ids = [item.id for item in read_one(TaskRequest("arc_easy", str(path))).items["lettered"]]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]


def test_groups_of_mmlu_and_their_examples(tmp_path: Path) -> None:
    def question(n: int, subject: str) -> dict[str, Any]:
        return {"question": f"Q{n}", "subject": subject, "choices": ["w", "x", "y", "z"], "answer": n % 4}

    write(tmp_path / "all", [question(n, "law" if n < 5 else "art") for n in range(8)])
    write(tmp_path / "all", [question(n + 10, "art") for n in range(2)], "dev.jsonl")
    task = read_one(TaskRequest("mmlu", str(tmp_path)))
    shots = {item.group: [shot.stem[10:13] for shot in item.shots] for item in task.items["lettered"]}
    assert shots == {"law": [], "art": ["Q10", "Q11"]}
    assert len(read_one(TaskRequest("mmlu:law", str(tmp_path))).items["cloze"]) == 5
    from_test = read_one(TaskRequest("mmlu:law", str(tmp_path / "all" / "test.jsonl"), shots=2)).items["cloze"]
    assert [[shot.stem[10:12] for shot in item.shots] for item in from_test] == [
        ["Q1", "Q2"], ["Q0", "Q2"], ["Q0", "Q1"], ["Q0", "Q1"], ["Q0", "Q1"]
    ]  # fmt: skip


# ---- the command ----


def test_the_command_prints_a_table_and_items(new_family: NewFamily, arc: Path, shell: Shell) -> None:
    folder = new_family("bidirectional")
    storage = ["--storage", str(folder.path.parent)]
    answer = shell(
        "eval", folder.id, "--tasks", "arc_easy", "--show", "1", "--set", f"tasks.arc_easy.path={arc}", *storage
    )
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0] == "bidirectional, step 12: arc_easy, 12 items, chance 33.3%"
    for heading in ("form", "direction", "rule", "accuracy", "95 %", "shuffled", "no context", "prior"):
        assert heading in lines[1]
    assert len([line for line in lines if line.split()[:1] in (["cloze"], ["lettered"])]) == 14
    assert "read as: <|bos|><|backward|>" in answer.out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, answerKey="D")], "test.jsonl: line 1: answerKey: must be one of 1, 2, 3 (found 'D')"),
        ([row(0), row(1, choices={"text": ["a"], "label": ["A"]}, answerKey="A")], "line 2: choices: must be 2 to 26"),
        ([{"question": "Q", "answerKey": "A"}], "test.jsonl: line 1: no field 'choices'"),
        ([row(0, question=None)], "line 1: question: must be a string (found nothing)"),
        ([], "test.jsonl: no rows: name a file that holds some"),
    ],
)
def test_wrong_rows_are_named(
    new_family: NewFamily, tmp_path: Path, shell: Shell, rows: list[dict[str, Any]], message: str
) -> None:
    folder, path = new_family("forward"), write(tmp_path / "wrong", rows)
    answer = shell(
        "eval", folder.id, "--tasks", "arc_easy", "--set", f"tasks.arc_easy.path={path}", "--storage", str(tmp_path)
    )
    check_mistake(answer, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_esy"], "--tasks: 'arc_esy' is not a task with a test split (did you mean 'arc_easy'?)"),
        (["--tasks", "mmlu:latin", "--set", "tasks.mmlu.path={arc}"], "line 1: choices: must be a list of strings"),
        (
            ["--tasks", "arc_easy:latin", "--set", "tasks.arc_easy.path={arc}"],
            "--tasks: arc_easy:latin: no group 'latin'",
        ),
        (["--tasks", "arc_easy", "--set", "tasks.mmlu.path=x"], "--set tasks.mmlu.path: mmlu is not among --tasks"),
        (["--tasks", "arc_easy", "--set", "model.head_dim=8"], "only the files of a task can be set here"),
        (["--tasks", " , "], "names no task"),
        (
            ["--tasks", "arc_easy", "--set", "tasks.arc_easy.path=gone"],
            "gone does not exist",
        ),
        (["--tasks", "arc_easy", "--max-examples", "0"], "must be at least 1"),
    ],
)
def test_mistakes_of_the_command_are_named(
    new_family: NewFamily, arc: Path, shell: Shell, arguments: list[str], message: str
) -> None:
    folder = new_family("forward")
    filled = [word.replace("{arc}", str(arc)) for word in arguments]
    answer = shell("eval", folder.id, *filled, "--storage", str(folder.path.parent))
    assert answer.code == 2
    assert message in answer.err


def test_a_training_folder_without_a_test_file_is_refused(new_family: NewFamily, tmp_path: Path, shell: Shell) -> None:
    folder = new_family("forward")
    for name in ("train.jsonl", "validation.jsonl"):
        write(tmp_path / "no_test", [row(0)], name)
    answer = shell(
        "eval", folder.id, "--tasks", "arc_easy", "--set", f"tasks.arc_easy.path={tmp_path / 'no_test'}",
        "--storage", str(folder.path.parent),
    )  # fmt: skip
    check_mistake(answer, "no test file")


def test_scores_go_to_mlflow_and_a_run_without_one_is_said_once(new_family: NewFamily, arc: Path, shell: Shell) -> None:
    tracked, alone = new_family("forward"), new_family("backward")
    storage = tracked.path.parent
    store = Tracking(tracking_uri(storage, None), storage)
    run = store.child_run(tracked, None, {"name": "c", "digest": "0" * 8, "source": "s"})
    scores = evaluate(tracked, arc)
    evaluate(alone, arc)
    for last in (tracked.id, alone.id):
        command = ("eval", last, "--tasks", "arc_easy", "--set", f"tasks.arc_easy.path={arc}")
        answer = shell(*command, "--storage", str(storage))
        assert answer.code == 0
        lonely = "tracking: backward has no MLflow run: the scores are in the run's folder only\n"
        assert answer.err.count("MLflow run") == (last == alone.id)
        assert (lonely in answer.err) == (last == alone.id)
    [point] = MlflowClient(store.uri).get_metric_history(run, "tasks/arc_easy/conditional_forward")
    key = ("cloze", None, "forward", "conditional")
    [mine] = [s for s in scores if (s["form"], s["control"], s["direction"], s["rule"]) == key]
    assert (point.step, point.value) == (mine["step"], mine["accuracy"])


def test_a_run_that_failed_is_still_failed_after_its_checkpoint_is_scored(new_family: NewFamily, arc: Path) -> None:
    folder = new_family("forward")
    failed = Status("failed", "loss nan at step 9", 9)
    folder.write_status(failed)
    [step, *_] = checkpoint_steps(folder.checkpoints)
    assert RunEvaluation(folder.path.parent, f"{folder.id}@{step}", (TaskRequest("arc_easy", str(arc)),)).scores()
    assert folder.status() == failed
