"""RL alone in this process: what is sampled, what it earns, and what is learned from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bwlm.config import Experiment
from bwlm.directions import READINGS, own_readings
from bwlm.evaluate import generation as module
from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.train_step import TrainStep
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from bwlm.text.batches import Batch, open_rows
from bwlm.text.conversation import Message, TurnIds, build_prompt
from bwlm.text.direction import IGNORED
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import Tokenizer
from bwlm.train.packed_phase import build_model
from bwlm.train.rl import measure, rollouts_of
from bwlm.train.rollouts import Problem, Rollouts, load_problems
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tasks.arithmetic import parse
from tests.runs import STEPS, NewChild, NewFamily, in_process, losses
from tests.train.test_phases import give_something_to_learn
from tests.train.test_worlds import train as train_in_processes

NewRL = Callable[..., ExperimentFolder]
CASES = [
    (direction, reversal) for direction in ("forward", "backward", "bidirectional") for reversal in ("whole", "turns")
]


@pytest.fixture
def new_rl(new_family: NewFamily, new_child: NewChild) -> NewRL:
    """(direction, reversal, name, **settings) -> a run of RL that waits, on `builtin:arithmetic`."""

    def make(direction: str, reversal: str = "whole", name: str = "", **settings: Any) -> ExperimentFolder:
        sft = ExperimentFolder(new_family(direction).path.parent, f"{direction}-{reversal}-sft")
        if not sft.exists():
            sft = new_child(new_family(direction), "sft", sft.id, budget={"steps": 1}, data__reversal=reversal)
            assert run_phase(sft, LocalSession(), in_process).state == "finished"
        return new_child(sft, "rl", name, **settings)

    return make


def model_of(folder: ExperimentFolder, seed: int = 0, loss_chunk: int = 0) -> GPT:
    """One whose samples vary: weights of a seed, with a head that says something."""
    model = GPT(folder.config().shape, loss_chunk=loss_chunk)
    model.init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(500)  # type: ignore[operator]
    return model


def is_asking(reading: str, reversal: str) -> bool:
    return reading == "backward" and reversal == "whole"


def same(one: Batch, other: Batch) -> bool:
    timed = {"rollout_seconds"}
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one.keys() - timed)


# ---- what is sampled ----


@pytest.mark.parametrize("direction", ["backward", "bidirectional"])
def test_samples_depend_on_seed_step_and_weights_and_on_nothing_else(new_rl: NewRL, direction: str) -> None:
    folder = new_rl(direction)
    rollouts, model = rollouts_of(folder.config()), model_of(folder)
    torch.manual_seed(1)
    first = rollouts.batch(model, 3)
    torch.manual_seed(2)
    rollouts.batch(model, 1)
    assert same(rollouts_of(folder.config()).batch(model, 3), first)
    assert not same(rollouts.batch(model, 4), first)
    assert not same(rollouts.batch(model_of(folder, 1), 3), first)
    other = new_rl(direction, name="other", seed=1)
    assert not same(rollouts_of(other.config()).batch(model, 3), first)


def test_every_sample_has_random_numbers_of_its_own(new_rl: NewRL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its seed, step, reading and place: a problem that comes again is not answered by the same draws."""
    given: list[int] = []

    def note(model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> list[list[int]]:
        given.extend(options["seeds"])
        return [[5] for _ in prompts]

    monkeypatch.setattr(module, "generate", note)
    for seed in (0, 1):
        folder = new_rl("bidirectional", name=f"seed{seed}", seed=seed)
        rollouts = rollouts_of(folder.config())
        for step in range(3):
            rollouts.batch(model_of(folder), step)
    assert len(given) == len(set(given)) == 2 * 3 * 2 * 4


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_two_workers_write_what_one_writes(new_rl: NewRL, direction: str) -> None:
    """Rank after rank, reading by reading, with the random numbers of each sample's place in the whole batch."""
    folder = new_rl(direction, rl__prompts=4)
    rollouts, model = rollouts_of(folder.config()), model_of(folder)
    whole, ranks = rollouts.batch(model, 2), [rollouts.batch(model, 2, rank, 2) for rank in (0, 1)]
    for number in range(len(READINGS[:2])):
        for name in ("inputs", "targets", "importance", "reward", "sample_tokens", "finished"):
            parts = [batch[name][batch["reading"] == number] for batch in ranks]
            assert np.array_equal(np.concatenate(parts), whole[name][whole["reading"] == number]), name
    assert len(whole["inputs"]) == 4 * 4
    assert len(np.unique(whole["inputs"], axis=0)) > 8
    problems, _ = rollouts.plan.at(2)
    assert (
        rollouts.chosen(2, 0, 1).tolist()
        == np.concatenate(
            [np.repeat(problems, 4 // len(own_readings(direction))) for _ in own_readings(direction)]
        ).tolist()
    )


def test_two_workers_train_as_one_also_where_one_has_nothing_to_validate(new_rl: NewRL) -> None:
    """One validation problem, two workers: the figures are those of one worker."""
    settings = {"lr": 0.2, "budget": {"steps": 3, "batch_tokens": 512}, "checkpoint": {"every": 0}, "rl__validation": 1}
    one, two = (new_rl("bidirectional", "turns", name, **settings) for name in ("one", "two"))
    assert run_phase(one, LocalSession(), in_process).state == "finished"
    train_in_processes(two, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-5)
    alone, shared = one.status().metrics, two.status().metrics
    assert {name for name in shared if "reward" in name} == {"val_reward", "val_reward_forward", "val_reward_backward"}
    assert shared["val_reward"] == alone["val_reward"]
    assert shared["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-3)
    for one_entry, other in zip(*(read_journal(folder.path) for folder in (one, two)), strict=True):
        for name in ("reward", "sample_tokens", "finished", "reward_forward", "reward_backward"):
            assert other.metrics[name] == pytest.approx(one_entry.metrics[name]), name


def test_every_problem_comes_once_in_an_epoch(new_rl: NewRL) -> None:
    folder = new_rl("forward")
    rollouts = rollouts_of(folder.config())
    count = len(rollouts.problems)
    weight = open_rows(folder.config().corpus, "train").sources[0].weight
    steps = round(count * weight) // rollouts.plan.rows_per_step
    seen = np.concatenate([rollouts.plan.at(step)[0] for step in range(2 * steps - 1)])
    assert len(set(seen.tolist())) == len(seen) > 0.9 * count


def test_a_corpus_gives_back_its_problems(new_rl: NewRL, mixture_for: Callable[[str], Prepared]) -> None:
    corpus, tokenizer = str(mixture_for("rl").folder), mixture_for("rl").tokenizer
    [train], [validation] = (load_problems(corpus, split, tokenizer) for split in ("train", "validation"))
    assert len(train) + len(validation) == 21 * 3 * 21
    for problem in train[:50]:
        asked = parse(problem.conversation[0].content)
        assert asked is not None
        assert problem.conversation == [Message("user", asked.question), Message("assistant", str(asked.answer))]


# ---- what it earns ----


class Script:
    """Stands for `generate`: writes what a test says for each sample of a problem, in the order of the samples."""

    def __init__(self, rollouts: Rollouts, say: Callable[[Problem, str, int], tuple[str, bool]]) -> None:
        """`say`: (problem, reading, number of the sample) -> the text, and whether its closing marker comes."""
        self.calls: list[dict[str, Any]] = []
        self._say, self._tokenizer, self._count = say, rollouts.generator.tokenizer, {}
        self._known: dict[tuple[int, ...], tuple[Problem, str]] = {}
        for reading in own_readings(rollouts.generator.direction):
            for problem in rollouts.problems:
                given = (
                    problem.conversation[1:]
                    if is_asking(reading, rollouts.generator.reversal)
                    else problem.conversation[:-1]
                )
                opened = build_prompt(
                    given,
                    reading,
                    rollouts.generator.direction,
                    rollouts.generator.reversal,
                    rollouts.generator.tokenizer,
                )
                self._known[tuple(opened.ids)] = problem, reading

    def __call__(
        self, model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> list[list[int]]:
        self.calls.append(options | {"prompts": prompts, "new_tokens": new_tokens})
        [stop], written = options["stop"], []
        for prompt in prompts:
            problem, reading = self._known[tuple(prompt)]
            number = self._count[tuple(prompt)] = self._count.get(tuple(prompt), -1) + 1
            text, finished = self._say(problem, reading, number)
            ids = self._tokenizer.encode(text).tolist()
            written.append((ids[::-1] if reading == "backward" else ids) + [stop] * finished)
        return written


@pytest.mark.parametrize(("direction", "reversal"), CASES)
def test_rewards_advantages_and_targets_by_hand(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch, direction: str, reversal: str
) -> None:
    """Of a group of 4: right, wrong, right without an end, right. Who answers gives a value, who asks a problem.

    A model that reads time backwards is given the answer, then writes the question: its prompt ends where the
    question can follow.
    """
    folder = new_rl(direction, reversal, rl__samples=8 if direction == "bidirectional" else 4)
    rollouts = rollouts_of(folder.config())
    turns = TurnIds.from_tokenizer(rollouts.generator.tokenizer)

    def say(problem: Problem, reading: str, number: int) -> tuple[str, bool]:
        question, answer = (message.content for message in problem.conversation)
        right, wrong = (question, "20*20=") if is_asking(reading, reversal) else (answer, "9999")
        return (right, wrong, right, right)[number], number != 2

    script = Script(rollouts, say)
    monkeypatch.setattr(module, "generate", script)
    batch = rollouts.batch(model_of(folder), 0)
    readings = own_readings(direction)
    assert batch["reading"].tolist() == [READINGS.index(reading) for reading in readings for _ in range(8)]
    assert batch["reward"].tolist() == [1, 0, 0, 1] * 2 * len(readings)
    assert batch["finished"].tolist() == [1, 1, 0, 1] * 2 * len(readings)
    advantages = np.array([0.5, -0.5, -0.5, 0.5] * 2 * len(readings), dtype=np.float32)

    for call, reading in zip(script.calls, readings, strict=True):
        stop = turns.user_start if is_asking(reading, reversal) else turns.assistant_end
        assert call["stop"] == {stop}
        assert call["banned"] == set(rollouts.generator.tokenizer.specials.values()) - {stop}
        assert (call["temperature"], call["top_k"], call["new_tokens"]) == (1.0, None, 6)
        assert len(set(call["seeds"])) == 8
        for prompt in call["prompts"]:
            last = turns.user_end if is_asking(reading, reversal) else turns.assistant_start
            assert prompt[0] == rollouts.generator.tokenizer.bos
            assert prompt[-1] == last
    assert script.calls[0]["seeds"] != script.calls[-1]["seeds"] or len(readings) == 1

    prompts = [prompt for call in script.calls for prompt in call["prompts"]]
    for row, prompt in enumerate(prompts):
        inputs, targets = batch["inputs"][row].tolist(), batch["targets"][row]
        assert inputs[: len(prompt)] == list(prompt)
        place = np.flatnonzero(targets != IGNORED)
        assert place[0] == len(prompt) - 1  # the first written token is what follows the prompt
        assert place.tolist() == list(range(place[0], place[-1] + 1))
        assert len(place) == batch["sample_tokens"][row]
        assert inputs[len(prompt) : place[-1] + 1] == targets[place[:-1]].tolist()
        assert set(inputs[place[-1] + 1 :]) <= {rollouts.generator.tokenizer.pad}
        assert (batch["importance"][row][place] == advantages[row]).all()
        assert not batch["importance"][row][targets == IGNORED].any()
        assert (targets[place[-1]] in vars(turns).values()) == bool(batch["finished"][row])
    assert not np.isin(batch["targets"], [rollouts.generator.tokenizer.pad, rollouts.generator.tokenizer.bos]).any()


def test_the_halves_of_a_bidirectional_group_have_means_of_their_own(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one reading finds easy must not make the other's luck look like skill."""
    folder = new_rl("bidirectional", "turns")

    def say(problem: Problem, reading: str, number: int) -> tuple[str, bool]:
        return (problem.conversation[1].content if reading == "forward" or number == 0 else "9999"), True

    rollouts = rollouts_of(folder.config())
    monkeypatch.setattr(module, "generate", Script(rollouts, say))
    batch = rollouts.batch(model_of(folder), 0)
    assert batch["reward"].tolist() == [1] * 4 + [1, 0, 1, 0]
    advantages = batch["importance"].sum(1) / (batch["targets"] != IGNORED).sum(1)
    assert advantages.tolist() == pytest.approx([0] * 4 + [0.5, -0.5, 0.5, -0.5])


def test_samples_of_a_run_have_groups_of_mean_zero(new_rl: NewRL, monkeypatch: pytest.MonkeyPatch) -> None:
    give_something_to_learn(monkeypatch)
    folder = new_rl("forward", rl__prompts=4, rl__samples=6)
    batch = rollouts_of(folder.config()).batch(model_of(folder), 0)
    advantages = batch["importance"].sum(1) / (batch["targets"] != IGNORED).sum(1)
    groups = advantages.reshape(4, 6)
    assert np.abs(groups.mean(1)).max() < 1e-6
    assert (groups.std(1) > 0).any()
    assert groups == pytest.approx(batch["reward"].reshape(4, 6) - batch["reward"].reshape(4, 6).mean(1, keepdims=True))


# ---- what is learned from it ----


@pytest.mark.parametrize("loss_chunk", [0, 7, 64], ids=["plain", "fused", "fused at once"])
@pytest.mark.parametrize("micro_rows", [3, 100])
def test_the_gradient_is_that_of_advantage_times_surprise_over_tokens(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch, loss_chunk: int, micro_rows: int
) -> None:
    give_something_to_learn(monkeypatch)
    folder = new_rl("bidirectional", rl__samples=8, budget={"steps": 1, "batch_tokens": 512})
    rollouts = rollouts_of(folder.config())
    batch = rollouts.batch(model_of(folder), 0)
    assert np.abs(batch["importance"]).max() > 0
    inputs, targets = (torch.from_numpy(batch[name]).long() for name in ("inputs", "targets"))
    importance = torch.from_numpy(batch["importance"])

    plain = model_of(folder)
    chosen = targets >= 0
    nll = F.cross_entropy(plain(inputs)[chosen], targets[chosen], reduction="none")
    (nll * importance[chosen]).sum().div(chosen.sum()).backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}

    model = model_of(folder, loss_chunk=loss_chunk)
    found: dict[str, torch.Tensor] = {}

    def look(token_losses: torch.Tensor) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(token_losses[chosen], nll.detach(), rtol=1e-4, atol=1e-5)

    step = TrainStep(model, build_optimizer(model), micro_rows, 1.0)
    result = step(inputs, targets, importance=importance, before_update=look)
    mean = float((nll.detach() * importance[chosen]).sum() / chosen.sum())
    assert result.loss == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


def test_an_update_makes_what_earned_more_likelier(new_rl: NewRL, monkeypatch: pytest.MonkeyPatch) -> None:
    give_something_to_learn(monkeypatch)
    folder = new_rl("backward")
    model = model_of(folder)
    batch = rollouts_of(folder.config()).batch(model, 0)
    inputs, targets = (torch.from_numpy(batch[name]).long() for name in ("inputs", "targets"))
    importance = torch.from_numpy(batch["importance"])
    step = TrainStep(model, build_optimizer(model, lr=0.1), 100, 1.0)
    before = model.loss(inputs, targets).each.detach()
    step(inputs, targets, importance=importance)
    gained = (before - model.loss(inputs, targets).each.detach()) * importance
    assert float(gained.sum()) > 0


@pytest.mark.parametrize("loss_chunk", [0, 64], ids=["plain", "fused"])
def test_where_no_sample_is_better_than_another_nothing_is_learned(new_rl: NewRL, loss_chunk: int) -> None:
    """Also after an update: the optimizer's momentum alone moves nothing."""
    folder = new_rl("forward")
    model = model_of(folder, loss_chunk=loss_chunk)
    step = TrainStep(model, build_optimizer(model), 100, 1.0)
    batch = rollouts_of(folder.config()).batch(model, 0)
    inputs, targets = (torch.from_numpy(batch[name]).long() for name in ("inputs", "targets"))
    step(inputs, targets)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = step(inputs, targets, importance=torch.zeros(targets.shape))
    assert (result.loss, result.grad_norm, result.is_finite) == (0, 0, True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_run_in_which_nothing_is_earned_ends_well_with_its_parents_weights(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_rl("forward")
    monkeypatch.setattr(
        module, "generate", lambda model, prompts, new_tokens, **options: [[5] * new_tokens for _ in prompts]
    )
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "finished"
    assert losses(folder) == [0.0] * STEPS
    assert status.metrics["val_reward"] == 0
    figures = [entry.metrics["val_bpb"] for entry in read_journal(folder.path) if "val_bpb" in entry.metrics]
    assert len(figures) == 3
    assert len(set(figures)) == 1


# ---- what is measured, and kept ----


def test_figures_of_a_batch_by_hand() -> None:
    batch = {
        "reward": np.array([1, 0, 1, 1], dtype=np.float32),
        "sample_tokens": np.array([2, 4, 3, 3], dtype=np.float32),
        "finished": np.array([1, 0, 1, 1], dtype=np.float32),
        "rollout_seconds": np.array([2.5], dtype=np.float32),
        "reading": np.array([0, 0, 1, 1], dtype=np.int32),
        "targets": np.array([[-1, 3, 4], [1, 2, -1], [-1, -1, 9], [7, -1, -1]], dtype=np.int32),
    }
    losses = torch.full((4, 3), 0.5)
    found = {name: sums.tolist() for name, sums in measure(batch, losses, surprise=True).items()}
    assert found == {
        "reward": [3, 4],
        "sample_tokens": [12, 4],
        "finished": [3, 4],
        "rollout_seconds": [2.5, 1],
        "reward_forward": [1, 2],
        "reward_backward": [2, 2],
        "entropy": [6, 6],
    }
    assert "entropy" not in measure(batch, losses, surprise=False)


@pytest.mark.parametrize(("direction", "reversal"), [("bidirectional", "whole"), ("backward", "turns")])
def test_a_run_tells_what_was_earned_and_keeps_examples(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch, direction: str, reversal: str
) -> None:
    give_something_to_learn(monkeypatch)
    folder = new_rl(direction, reversal)
    status = run_phase(folder, LocalSession(), in_process)
    assert status.state == "finished", status.reason
    entries = list(read_journal(folder.path))
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    readings = own_readings(direction)
    for entry in entries:
        assert {"reward", "sample_tokens", "finished", "entropy", "rollout_seconds"} <= entry.metrics.keys()
        own = [entry.metrics[f"reward_{reading}"] for reading in readings]
        assert entry.metrics["reward"] == pytest.approx(np.mean(own))
    own = [status.metrics[f"val_reward_{reading}"] for reading in readings]
    assert status.metrics["val_reward"] == pytest.approx(np.mean(own))
    assert "val_bpb" in status.metrics
    assert sorted(path.name for path in (folder.path / "samples").iterdir()) == [
        "step_000005.json", "step_000010.json", "step_000012.json"
    ]  # fmt: skip
    samples = json.loads((folder.path / "samples" / "step_000012.json").read_text())
    assert [sample["reading"] for sample in samples] == [reading for reading in readings for _ in range(5)]
    for sample in samples:
        assert sample.keys() == {"reading", "given", "written", "finished", "reward"}
        question = r"(0|1?[0-9]|20)[+*-](0|1?[0-9]|20)="
        wanted = rf"<\|user_start\|>{question}<\|user_end\|><\|assistant_start\|>"
        if is_asking(sample["reading"], reversal):
            wanted = r"<\|user_end\|><\|assistant_start\|>-?[0-9]+<\|assistant_end\|>"
        assert re.fullmatch(wanted, sample["given"])
    mean = np.mean([sample["reward"] for sample in samples])
    assert status.metrics["val_reward"] == pytest.approx(mean)


def test_validation_is_greedy_and_on_problems_that_are_not_trained_on(
    new_rl: NewRL, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, tuple[int, ...]]] = []
    generate = module.generate

    def note(model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> list[list[int]]:
        asked.extend((options["temperature"], tuple(prompt)) for prompt in prompts)
        return generate(model, prompts, new_tokens, **options)

    monkeypatch.setattr(module, "generate", note)
    folder = new_rl("forward")
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    greedy = {prompt for temperature, prompt in asked if temperature == 0}
    drawn = {prompt for temperature, prompt in asked if temperature == 1}
    assert len(greedy) == 5
    assert not greedy & drawn
    tokenizer = Tokenizer.load(Path(folder.config().tokenizer))
    for prompts, held_out in ((greedy, True), (drawn, False)):
        for prompt in prompts:
            problem = parse(tokenizer.decode([token for token in prompt if token < tokenizer.bos]))
            assert problem is not None
            assert problem.held_out == held_out
    assert len(asked) == 3 * 5 + STEPS * 2 * 4


# ---- how much is written ----


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("batch_tokens", "prompts"), [(384, 2), (512, 2), (1024, 5), (10**6, 16)])
def test_batch_tokens_cap_what_is_written(batch_tokens: int, prompts: int, workers: int) -> None:
    """And the number of workers, which is no part of what a run is, does not change it."""
    experiment = Experiment.model_validate(
        {
            "phase": "rl",
            "parent": "x",
            "direction": "forward",
            "depth": 1,
            "data": {"mixture": {"builtin:arithmetic": 1.0}},
            "budget": {"steps": 1, "batch_tokens": batch_tokens},
            "rl": {"prompts": 16, "samples": 8, "new_tokens": 24},
            "resources": {"workers": workers},
        }
    )
    assert experiment.prompts_per_step == prompts
    assert experiment.prompts_per_step * 8 * 24 <= batch_tokens


def test_a_longest_sample_fits_into_its_batch(new_rl: NewRL) -> None:
    """Where the longest prompt and `new_tokens` are more than a row, the sample ends with the row."""
    folder = new_rl("bidirectional", rl__new_tokens=500, budget={"steps": 1, "batch_tokens": 4096})
    rollouts = rollouts_of(folder.config())
    longest = folder.config().shape.sequence_length
    assert rollouts.width == longest
    batch = rollouts.batch(model_of(folder), 0)
    assert batch["inputs"].shape == (2 * 4, longest)
    full = batch["finished"] == 0
    assert full.any()
    assert ((batch["targets"][full] != IGNORED)[:, -1]).all()
    few = rollouts.settings.model_copy(update={"new_tokens": 2})
    short = Rollouts.from_corpus(
        folder.config().corpus, few, "bidirectional", "whole", rollouts.generator.tokenizer, 2, [1.0], 0
    )
    assert short.width < 20


def test_a_model_is_left_as_it_was(new_rl: NewRL) -> None:
    """Sampling puts nothing into the model that trains: neither its mode nor its gradients."""
    folder = new_rl("forward")
    model = build_model(folder.config(), torch.device("cpu"))
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rollouts_of(folder.config()).batch(model, 0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_samples_folder_of_a_run_is_its_own(new_rl: NewRL, tmp_path: Path) -> None:
    folder = new_rl("forward")
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    assert not list(tmp_path.glob("samples"))
    assert list((folder.path / "samples").glob("*.json"))
