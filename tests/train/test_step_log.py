"""What a run leaves in its research log is what happened, on every rank, also when it was killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bwlm.directions import is_marked, own_readings
from bwlm.evaluate.states import ActivationProbe
from bwlm.model.gpt import GPT
from bwlm.model.observe import activation_statistics
from bwlm.record.checkpoint import load_checkpoint
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import read_journal
from bwlm.record.researchlog import ResearchLog, open_log
from bwlm.text.batches import Batch, DirectedPlan, open_rows
from bwlm.text.direction import SpecialIds
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared
from bwlm.train.packed_phase import build_model, rows_per_step
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.train.validation import Validation
from tests.runs import STEPS, NewRun, in_process, losses, weights_digest
from tests.train.test_base import Killed, killed_at
from tests.train.test_worlds import train

OFTEN = {"tokens": 3, "gradients": 4, "activations": 5}
ALWAYS = {"tokens": 1, "gradients": 1, "activations": 1}
NEVER = {
    "scalars": 0, "tokens": 0, "gradients": 0, "activations": 0,
    "validation": False, "attention": False, "representations": 0,
}  # fmt: skip
SAVED = {"every": 2, "keep": 9}
TIMED = {"train/tokens_per_second", "train/mfu", "train/step_seconds", "train/memory_bytes"}
"""What differs between two runs of the same"""

Datasets = dict[str, NDArray[Any]]


def logged(folder: ExperimentFolder) -> Datasets:
    """Every dataset by its name, read with plain h5py."""
    with h5py.File(folder.research_log("base")) as file:
        return {f"{group}/{name}": dataset[()] for group in file for name, dataset in file[group].items()}


def run(folder: ExperimentFolder) -> Datasets:
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    return logged(folder)


def check_equal(one: Datasets, other: Datasets, but: set[str] = TIMED) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - but:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def batch_of(folder: ExperimentFolder, step: int) -> tuple[Batch, NDArray[np.int64]]:
    """What a step reads, counted from 1, and its rows."""
    config = folder.config()
    rows = RowPlan(len(open_rows(config.corpus, "train")), rows_per_step(config), config.experiment.seed)
    special = Validation.from_config(config, torch.device("cpu")).evaluation.special
    return DirectedPlan(config.corpus, config.experiment.direction, special, rows).batch(step - 1), rows.at(step - 1)[0]


def model_at(folder: ExperimentFolder, step: int) -> GPT:
    """The model after a step."""
    model = build_model(folder.config(), torch.device("cpu"))
    if step:
        model.load_state_dict(load_checkpoint(folder.checkpoints, step).model)
    return model


# ---- what is logged, and when ----


def steps_of(found: Datasets) -> dict[str, list[int]]:
    return {name.removesuffix("/step"): values.tolist() for name, values in found.items() if name.endswith("/step")}


def test_each_group_is_logged_at_its_steps(new_run: NewRun) -> None:
    evaluations = [5, 10, 12]
    assert steps_of(run(new_run(research_log={"scalars": 2, **OFTEN}))) == {
        "train": [2, 4, 6, 8, 10, 12], "tokens": [3, 6, 9, 12], "gradients": [4, 8, 12], "activations": [5, 10],
        "attention": evaluations, "representations": evaluations, "validation": evaluations,
    }  # fmt: skip
    assert steps_of(run(new_run("never", research_log=NEVER))) == {}
    assert steps_of(run(new_run("default"))) == {
        "train": list(range(1, 13)), "tokens": [10],
        "attention": evaluations, "representations": evaluations, "validation": evaluations,
    }  # fmt: skip


def test_the_file_says_whose_it_is(new_run: NewRun) -> None:
    folder = new_run("mine", direction="backward", seed=7)
    run(folder)
    with h5py.File(folder.research_log("base")) as file:
        expected = {
            "experiment": "mine", "phase": "base", "direction": "backward", "depth": 1, "lr": 1.0, "seed": 7,
            "fingerprint": folder.config().fingerprint,
        }  # fmt: skip
        assert expected.items() <= dict(file.attrs).items()


def test_scalars_are_the_journals(new_run: NewRun) -> None:
    folder = new_run(direction="bidirectional")
    found = run(folder)
    names = {"lr": "lr_multiplier", "loss": "train_loss", "loss_smooth": "train_loss_smooth"}
    names |= {f"loss_{reading}": f"train_loss_{reading}" for reading in ("forward", "backward")}
    columns = {name.removeprefix("train/") for name in found if name.startswith("train/")} - {"step"}
    assert {"loss_forward", "loss_backward", "grad_norm", "lr_matrix", "tokens", "flops"} <= columns
    assert np.isfinite(found["train/memory_bytes"]).all()
    last = dict[str, float]()  # memory is looked at once a second: the log has the last look, whatever its interval
    for index, entry in enumerate(read_journal(folder.path)):
        last |= entry.metrics
        for column in columns:
            value = last.get(names.get(column, column), np.nan)
            np.testing.assert_equal(float(found[f"train/{column}"][index]), float(value), err_msg=column)


@pytest.mark.parametrize("direction", ["forward", "backward", "bidirectional"])
@pytest.mark.parametrize("compute", [{"device_batch_size": 3}, {"fused_loss": False}], ids=["fused", "plain"])
def test_tokens_are_those_of_the_batch_and_what_the_model_made_of_them(
    new_run: NewRun, direction: str, compute: dict[str, Any]
) -> None:
    """Also with passes of three rows and two; the model of a checkpoint is the one that the next step asks."""
    masked = direction == "backward"
    folder = new_run(
        direction=direction, lr=4.0, checkpoint=SAVED, research_log=OFTEN, compute=compute, model__document_mask=masked
    )
    found = run(folder)
    assert found["tokens/input"].dtype == np.int16
    for index, step in enumerate((3, 6, 9, 12)):
        batch, rows = batch_of(folder, step)
        assert found["tokens/row"][index].tolist() == rows.tolist()
        assert found["tokens/rank"][index].tolist() == [0] * len(rows)
        assert np.array_equal(found["tokens/input"][index], batch["inputs"])
        assert np.array_equal(found["tokens/target"][index], batch["targets"])
        if step % 2:
            inputs, targets, segments = (torch.from_numpy(values).long() for values in batch.values())
            with torch.no_grad():
                logits = model_at(folder, step - 1)(inputs, segments if masked else None)
            best = logits.topk(2).values
            clear = (best[..., 0] - best[..., 1] > 1e-4).numpy()
            assert clear.mean() > 0.99
            assert np.array_equal(found["tokens/predicted"][index][clear], logits.argmax(-1).numpy()[clear])
            costs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
            np.testing.assert_allclose(found["tokens/loss"][index].ravel(), costs.numpy(), rtol=2e-3, atol=2e-3)
            assert (found["tokens/loss"][index][batch["targets"] < 0] == 0).all()
        mean = found["tokens/loss"][index].astype(np.float64).sum() / (batch["targets"] >= 0).sum()
        assert mean == pytest.approx(losses(folder)[step - 1], rel=1e-3)


def test_gradients_make_the_norm_and_activations_are_the_models(new_run: NewRun) -> None:
    folder = new_run(lr=4.0, checkpoint=SAVED, research_log=OFTEN, compute={"device_batch_size": 3})
    found = run(folder)
    norms = {entry.step: entry.metrics["grad_norm"] for entry in read_journal(folder.path)}
    for index, step in enumerate((4, 8, 12)):
        assert np.linalg.norm(found["gradients/norm"][index]) == pytest.approx(norms[step], rel=1e-5)
    names = [name for name, _ in model_at(folder, 0).named_parameters()]
    assert [name.decode() for name in found["gradients/parameter"]] == names
    assert found["gradients/layer"].tolist() == [-1, *[0] * 6, 1]
    for index, step in enumerate((5, 10)):
        if step % 2:
            batch = batch_of(folder, step)[0]
            inputs, segments = (torch.from_numpy(batch[name]).long() for name in ("inputs", "segments"))
            for name, expected in activation_statistics(model_at(folder, step - 1), inputs, segments).items():
                np.testing.assert_allclose(found[f"activations/{name}"][index], expected.numpy(), rtol=1e-3, atol=1e-5)
    places = ["stream", "stream", "attention", "mlp", "hidden"]
    assert [place.decode() for place in found["activations/place"]] == places
    assert found["activations/layer"].tolist() == [-1, 0, 0, 0, 0]


# ---- validation ----


@pytest.mark.parametrize("direction", ["forward", "bidirectional", "permuted"])
def test_the_losses_of_tokens_add_up_to_those_of_segments(new_run: NewRun, direction: str) -> None:
    folder = new_run(direction=direction)
    found = run(folder)
    readings = [name.decode() for name in found["validation/reading"]]
    assert readings == ["forward", "backward", *(["permuted"] if direction == "permuted" else [])]
    for index, reading in enumerate(readings):
        saved = pq.read_table(folder.evaluation("base", reading) / "validation.parquet").to_pydict()
        costs = found["validation/loss"][-1, index].astype(np.float64)
        for segment, nll, tokens, size, document, window in zip(
            *(saved[name] for name in ("segment", "nll", "tokens", "bytes", "document", "window")), strict=True
        ):
            of_segment = found["validation/segment"] == segment
            assert of_segment.sum() == tokens
            assert costs[of_segment].sum() == pytest.approx(nll, rel=1e-5)
            assert found["validation/bytes"][of_segment].sum() == size
            assert set(found["validation/document"][of_segment]) <= {document}
            assert set(found["validation/window"][of_segment]) <= {window}
        assert len(costs) == sum(saved["tokens"])
    assert set(np.unique(found["validation/correct"])) == {0, 1}


@pytest.mark.parametrize(("direction", "masked"), [("backward", True), ("bidirectional", True), ("backward", False)])
def test_states_and_attention_are_the_models_in_its_own_readings(
    new_run: NewRun, prepared: Prepared, direction: str, masked: bool
) -> None:
    folder = new_run(direction=direction, research_log={"representations": 50}, model__document_mask=masked)
    found, config = run(folder), folder.config()
    evaluation = Validation.from_config(config, torch.device("cpu")).evaluation
    special = SpecialIds.from_tokenizer(prepared.tokenizer)
    view = ActivationProbe(evaluation.rows, evaluation.windows, special, 50, torch.device("cpu"), masked)
    model, own = model_at(folder, STEPS), own_readings(direction)
    for group in ("representations", "attention"):
        assert tuple(name.decode() for name in found[f"{group}/reading"]) == own
    assert found["representations/states"].shape[:3] == (3, len(own), 2)
    assert np.array_equal(found["representations/token"], view.tokens_of()["token"])
    for index, reading in enumerate(own):
        states = view.states(model, reading, is_marked(direction))
        assert np.array_equal(found["representations/states"][-1, index], states)
        for name, expected in vars(view.attention(model, reading, is_marked(direction))).items():
            np.testing.assert_allclose(found[f"attention/{name}"][-1, index], expected.numpy(), rtol=1e-3, atol=1e-6)


# ---- looking changes nothing ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"compute": {"fused_loss": False}}, {"direction": "bidirectional", "model__document_mask": False}],
    ids=["fused", "plain", "crossing"],
)
def test_a_run_is_the_same_to_the_last_bit_with_all_of_the_log_and_with_none(
    new_run: NewRun, settings: dict[str, Any]
) -> None:
    seen = new_run("seen", research_log=ALWAYS, evaluation={"every": 1, "tokens": 1024}, **settings)
    blind = new_run("blind", research_log=NEVER, evaluation={"every": 1, "tokens": 1024}, **settings)
    run(seen)
    run(blind)
    assert losses(seen) == losses(blind)
    assert weights_digest(seen) == weights_digest(blind)
    one, other = seen.status().metrics, blind.status().metrics
    assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}


# ---- kills ----


@pytest.mark.parametrize("kill", [2, 7, 11])
def test_a_run_that_goes_on_leaves_the_file_of_one_that_was_not_cut(new_run: NewRun, kill: int) -> None:
    calm, cut = new_run("calm", research_log=OFTEN), new_run("cut", research_log=OFTEN)
    expected = run(calm)
    with pytest.raises(Killed):
        run_phase(cut, LocalSession(), killed_at(kill))
    check_equal(run(cut), expected)


def test_two_ranks_killed_or_not_leave_the_file_of_one(new_run: NewRun) -> None:
    settings = {"checkpoint": SAVED, "research_log": OFTEN, "direction": "bidirectional"}
    alone, calm, cut = (new_run(name, **settings) for name in ("alone", "calm", "cut"))
    expected = run(alone)
    train(calm, 2)
    shared = logged(calm)
    train(cut, 2, deadly=STEPS // 2 + 1)
    with open_log(cut.research_log("base")) as file:
        reached = file["train/step"][:].tolist()
    assert reached in (list(range(1, STEPS // 2 + 1)), list(range(1, STEPS // 2 + 2)))
    train(cut, 2)
    check_equal(logged(cut), shared)

    assert shared["tokens/rank"].tolist() == [[0] * 4 + [1] * 4] * 4
    exact = {name for name in expected if expected[name].dtype.kind in "iOS"} - {
        "tokens/rank", "tokens/predicted", "validation/correct"
    }  # fmt: skip
    assert {"tokens/row", "tokens/input", "tokens/target", "validation/token", "train/step"} <= exact
    check_equal({n: shared[n] for n in exact}, {n: expected[n] for n in exact})
    close = expected.keys() - exact - TIMED - {"tokens/rank", "tokens/predicted", "validation/correct"}
    assert {"tokens/loss", "gradients/norm", "activations/rms", "validation/loss", "train/loss_forward"} <= close
    for name in close - {name for name in close if name.startswith("activations/")}:  # those are of rank 0's rows
        np.testing.assert_allclose(shared[name], expected[name], rtol=2e-2, atol=2e-2, err_msg=name)
    for name in ("tokens/predicted", "validation/correct"):
        assert (shared[name] == expected[name]).mean() > 0.98


# ---- what cannot be written ----


@pytest.mark.parametrize("method", ["__init__", "write", "merge"])
def test_a_log_that_cannot_be_written_fails_the_run_before_its_next_checkpoint(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calm, folder = new_run("calm"), new_run()
    run(calm)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ResearchLog, method, full)
        status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert f"{folder.research_log('base')}: cannot be written (No space left on device): free space" in status.reason
    assert not list(folder.checkpoints.glob("step_*"))
    folder.write_status(Status())
    check_equal(run(folder), logged(calm))


def test_a_log_that_another_process_writes_fails_the_run_by_name(new_run: NewRun) -> None:
    folder = new_run()
    with ResearchLog(folder.research_log("base")):
        status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "failed"
    assert "writes to it: wait for it, or end that process" in status.reason


def test_the_tail_is_gone_when_a_run_has_ended(new_run: NewRun) -> None:
    folder = new_run()
    run(folder)
    left: list[Path] = [path for path in folder.path.iterdir() if "h5" in path.name]
    assert left == [folder.research_log("base")]
