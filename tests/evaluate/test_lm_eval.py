"""lm-eval on our checkpoints: its own figures on the exported model, forward; our own rule, backward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bwlm.errors import UserError
from bwlm.evaluate.tasks.request import TaskRequest
from bwlm.evaluate.tasks.run import LoadedTask, evaluate_reading
from bwlm.record.experiment import ExperimentFolder
from bwlm.trained.export_hf import export_hf
from bwlm.trained.load import load_model
from tests.runs import NewFamily

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from bwlm.evaluate.lm_eval_adapter import BwlmLM  # noqa: E402

WORDS = ("sun", "salt sea", "sky", "ice", "oak tree")
TASK = {
    "task": "arc_local",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    path = tmp_path / "arc" / "test.jsonl"
    path.parent.mkdir()
    rows = []
    for n in range(15):
        texts = [WORDS[(n + k) % 5] for k in range(2 + n % 3)]
        labels = ["A", "B", "C", "D"][: len(texts)]
        rows.append({"question": f"Q{n}?", "choices": {"text": texts, "label": labels}, "answerKey": labels[n % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_lm_eval(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> tuple[float, list[list[float]]]:
    """Accuracy, and the log-likelihood of each choice of each item."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(cache)}}
    found = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["arc_local"], key=lambda sample: int(sample["doc_id"]))
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return float(found["results"]["arc_local"]["acc,none"]), scores


def read_one(request: TaskRequest) -> LoadedTask:
    [task] = LoadedTask.read(request)
    return task


def ours(folder: ExperimentFolder, path: Path, reading: str) -> tuple[float, list[list[float]]]:
    loaded = load_model(folder.path.parent, folder.id)
    task = read_one(TaskRequest("arc_easy", str(path)))
    evaluated = evaluate_reading(loaded, task, reading)
    rows = [
        row
        for row in evaluated.examples
        if (row["form"], row["control"], row["rule"]) == ("cloze", None, "conditional")
    ]
    return evaluated.scores[0].accuracy or 0.0, [row["scores"] for row in rows]


def test_forward_it_agrees_item_by_item_with_lm_evals_own_model_on_the_exported_weights(
    new_family: NewFamily, arc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_family("forward")
    export_hf(load_model(folder.path.parent, folder.id), tmp_path / "hf")
    own = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4, add_bos_token=True)
    adapter = BwlmLM(str(folder.path.parent), folder.id)
    results = [
        run_lm_eval(own, arc, monkeypatch, tmp_path / "cache"),
        run_lm_eval(adapter, arc, monkeypatch, tmp_path / "cache"),
        ours(folder, arc, "forward"),
    ]
    for accuracy, scores in results[1:]:
        assert accuracy == results[0][0]
        for mine, theirs in zip(scores, results[0][1], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_without_bos_lm_evals_own_model_gives_other_figures(
    new_family: NewFamily, arc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default for our tokenizer, which has no post-processor: docs/evaluation.md says what to set."""
    folder = new_family("forward")
    export_hf(load_model(folder.path.parent, folder.id), tmp_path / "hf")
    own = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    _, without = run_lm_eval(own, arc, monkeypatch, tmp_path / "cache")
    _, right = ours(folder, arc, "forward")
    assert max(abs(a - b) for one, other in zip(without, right, strict=True) for a, b in zip(one, other)) > 0.01  # noqa: B905


@pytest.mark.parametrize("direction", ["backward", "bidirectional"])
def test_backward_it_gives_the_rule_conditional(
    new_family: NewFamily, arc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    folder = new_family(direction)
    adapter = BwlmLM(str(folder.path.parent), folder.id, reading="backward")
    accuracy, scores = run_lm_eval(adapter, arc, monkeypatch, tmp_path / "cache")
    expected, own = ours(folder, arc, "backward")
    assert accuracy == expected
    for mine, theirs in zip(scores, own, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_bos_and_marker_stay_when_a_context_is_cut(new_family: NewFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_family("bidirectional")
    adapter = BwlmLM(str(folder.path.parent), folder.id, reading="forward")
    read: list[Any] = []
    from bwlm.evaluate import lm_eval_adapter

    original = lm_eval_adapter.score
    monkeypatch.setattr(lm_eval_adapter, "score", lambda model, rows: (read.extend(rows), original(model, rows))[1])
    adapter.loglikelihood([request("loglikelihood", "word " * 200, " end")])
    [row] = read
    tokenizer = adapter.loaded.tokenizer
    assert row.trunk == (tokenizer.bos, tokenizer.forward)
    assert len(row.trunk) + len(row.branches[0]) == adapter.loaded.model.config.sequence_length + 1
    assert tokenizer.decode(row.branches[0]).endswith("word  end")
    with pytest.raises(UserError, match=r"a continuation of .* tokens does not fit into a row of 63"):
        adapter.loglikelihood([request("loglikelihood", "a", " word" * 200)])


@pytest.mark.parametrize("reading", ["forward", "backward"])
def test_rolling_is_the_log_likelihood_of_the_whole_text(new_family: NewFamily, reading: str) -> None:
    folder = new_family("bidirectional")
    adapter = BwlmLM(str(folder.path.parent), folder.id, reading=reading)
    text = "some words of a text"
    joint = BwlmLM(str(folder.path.parent), folder.id, reading=reading, rule="joint")
    [whole] = adapter.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    [(parts, _)] = joint.loglikelihood([request("loglikelihood", "some words", " of a text")])
    assert whole == pytest.approx(parts, abs=1e-3)
    [twice, empty] = adapter.loglikelihood_rolling(
        [request("loglikelihood_rolling", " ".join([text] * 40)), request("loglikelihood_rolling", "")]
    )
    assert twice < 20 * whole  # every row begins with BOS, and all of it is scored
    assert empty == 0.0


def test_it_continues_a_text_forward_alone_and_up_to_a_stop(new_family: NewFamily) -> None:
    folder = new_family("forward")
    adapter = BwlmLM(str(folder.path.parent), folder.id)
    ask = request("generate_until", "some words", {"until": ["\n"], "max_gen_toks": 12})
    [text] = adapter.generate_until([ask])
    assert "\n" not in text
    [longer] = adapter.generate_until([request("generate_until", "some words", {"max_gen_toks": 12})])
    assert longer.startswith(text)
    backward = BwlmLM(str(folder.path.parent), folder.id, reading="backward")
    with pytest.raises(UserError, match="cannot continue a text"):
        backward.generate_until([ask])
    with pytest.raises(UserError, match="only greedy"):
        adapter.generate_until([request("generate_until", "a", {"do_sample": True})])


def test_wrong_arguments_are_named(new_family: NewFamily) -> None:
    folder = new_family("forward")
    for wrong, message in (({"reading": "backwards"}, "did you mean 'backward'"), ({"rule": "both"}, "rule: 'both'")):
        with pytest.raises(UserError, match=message):
            BwlmLM(str(folder.path.parent), folder.id, **wrong)
