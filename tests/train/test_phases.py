"""Phases that begin from a parent, alone in this process: the weights, the targets and the figures that they have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from bwlm.directions import READINGS
from bwlm.evaluate import generation
from bwlm.evaluate.windows import LossEvaluation
from bwlm.model.gpt import GPT
from bwlm.model.loss import Losses
from bwlm.paths import read_json
from bwlm.record.checkpoint import load_newest, load_weights
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from bwlm.record.metrics import METRICS
from bwlm.text.batches import Batch, DirectedPlan, open_rows
from bwlm.text.conversation import TurnIds, TurnLayout, read_back
from bwlm.text.direction import IGNORED, SpecialIds
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import Tokenizer
from bwlm.train.packed_phase import build_model, turn_layout
from bwlm.train.rollouts import Rollouts
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.train.validation import Validation
from tests.runs import STEPS, NewChild, NewFamily, NewRun, in_process, losses, weights_digest
from tests.train.test_base import Killed, killed_at
from tests.train.test_worlds import train as train_in_processes

DIRECTIONS = ("forward", "backward", "bidirectional")
REVERSALS = ("whole", "turns")
BATCH = ("inputs", "targets", "segments")


def finish(folder: ExperimentFolder) -> dict[str, float]:
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "finished", status.reason
    return status.metrics


def trained(folder: ExperimentFolder) -> GPT:
    """The model that a finished run ended with."""
    config = folder.config()
    model = build_model(config, torch.device("cpu"))
    model.load_state_dict(load_weights(folder.checkpoints, config.steps)[0])
    return model


def validation_of(folder: ExperimentFolder) -> Validation:
    config = folder.config()
    return Validation.from_config(config, torch.device("cpu"), turn_layout(config, config.experiment.phase != "mid"))


class Spy:
    """Streams a run's batches, and keeps them with their plan."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
        self.plan = plan
        for step in range(first, last):
            self.batches.append(plan.batch(step))
            yield self.batches[-1]


# ---- they learn, from where their parent ended ----


@pytest.mark.parametrize("reversal", REVERSALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mid_then_sft_learn_what_their_parents_did_not_know(
    new_family: NewFamily, new_child: NewChild, direction: str, reversal: str
) -> None:
    """Each phase has records of its own, and the reversal of conversations comes down from mid to SFT unasked."""
    base = new_family(direction)
    mid = new_child(base, "mid", data__reversal=reversal)
    before = validation_of(mid)
    unknown = before.metrics(before.measure(trained(base)))["val_bpb"]
    assert finish(mid)["val_bpb"] < unknown - 1
    sft = new_child(mid, "sft", optim={"init_lr_frac": 0.03})
    assert sft.config().experiment.data.reversal == reversal
    parents = validation_of(sft).metrics(validation_of(sft).measure(trained(mid)))
    assert finish(sft)["val_loss_written"] < parents["val_loss_written"]
    for folder in (mid, sft):
        phase = folder.config().experiment.phase
        assert [entry.step for entry in read_journal(folder.path)] == list(range(1, STEPS + 1))
        assert load_newest(folder.checkpoints).meta["reversal"] == reversal  # type: ignore[union-attr]
        assert sorted(path.name for path in folder.evaluation(phase, "").iterdir()) == sorted(
            {"forward", "backward"}
            | ({"forward_marked_backward", "backward_marked_forward"} if direction == "bidirectional" else set())
        )


def test_every_phase_has_a_research_log_of_its_own(new_family: NewFamily, new_child: NewChild) -> None:
    """Losses, tokens, gradients and validation of mid, SFT and RL are kept as those of base are."""
    every = {"tokens": 4, "gradients": 6, "activations": 6}
    mid = new_child(new_family("backward"), "mid", research_log=every)
    finish(mid)
    sft = new_child(mid, "sft", research_log=every)
    finish(sft)
    rl = new_child(sft, "rl", research_log=every)
    finish(rl)
    for folder, phase in ((mid, "mid"), (sft, "sft"), (rl, "rl")):
        with h5py.File(folder.research_log(phase)) as log:
            assert log["train/step"][:].tolist() == list(range(1, STEPS + 1))
            assert np.allclose(log["train/loss"][:], losses(folder), rtol=1e-3, atol=1e-4)
            for group, steps in (("tokens", [4, 8, 12]), ("gradients", [6, 12]), ("validation", [5, 10, 12])):
                assert sorted(set(log[f"{group}/step"][:].tolist())) == steps, group
            target = log["tokens/target"][:]
            assert ((log["tokens/loss"][:] > 0) <= (target >= 0)).all()
            assert (target >= 0).any()
            assert log["tokens/row"].shape[0] == target.shape[0]
        measured = {name for entry in read_journal(folder.path) for name in entry.metrics}
        assert measured <= METRICS.keys(), "a metric without a name for MLflow"


@pytest.mark.parametrize("phase", ["mid", "sft"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_child_begins_with_its_parents_weights_to_the_last_bit(
    new_family: NewFamily, new_child: NewChild, direction: str, phase: str
) -> None:
    base = new_family(direction)
    child, spy = new_child(base, phase), Spy()
    assert run_phase(child, LocalSession(), spy).state == "finished"
    inputs, targets, segments = (torch.from_numpy(spy.batches[0][name]).long() for name in BATCH)
    seen = segments if child.config().experiment.model.document_mask else None
    own, fresh = (
        float(model.loss(inputs, targets, seen).total.detach() / (targets >= 0).sum())
        for model in (trained(base), build_model(child.config(), torch.device("cpu")))
    )
    assert losses(child)[0] == own != fresh


def test_a_child_that_goes_on_takes_its_own_weights_and_not_its_parents(
    new_family: NewFamily, new_child: NewChild
) -> None:
    """Also where the parent is gone by then."""
    base = new_family("forward")
    child = new_child(base, "mid")
    with pytest.raises(Killed):
        run_phase(child, LocalSession(), killed_at(6))
    base.path.rename(base.path.with_name("elsewhere"))
    finish(child)
    assert len(losses(child)) == STEPS


# ---- killed and taken up ----


@pytest.mark.parametrize(
    ("phase", "direction", "kill"),
    [("mid", "backward", 2), ("mid", "bidirectional", 6), ("sft", "bidirectional", 6), ("sft", "backward", 11)],
)
def test_a_child_that_was_killed_ends_as_the_calm_one_to_the_last_bit(
    new_family: NewFamily, new_child: NewChild, phase: str, direction: str, kill: int
) -> None:
    """Resuming is exact in every phase: the same rows in the same readings, from where it was."""
    base = new_family(direction)
    calm, cut = (new_child(base, phase, name) for name in ("calm", "cut"))
    finish(calm)
    with pytest.raises(Killed):
        run_phase(cut, LocalSession(), killed_at(kill))
    finish(cut)
    assert losses(cut) == losses(calm)
    assert weights_digest(cut) == weights_digest(calm)
    assert untimed(cut) == untimed(calm)


@pytest.mark.parametrize(("direction", "kill"), [("backward", 2), ("bidirectional", 6), ("forward", 11)])
def test_rl_that_was_killed_ends_as_the_calm_one_to_the_last_bit(
    new_family: NewFamily, new_child: NewChild, monkeypatch: pytest.MonkeyPatch, direction: str, kill: int
) -> None:
    """What it samples after a resume is what the calm run samples, though each sample is drawn."""
    sft = new_child(new_family(direction), "sft")
    finish(sft)
    calm, cut = (new_child(sft, "rl", name) for name in ("calm", "cut"))
    with monkeypatch.context() as patched:
        give_something_to_learn(patched)
        finish(calm)
        die_at(patched, kill)
        with pytest.raises(Killed):
            run_phase(cut, LocalSession(), in_process)
    give_something_to_learn(monkeypatch)
    finish(cut)
    assert sum(loss != 0 for loss in losses(calm)) > 2
    assert losses(cut) == losses(calm)
    assert weights_digest(cut) == weights_digest(calm)
    assert untimed(cut) == untimed(calm)


def give_something_to_learn(patched: pytest.MonkeyPatch) -> None:
    """A reward that a model earns that knows nothing yet: the share of its characters with an even code."""
    from tasks.arithmetic import Arithmetic

    def reward(self: Arithmetic, written: str, conversation: Any, writes: str) -> float:
        return sum(ord(character) % 2 == 0 for character in written) / (1 + len(written))

    patched.setattr(Arithmetic, "reward", reward)
    generate = generation.generate

    def always_finished(
        model: Any, prompts: Any, new_tokens: int, *, stop: set[int], **options: Any
    ) -> list[list[int]]:
        [end] = stop
        written = generate(model, prompts, new_tokens, stop=stop, **options)
        return [[*ids[: 5 - (ids[-1:] == [end])], end] for ids in written]

    patched.setattr(generation, "generate", always_finished)


def die_at(patched: pytest.MonkeyPatch, step: int) -> None:
    batch = Rollouts.batch

    def deadly(rollouts: Rollouts, model: Any, now: int, *rank: int) -> Batch:
        if now == step:
            raise Killed
        return batch(rollouts, model, now, *rank)

    patched.setattr(Rollouts, "batch", deadly)


def untimed(folder: ExperimentFolder) -> dict[str, float]:
    return {k: v for k, v in folder.status().metrics.items() if k != "tokens_per_second"}


# ---- several workers ----


def test_two_workers_train_sft_as_one(new_family: NewFamily, new_child: NewChild) -> None:
    base = new_family("bidirectional")
    one, two = (new_child(base, "sft", name, lr=0.5) for name in ("one", "two"))
    finish(one)
    train_in_processes(two, 2)
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert two.status().metrics["val_bpb"] == pytest.approx(one.status().metrics["val_bpb"], rel=1e-3)


# ---- what is a target ----


def written_in_order(ids: list[int], asking: bool, turns: TurnIds) -> list[bool]:
    """Which ids of a conversation, as the model reads it, it must write: from the marker before to the one after."""
    begin, end = (turns.user_end, turns.user_start) if asking else (turns.assistant_start, turns.assistant_end)
    found, inside = [], False
    for token in ids:
        found.append(inside and (token == end or token not in vars(turns).values()))
        inside = token == begin or (inside and token not in vars(turns).values())
    return found


@pytest.mark.parametrize("reversal", REVERSALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sft_trains_on_what_its_direction_writes_and_on_nothing_else(
    new_family: NewFamily, new_child: NewChild, mixture_for: Callable[[str], Prepared], direction: str, reversal: str
) -> None:
    """A time-reversed model is taught the user's words, which it must write, given the answer that follows them.

    Worked out anew, from the ids as the model reads them.
    """
    folder, spy = new_child(new_family(direction), "sft", data__reversal=reversal), Spy()
    assert run_phase(folder, LocalSession(), spy).state == "finished"
    tokenizer = mixture_for("sft").tokenizer
    turns, special = TurnIds.from_tokenizer(tokenizer), SpecialIds.from_tokenizer(tokenizer)
    seen = dict.fromkeys(READINGS[:2], 0)
    for batch in spy.batches:
        for inputs, targets, segments in zip(*(batch[name] for name in BATCH), strict=True):
            assert not np.isin(targets, [special.bos, special.pad, special.forward, special.backward]).any()
            for segment in np.unique(segments):
                place = np.flatnonzero((segments == segment) & (inputs != special.pad))
                ids = inputs[place].tolist()
                assert ids[0] == special.bos
                reading = direction
                if direction == "bidirectional":  # each conversation says how it is read
                    reading = {special.forward: "forward", special.backward: "backward"}[ids[1]]
                seen[reading] += 1
                if place[-1] + 1 == len(inputs):  # its last target has no input behind it
                    ids.append(int(targets[-1]))
                asking = reading == "backward" and reversal == "whole"
                is_written = written_in_order(ids, asking, turns)[1:]
                wanted = np.where(is_written, ids[1:], IGNORED)
                assert targets[place[: len(wanted)]].tolist() == wanted.tolist()
                assert sum(is_written) > 0
    assert [reading for reading, count in seen.items() if count] == (
        list(READINGS[:2]) if direction == "bidirectional" else [direction]
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mid_trains_on_every_token_but_no_marker_of_direction(
    new_family: NewFamily, new_child: NewChild, mixture_for: Callable[[str], Prepared], direction: str
) -> None:
    folder, spy = new_child(new_family(direction), "mid"), Spy()
    assert run_phase(folder, LocalSession(), spy).state == "finished"
    special = SpecialIds.from_tokenizer(mixture_for("mid").tokenizer)
    for batch in spy.batches:
        after, targets = batch["inputs"][:, 1:], batch["targets"][:, :-1]
        assert not np.isin(batch["targets"], [special.pad, special.forward, special.backward]).any()
        ordinary = ~np.isin(after, [special.bos, special.pad, special.forward, special.backward])
        assert (targets[ordinary] == after[ordinary]).all()
        assert np.isin(targets[after == special.bos], [special.bos, IGNORED]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_at_every_step_all_directions_read_the_same_conversations(
    new_family: NewFamily, new_child: NewChild, mixture_for: Callable[[str], Prepared], direction: str
) -> None:
    """Window first, direction second: also of conversations, in both reversals."""
    tokenizer = mixture_for("sft").tokenizer
    folder = new_child(new_family(direction), "sft")
    rows = open_rows(folder.config().corpus, "train")
    spy = Spy()
    run_phase(folder, LocalSession(), spy)
    special = set(SpecialIds.from_tokenizer(tokenizer).__dict__.values())
    for step, batch in enumerate(spy.batches):
        taken = rows.take(*spy.plan.plan.at(step))
        owner = np.repeat(taken.row, taken.lengths)
        for row, (inputs, targets) in enumerate(zip(batch["inputs"], batch["targets"], strict=True)):
            given = sorted(taken.tokens[owner == row].tolist())
            read = [token for token in inputs.tolist() if token not in special]
            if len(read) < len(given):  # the last one is a target only
                read.append(int(targets[-1]))
            assert sorted(read) == given


# ---- what is measured ----


class Ascending:
    """Stands for a model: what an id costs is its own number, so that any mix-up of places shows."""

    def loss(self, inputs: Any, targets: Any, segments: Any = None, predict: bool = False) -> Losses:
        each = torch.where(targets >= 0, targets, 0).float()
        return Losses(each.sum(), each, targets)


def evaluation_of(folder: ExperimentFolder, reversal: str) -> tuple[LossEvaluation, Tokenizer]:
    config = folder.config()
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    layout = TurnLayout(TurnIds.from_tokenizer(tokenizer), reversal, supervised=False)  # type: ignore[arg-type]
    rows, special = open_rows(config.corpus, "validation"), SpecialIds.from_tokenizer(tokenizer)
    lengths = tokenizer.token_bytes().astype(np.int64)
    return LossEvaluation(rows, special, lengths, 10**6, 3, torch.device("cpu"), False, layout), tokenizer


@pytest.mark.parametrize("reversal", REVERSALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_conversations_are_scored_by_their_text_alone_and_by_the_same_in_every_direction(
    new_family: NewFamily, new_child: NewChild, direction: str, reversal: str
) -> None:
    folder = new_child(new_family(direction), "sft", data__reversal=reversal)
    evaluation, tokenizer = evaluation_of(folder, reversal)
    rows = evaluation.rows.take(np.arange(len(evaluation.rows)))
    text = rows.tokens[rows.tokens < tokenizer.bos]
    assert 0 < len(text) < len(rows.tokens)
    for reading in READINGS[:2]:
        segments, tokens = evaluation.measure(Ascending(), reading, direction == "bidirectional")  # type: ignore[arg-type]
        assert tokens.nll.tolist() == text.tolist()  # in reading order, whatever the model read
        assert segments.tokens.sum() == len(text)
        assert segments.bytes.tolist() == [
            sum(len(message.content.encode()) for message in read_back(ids, tokenizer) or [])
            for ids in np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])
        ]
        assert segments.nll.sum() == text.sum()
        mask = evaluation.loss_mask(reading, reversal, TurnIds.from_tokenizer(tokenizer))  # type: ignore[arg-type]
        role = "user" if reading == "backward" and reversal == "whole" else "assistant"
        wanted = [
            token
            for ids in np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])
            for message in read_back(ids, tokenizer) or []
            if message.role == role
            for token in tokenizer.encode(message.content).tolist()
        ]
        assert tokens.nll[mask].tolist() == wanted


def test_documents_have_as_many_tokens_and_bytes_in_every_direction(new_family: NewFamily, new_child: NewChild) -> None:
    """So that a difference between two directions is paired, document by document."""
    found = []
    for direction in DIRECTIONS:
        folder = new_child(new_family(direction), "sft", f"{direction}-sft")
        finish(folder)
        for reading in READINGS[:2]:
            table = pd.read_parquet(folder.evaluation("sft", reading) / "validation.parquet")
            assert (table["tokens"] > 0).all()
            found.append(table[["window", "segment", "document", "tokens", "bytes"]])
            summary = json.loads((folder.evaluation("sft", reading) / "validation.json").read_text())
            assert summary["tokens"] == table["tokens"].sum()
            assert summary["bpb"] == pytest.approx(table["nll"].sum() / np.log(2) / table["bytes"].sum())
    assert all(other.equals(found[0]) for other in found[1:])


def test_the_figure_of_what_is_written_is_that_of_the_own_readings(new_family: NewFamily, new_child: NewChild) -> None:
    folder = new_child(new_family("bidirectional"), "sft")
    figures, validation = finish(folder), validation_of(folder)
    measured = validation.measure(trained(folder))
    turns, parts = TurnIds.from_tokenizer(Tokenizer.load(Path(folder.config().tokenizer))), []
    for reading in READINGS[:2]:
        mask = validation.evaluation.loss_mask(reading, "whole", turns)
        parts.append(measured[reading][1].nll[mask].mean())
    assert figures["val_loss_written"] == pytest.approx(np.mean(parts), rel=1e-5)
    assert all(measured[reading][1].nll.min() > 0 for reading in READINGS[:2])  # what is not written is measured too
    assert figures["val_bpb"] == pytest.approx((figures["val_bpb_forward"] + figures["val_bpb_backward"]) / 2)


# ---- what a child may not begin from ----


def test_a_child_of_a_run_that_is_gone_fails_in_words_and_can_be_mended(
    new_family: NewFamily, new_child: NewChild
) -> None:
    base = new_family("forward")
    child = new_child(base, "sft")
    base.path.rename(base.path.with_name("elsewhere"))
    status = run_phase(child, LocalSession(), in_process)
    assert status.state == "failed"
    assert status.reason.startswith("forward-sft: its parent's checkpoint is gone or damaged: ")
    assert "\n" not in status.reason
    base.path.with_name("elsewhere").rename(base.path)
    with child.lease():
        finish(child)


def test_a_child_remembers_its_parent_and_the_chain_to_its_base(new_family: NewFamily, new_child: NewChild) -> None:
    mid = new_child(new_family("backward"), "mid", "m")
    finish(mid)
    sft = new_child(mid, "sft", "s")
    link = read_json(sft.path / "parent_link.json")
    assert (link["parent"], link["phase"], link["checkpoint"]) == ("m", "mid", "step_000012")
    assert link["chain"] == ["backward", "m"]
    assert sft.config().experiment.direction == "backward"
    assert sft.config().identity["parent"] == link["sha256"]


def test_a_base_run_is_as_it_was(new_run: NewRun) -> None:
    """It has no parent, and begins with what its seed says."""
    folder = new_run()
    assert folder.link() is None
    finish(folder)
    assert not {"parent", "reversal"} & folder.config().identity.keys()
