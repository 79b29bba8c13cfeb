"""Rollouts of RL: the prompts of a step, samples in groups, rewards and advantages.

A prompt is a problem of a task. A model that answers is given the question; a model that writes the user's turn is
given the answer. A bidirectional model writes half of its samples in each reading. An advantage is a sample's reward
minus the mean of its group, the samples of one prompt in one reading.

Axes: P prompts, G samples of a group, R = P G samples (of a bidirectional model: of one reading), T time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Reversal, RewardSettings
from bwlm.directions import READINGS, own_readings
from bwlm.errors import UserError
from bwlm.evaluate.generation import GeneratedMessage, MessageGenerator
from bwlm.model.gpt import GPT
from bwlm.text.batches import Batch, join, open_rows
from bwlm.text.conversation import Conversation, predicts_user_turn, read_back
from bwlm.text.direction import IGNORED, Rows
from bwlm.text.plan import MixturePlan, counter_hash, rows_drawn
from bwlm.text.tokenizer import Tokenizer
from tasks import Verifiable, Writes, find_task


@dataclass(frozen=True)
class Problem:
    """Conversation with the question and the true answer, and the task that rewards a message."""

    conversation: Conversation
    task: Verifiable


@dataclass(frozen=True)
class Sample:
    """Message that a model wrote, and its reward."""

    message: GeneratedMessage
    reward: float
    """Reward by the task; 0 where the message did not end by itself, since its continuation is not known."""


def load_problems(corpus: str, split: str, tokenizer: Tokenizer) -> list[list[Problem]]:
    """Return the whole conversations of each source of a mixture, in the order of its rows.

    Raises `UserError` if a source has no whole conversation.
    """
    rows = open_rows(corpus, split)
    by_source = []
    for source, (first, last) in zip(rows.sources, rows.source_rows(), strict=True):
        task = find_task(source.name)
        assert isinstance(task, Verifiable), "refused when it was planned"
        problems = [Problem(talk, task) for talk in _conversations(rows.take(np.arange(first, last)), tokenizer)]
        if not problems:
            raise UserError(
                f"data.mixture: {source.name}: no {split} conversation fits whole into {rows.width} tokens: "
                "give shorter ones, or a model with a longer model.sequence_length"
            )
        by_source.append(problems)
    return by_source


def _conversations(rows: Rows, tokenizer: Tokenizer) -> Iterator[Conversation]:
    for ids in np.split(rows.tokens, np.cumsum(rows.lengths)[:-1]):
        conversation = read_back(ids, tokenizer)
        if conversation is not None:
            yield conversation


@dataclass(frozen=True)
class Rollouts:
    """Write samples for problems and rewards them."""

    problems: list[Problem]
    plan: MixturePlan
    """Order of the problems."""
    settings: RewardSettings
    generator: MessageGenerator
    width: int
    """T of a batch: the longest prompt and sample together, but at most a model's row."""

    @classmethod
    def from_corpus(
        cls,
        corpus: str,
        settings: RewardSettings,
        direction: str,
        reversal: Reversal,
        tokenizer: Tokenizer,
        prompts: int,
        weights: Sequence[float],
        seed: int,
    ) -> Rollouts:
        """Return the writer for a corpus' training problems.

        `prompts` of a step are for all ranks; `weights` are those of the corpus' sources. Raises `UserError` if a
        source has no whole conversation.
        """
        longest = open_rows(corpus, "train").width
        generator = MessageGenerator(direction, reversal, tokenizer, settings.new_tokens, settings.top_k)
        by_source = load_problems(corpus, "train", tokenizer)
        lengths = [
            len(generator.prompt(problem.conversation, reading).ids)
            for problems in by_source
            for problem in problems
            for reading in own_readings(direction)
        ]
        rows = tuple(map(len, by_source))
        drawn = tuple(map(rows_drawn, weights, rows))
        plan = MixturePlan(rows, drawn, prompts, seed)
        width = min(longest, max(lengths) + settings.new_tokens)
        return cls(list(itertools.chain(*by_source)), plan, settings, generator, width)

    def chosen(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """Return [R], the problem of each sample of a rank, one reading after the other."""
        problems, _ = self.plan.at(step, rank, world)
        readings = own_readings(self.generator.direction)
        return np.concatenate([np.repeat(problems, self.settings.samples // len(readings)) for _ in readings])

    def batch(self, model: GPT, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the samples of a rank at a step as rows, with each token's advantage as `importance`.

        They depend on the step and the weights alone, not on the number of ranks, except for rounding.
        """
        began = time.perf_counter()
        places, _ = self.plan.at(step, rank, world)
        readings = own_readings(self.generator.direction)
        group = self.settings.samples // len(readings)
        first = rank * len(places)
        parts = []
        for number, reading in enumerate(readings):
            problems = [self.problems[place] for place in places for _ in range(group)]
            # samples are counted over all ranks, so that the seed of a sample does not depend on their number
            counters = np.arange(first * group, first * group + len(problems))
            seeds = counter_hash(self.plan.seed, step, number, counters).tolist()
            samples = self.write(model, problems, reading, seeds, self.settings.temperature)
            rewards = np.array([sample.reward for sample in samples], dtype=np.float32).reshape(-1, group)
            advantages = (rewards - rewards.mean(1, keepdims=True)).ravel()
            parts.append(self._rows(samples, advantages, reading))
        joined = join(parts)
        joined["rollout_seconds"] = np.array([time.perf_counter() - began], dtype=np.float32)
        return joined

    def write(
        self, model: GPT, problems: list[Problem], reading: str, seeds: list[int], temperature: float
    ) -> list[Sample]:
        """Write and reward a sample for each problem; greedy at temperature 0."""
        prompts = [self.generator.prompt(problem.conversation, reading) for problem in problems]
        messages = self.generator.generate(model, prompts, reading, seeds, temperature)
        writes: Writes = "question" if predicts_user_turn(reading, self.generator.reversal) else "answer"
        return [
            Sample(message, _reward(problem, message, writes))
            for problem, message in zip(problems, messages, strict=True)
        ]

    def _rows(self, samples: list[Sample], advantages: NDArray[np.float32], reading: str) -> Batch:
        """Return [R, T] inputs, targets (the generated tokens) and their importance, and [R] figures of each sample."""
        shape = (len(samples), self.width)
        inputs = np.full(shape, self.generator.tokenizer.pad, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        for row, sample in enumerate(samples):
            prompt = sample.message.prompt.ids
            ids = [*prompt, *sample.message.ids][: self.width + 1]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]  # the first one follows the whole prompt
        importance = np.where(targets == IGNORED, 0, advantages[:, None]).astype(np.float32)
        figures: dict[str, Any] = {
            "reward": np.array([sample.reward for sample in samples], dtype=np.float32),
            "sample_tokens": np.array([len(sample.message.ids) for sample in samples], dtype=np.float32),
            "finished": np.array([sample.message.finished for sample in samples], dtype=np.float32),
            "reading": np.full(len(samples), READINGS.index(reading), dtype=np.int32),
        }
        rows = {"inputs": inputs, "targets": targets, "segments": np.zeros_like(inputs), "importance": importance}
        return rows | figures


def _reward(problem: Problem, message: GeneratedMessage, writes: Writes) -> float:
    if not message.finished:
        return 0.0
    truth = [turn._asdict() for turn in problem.conversation]
    return problem.task.reward(message.text, truth, writes)
