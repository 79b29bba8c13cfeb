"""What a model writes in RL, and what it earns: the prompts of a step, samples in groups, rewards, advantages.

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
from bwlm.errors import UserError
from bwlm.model.generate import generate
from bwlm.model.gpt import GPT
from bwlm.text.batches import Batch, join, open_rows
from bwlm.text.conversation import Conversation, Opening, asks, opening, read_back, read_message
from bwlm.text.direction import IGNORED, READINGS, Rows, own_readings
from bwlm.text.plan import MixturePlan, counter_hash
from bwlm.text.tokenizer import Tokenizer
from tasks import Verifiable, find_task

_ROWS_AT_ONCE = 256
"""Samples that are written beside each other: each keeps keys and values of its length."""


@dataclass(frozen=True)
class Problem:
    conversation: Conversation
    task: Verifiable


@dataclass(frozen=True)
class Sample:
    """What a model wrote, and what it earned."""

    opening: Opening
    written: list[int]
    """Ids, the closing marker included if it came."""
    text: str
    """In reading order."""
    reward: float
    """0 where it did not end by itself: what would have come is not known."""

    @property
    def finished(self) -> bool:
        return self.written[-1:] == [self.opening.stop]


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
    direction: str
    reversal: Reversal
    tokenizer: Tokenizer
    width: int
    """T of a batch: the longest opening and sample, in a model's row at most."""

    @classmethod
    def of(
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
        by_source = load_problems(corpus, "train", tokenizer)
        lengths = [
            len(_opening(problem.conversation, reading, direction, reversal, tokenizer).ids)
            for problems in by_source
            for problem in problems
            for reading in own_readings(direction)
        ]
        rows = tuple(map(len, by_source))
        drawn = tuple(max(1, round(weight * count)) for weight, count in zip(weights, rows, strict=True))
        plan = MixturePlan(rows, drawn, prompts, seed)
        width = min(longest, max(lengths) + settings.new_tokens)
        return cls(list(itertools.chain(*by_source)), plan, settings, direction, reversal, tokenizer, width)

    def chosen(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """[R] problem of each sample of a rank, over its readings."""
        problems, _ = self.plan.at(step, rank, world)
        readings = own_readings(self.direction)
        return np.concatenate([np.repeat(problems, self.settings.samples // len(readings)) for _ in readings])

    def batch(self, model: GPT, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples of a rank at a step, and for each of their tokens its advantage as `importance`.

        They depend on the step and the weights alone, not on the number of ranks, except for rounding.
        """
        began = time.perf_counter()
        places, _ = self.plan.at(step, rank, world)
        readings = own_readings(self.direction)
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
        """A sample for each problem; greedy at temperature 0."""
        specials = set(self.tokenizer.specials.values())
        samples = []
        for start in range(0, len(problems), _ROWS_AT_ONCE):
            some = problems[start : start + _ROWS_AT_ONCE]
            openings = [
                _opening(problem.conversation, reading, self.direction, self.reversal, self.tokenizer)
                for problem in some
            ]
            stop = openings[0].stop
            written = generate(
                model,
                [one.ids for one in openings],
                self.settings.new_tokens,
                temperature=temperature,
                top_k=self.settings.top_k,
                stop={stop},
                banned=specials - {stop},
                seeds=seeds[start : start + len(some)],
            )
            samples += [
                self._judged(problem, one, ids, reading)
                for problem, one, ids in zip(some, openings, written, strict=True)
            ]
        return samples

    def _judged(self, problem: Problem, given: Opening, written: list[int], reading: str) -> Sample:
        text = read_message(written, reading, self.tokenizer)
        if written[-1:] != [given.stop]:
            return Sample(given, written, text, 0.0)
        truth = [message._asdict() for message in problem.conversation]
        writes = "question" if asks(reading, self.reversal) else "answer"
        return Sample(given, written, text, problem.task.reward(text, truth, writes))  # type: ignore[arg-type]

    def _rows(self, samples: list[Sample], advantages: NDArray[np.float32], reading: str) -> Batch:
        """[R, T] inputs, targets (of what was written) and their importance, and [R] figures of each sample."""
        shape = (len(samples), self.width)
        inputs = np.full(shape, self.tokenizer.pad, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        for row, sample in enumerate(samples):
            ids = [*sample.opening.ids, *sample.written][: self.width + 1]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(sample.opening.ids) - 1 : len(ids) - 1] = ids[len(sample.opening.ids) :]
        importance = np.where(targets == IGNORED, 0, advantages[:, None]).astype(np.float32)
        figures: dict[str, Any] = {
            "reward": np.array([sample.reward for sample in samples], dtype=np.float32),
            "sample_tokens": np.array([len(sample.written) for sample in samples], dtype=np.float32),
            "finished": np.array([sample.finished for sample in samples], dtype=np.float32),
            "reading": np.full(len(samples), READINGS.index(reading), dtype=np.int32),
        }
        rows = {"inputs": inputs, "targets": targets, "segments": np.zeros_like(inputs), "importance": importance}
        return rows | figures


def _opening(
    conversation: Conversation, reading: str, direction: str, reversal: Reversal, tokenizer: Tokenizer
) -> Opening:
    """Of the last answer, given all before it, or of the first question, given all after it."""
    given = conversation[1:] if asks(reading, reversal) else conversation[:-1]
    return opening(given, reading, direction, reversal, tokenizer)
