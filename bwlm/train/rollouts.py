"""RL's samples: the prompts of a step, samples in groups, rewards and advantages.

A prompt is a problem of a task. A model that answers is given the question, and one that asks the answer; of a
bidirectional model's samples half are written in each reading. An advantage is a sample's reward less the mean of its
group, which are the samples of one prompt in one reading.

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
    conversation: Conversation
    task: Verifiable


@dataclass(frozen=True)
class Sample:
    """A message that a model wrote, and its reward."""

    message: GeneratedMessage
    reward: float
    """0 where it did not end by itself: what would have come is not known."""


def load_problems(corpus: str, split: str, tokenizer: Tokenizer) -> list[list[Problem]]:
    """The whole conversations of each source of a mixture, in the order of its rows.

    Raises `UserError` if none of a source is whole.
    """
    rows = open_rows(corpus, split)
    found = []
    for source, (first, last) in zip(rows.sources, rows.source_rows(), strict=True):
        task = find_task(source.name)
        assert isinstance(task, Verifiable), "refused when it was planned"
        problems = [Problem(talk, task) for talk in _conversations(rows.take(np.arange(first, last)), tokenizer)]
        if not problems:
            raise UserError(f"data.mixture: {source.name}: no {split} conversation fits whole into {rows.width} tokens")
        found.append(problems)
    return found


def _conversations(rows: Rows, tokenizer: Tokenizer) -> Iterator[Conversation]:
    for ids in np.split(rows.tokens, np.cumsum(rows.lengths)[:-1]):
        conversation = read_back(ids, tokenizer)
        if conversation is not None:
            yield conversation


@dataclass(frozen=True)
class Rollouts:
    """Writes samples for problems and rewards them."""

    problems: list[Problem]
    plan: MixturePlan
    """Over the problems."""
    settings: RewardSettings
    generator: MessageGenerator
    width: int
    """T of a batch: the longest prompt and sample, in a model's row at most."""

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
        """`prompts` of a step, for all ranks; `weights` of the corpus' sources."""
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
        """[R] problem of each sample of a rank, over its readings."""
        problems, _ = self.plan.at(step, rank, world)
        readings = own_readings(self.generator.direction)
        return np.concatenate([np.repeat(problems, self.settings.samples // len(readings)) for _ in readings])

    def batch(self, model: GPT, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples of a rank at a step, and for each of their tokens its advantage as `importance`.

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
        """Writes and rewards a sample for each problem; greedy at temperature 0."""
        prompts = [self.generator.prompt(problem.conversation, reading) for problem in problems]
        messages = self.generator.generate(model, prompts, reading, seeds, temperature)
        writes: Writes = "question" if predicts_user_turn(reading, self.generator.reversal) else "answer"
        return [
            Sample(message, _reward(problem, message, writes))
            for problem, message in zip(problems, messages, strict=True)
        ]

    def _rows(self, samples: list[Sample], advantages: NDArray[np.float32], reading: str) -> Batch:
        """[R, T] inputs, targets (of what was written) and their importance, and [R] figures of each sample."""
        shape = (len(samples), self.width)
        inputs = np.full(shape, self.generator.tokenizer.pad, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        for row, sample in enumerate(samples):
            prompt = sample.message.prompt.ids
            ids = [*prompt, *sample.message.ids][: self.width + 1]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
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
