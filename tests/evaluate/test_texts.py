"""`bwlm eval`: texts cost a model what its own validation said, in both readings, and nobody else's model is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bwlm.evaluate.texts import TextLoss, evaluate_texts
from bwlm.paths import read_json
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import read_journal
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.trained.load import load_model
from tests.runs import STEPS, NewChild, NewFamily, NewRun, in_process
from tests.shell import Shell, check_mistake
from tests.shell import shell as shell
from tests.train.test_phases import trained, validation_of

BOTH = ("forward", "backward")


def finish(folder: ExperimentFolder) -> ExperimentFolder:
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    return folder


def evaluated(folder: ExperimentFolder, task: str) -> dict[str, TextLoss]:
    """By reading; of the run's own corpus."""
    loaded = load_model(folder.path.parent, folder.id)
    found = evaluate_texts(loaded, {task: folder.config().corpus}, BOTH, folder)
    assert [(one.id, one.task, one.direction) for one in found] == [(folder.id, task, reading) for reading in BOTH]
    return {one.direction: one for one in found}


def test_documents_see_each_other_where_they_did_in_training(new_run: NewRun) -> None:
    """`bwlm eval` uses the run's own setting, so that its figure is that of the run's validation."""
    found = {}
    for masked in (False, True):
        folder = finish(new_run(f"masked_{masked}", model__document_mask=masked, lr=4.0))
        found[masked] = evaluated(folder, "documents")["forward"].bpb
        assert found[masked] == pytest.approx(folder.status().metrics["val_bpb_forward"], rel=1e-5)
    assert abs(found[True] - found[False]) > 1e-3


@pytest.mark.parametrize("direction", [*BOTH, "bidirectional"])
def test_documents_cost_what_the_validation_of_their_run_said(new_family: NewFamily, direction: str) -> None:
    folder = new_family(direction)
    known, found = folder.status().metrics, evaluated(folder, "documents")
    for reading, one in found.items():
        native = direction in (reading, "bidirectional")
        assert one.native == native
        assert one.bpb == pytest.approx(known[f"val_bpb_{reading}"], rel=1e-5)
        path = folder.evaluation("base", reading)
        segments = pq.read_table(path / "documents.parquet").to_pandas()
        assert segments["nll"].sum() / segments["tokens"].sum() == pytest.approx(one.loss, rel=1e-6)
        assert (segments["tokens"].sum(), segments["bytes"].sum()) == (one.tokens, one.bytes)
        assert read_json(path / "documents.json")["bpb"] == one.bpb
    if direction != "bidirectional":
        other = BOTH[direction == "forward"]
        assert found[other].bpb > found[direction].bpb + 0.2


@pytest.mark.parametrize("reversal", ["whole", "turns"])
def test_conversations_cost_what_sft_said(new_family: NewFamily, new_child: NewChild, reversal: str) -> None:
    """All of their text, laid out as the run was trained on it, each alone in its row."""
    sft = finish(new_child(new_family("backward"), "sft", data__reversal=reversal))
    known = sft.status().metrics
    for reading, one in evaluated(sft, "conversations").items():
        assert one.bpb == pytest.approx(known[f"val_bpb_{reading}"], rel=1e-5)
        assert one.native == (reading == "backward")


def test_conversations_are_alone_in_their_rows_for_any_model(new_run: NewRun, new_child: NewChild) -> None:
    """Also for one that was trained on documents that see each other: as SFT's validation sees its weights."""
    base = finish(new_run("crossing", model__document_mask=False, lr=4.0))
    sft = new_child(base, "sft")
    validation, model = validation_of(sft), trained(base)
    expected = validation.metrics(validation.measure(model))["val_bpb_forward"]
    loaded = load_model(base.path.parent, base.id)
    assert not loaded.config.experiment.model.document_mask
    [found] = evaluate_texts(loaded, {"conversations": sft.config().corpus}, ("forward",), base)
    assert found.bpb == pytest.approx(expected, rel=1e-5)


def test_the_command_evaluates_a_run_of_any_phase_on_its_mixture_and_its_bases_documents(
    shell: Shell, new_family: NewFamily, new_child: NewChild
) -> None:
    """Also as a phase, and in one direction alone."""
    sft = finish(new_child(new_family("forward"), "sft"))
    rl = finish(new_child(sft, "rl"))
    storage = ("--storage", str(rl.path.parent))
    answer = shell("eval", rl.id, "--json", *storage)
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)
    assert [(row["task"], row["direction"], row["native"]) for row in rows] == [
        (task, reading, reading == "forward") for task in ("documents", "conversations") for reading in BOTH
    ]
    conversations = {row["direction"]: row["bpb"] for row in rows if row["task"] == "conversations"}
    for reading, bpb in conversations.items():
        assert bpb == pytest.approx(rl.status().metrics[f"val_bpb_{reading}"], rel=1e-5)
    again = shell("train", "--phase", "eval", "--parent", rl.id, "--json", *storage)
    assert (again.code, json.loads(again.out)) == (0, rows)
    shown = shell("eval", rl.id, "--directions", "backward", *storage)
    assert shown.code == 0
    assert f"{conversations['backward']:.4f}" in shown.out
    assert f"{conversations['forward']:.4f}" not in shown.out


def test_the_command_evaluates_a_named_checkpoint_beside_the_last(
    shell: Shell, new_family: NewFamily, new_child: NewChild
) -> None:
    sft = finish(new_child(new_family("forward"), "sft", evaluation__every=4, checkpoint__keep_best=True))
    storage = ("--storage", str(sft.path.parent), "--directions", "forward")
    last = shell.json("eval", sft.id, *storage)
    kept = {path.name: path.read_bytes() for path in sft.evaluation("sft", "forward").iterdir()}
    early = shell.json("eval", f"{sft.id}@4", *storage)
    assert {row["step"] for row in last} == {STEPS}
    assert {row["step"] for row in early} == {4}
    talks = early[1]
    at_step_4 = next(entry for entry in read_journal(sft.path) if entry.step == 4)
    assert (talks["task"], talks["bpb"]) == ("conversations", pytest.approx(at_step_4.metrics["val_bpb_forward"]))
    files = {path.name: path for path in sft.evaluation("sft", "forward").iterdir()}
    assert {name: files[name].read_bytes() for name in kept} == kept, "the last checkpoint's figures stay"
    assert read_json(files["conversations@4.json"])["bpb"] == talks["bpb"]
    assert sft.damage() == []
    assert shell.json("eval", f"{sft.id}@best", *storage)[1]["step"] == CheckpointName(sft.id, "best").step_in(sft)
    assert f"{sft.id}, step 4" in shell("eval", f"{sft.id}@4", *storage).out


def test_a_permuted_model_is_evaluated_in_its_own_order_too(shell: Shell, new_family: NewFamily) -> None:
    """On documents: no conversation has that order."""
    folder = new_family("permuted")
    rows = shell.json("eval", folder.id, "--storage", str(folder.path.parent))
    assert [(row["direction"], row["native"]) for row in rows if row["task"] == "documents"] == [
        ("forward", False), ("backward", False), ("permuted", True)
    ]  # fmt: skip
    assert rows[2]["bpb"] == pytest.approx(folder.status().metrics["val_bpb"], rel=1e-5)
    assert [row["direction"] for row in rows if row["task"] == "conversations"] == [*BOTH]


def test_mistakes_are_told_in_one_line(shell: Shell, new_family: NewFamily, tmp_path: Path) -> None:
    storage = ("--storage", str(tmp_path))
    folder = new_family("forward")
    check_mistake(shell("eval", "forwrd", *storage), "forwrd: no such experiment or grid in")
    told = "--directions: 'backwards' is not one of forward, backward, permuted (did you mean 'backward'?)"
    check_mistake(shell("eval", "forward", "--directions", "backwards", *storage), told)
    check_mistake(shell("train", "--phase", "eval", *storage), "--parent: missing: name the run to evaluate")
    check_mistake(shell("eval", "forward@5", *storage), "no checkpoint of step 5: choose from 4, 8, 12")
    folder.write_status(Status("stopped", "", 3))
    check_mistake(shell("eval", "forward", *storage), "forward is stopped, not finished")
    assert not list(folder.path.glob("evaluations/*/*/documents*"))
