"""Outputs of a model for generated items: the prompt in the form that its phase knows, and what it writes after it.

A base model continues a text, with solved examples before the item, and its output ends before the first stop text.
A model of a later phase answers in a conversation, and ends its answer itself. Not every reading has a meaning: the
output has to follow the prompt in the order in which the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bwlm.config import Reversal
from bwlm.directions import TEXT_READINGS, is_marked
from bwlm.evaluate.generation import MessageGenerator
from bwlm.evaluate.tasks.layout import SEPARATOR
from bwlm.model.generate import generate
from bwlm.model.gpt import GPT
from bwlm.phases import PHASES
from bwlm.text.conversation import Prompt, check_conversation, predicts_user_turn
from bwlm.text.direction import is_mirrored
from bwlm.text.tokenizer import Tokenizer
from bwlm.trained.load import LoadedModel
from tasks.items import GeneratedItem, GeneratedTask

_FIRST_PART = 32
"""Ids that a base model writes before its output is first searched for stop texts; each later part is twice as long."""


@dataclass(frozen=True)
class Sampling:
    """Choice of the ids of an output."""

    new_tokens: int
    """Most ids of an output."""
    temperature: float = 0.0
    """0: the likeliest id."""
    top_k: int | None = None


class Output(NamedTuple):
    """Text that a model wrote, in reading order."""

    text: str
    finished: bool
    """True if the model ended it; otherwise its continuation is not known."""


class FittedPrompt(NamedTuple):
    """Prompt of an item, and the examples that it lost to fit."""

    prompt: Prompt
    dropped_shots: int


class Writer(Protocol):
    """Model that writes outputs for items in one reading."""

    def fit(self, item: GeneratedItem, room: int) -> FittedPrompt | None:
        """Return the prompt of an item in at most `room` ids, or None if it is longer."""

    def write(
        self, model: GPT, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Output]:
        """Return an output for each prompt; an output depends on its own prompt and seed alone, but for rounding."""


@dataclass(frozen=True)
class TextWriter:
    """Writes what follows a text: a base model, read forward."""

    direction: str
    reading: str
    tokenizer: Tokenizer
    stops: tuple[str, ...]

    def fit(self, item: GeneratedItem, room: int) -> FittedPrompt | None:
        """Return the prompt; the examples that are farthest from the item are dropped first."""
        head = [self.tokenizer.bos]
        if is_marked(self.direction):
            head.append(getattr(self.tokenizer, self.reading))
        solved = [f"{shot.stem}{shot.answer}" for shot in item.shots]
        for dropped in range(len(solved) + 1):
            ids = [*head, *self.tokenizer.encode(SEPARATOR.join([*solved[dropped:], item.prompt])).tolist()]
            if len(ids) <= room:
                return FittedPrompt(Prompt(ids, self.tokenizer.bos), dropped)
        return None

    def write(
        self, model: GPT, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Output]:
        """Return the outputs. They are written in parts, and those that have ended are left out of the next part."""
        bos, specials = self.tokenizer.bos, set(self.tokenizer.specials.values())
        written: list[list[int]] = [[] for _ in prompts]
        live, part = list(range(len(prompts))), _FIRST_PART
        while live:
            before = len(written[live[0]])
            parts = generate(
                model,
                [prompts[n].ids + written[n] for n in live],
                min(part, sampling.new_tokens - before),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                stop={bos},
                banned=specials - {bos},
                seeds=[seeds[n] + before for n in live],
            )
            for n, ids in zip(live, parts, strict=True):
                written[n] += ids
            full = before + part >= sampling.new_tokens
            live, part = [n for n in live if not (full or self._read(written[n]).finished)], 2 * part
        return [self._read(ids) for ids in written]

    def _read(self, ids: Sequence[int]) -> Output:
        ended = ids[-1:] == [self.tokenizer.bos]
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return Output(text[: min(places, default=len(text))], ended or bool(places))


@dataclass(frozen=True)
class AnswerWriter:
    """Writes answers in conversations: a model of a later phase."""

    direction: str
    reading: str
    tokenizer: Tokenizer
    reversal: Reversal

    def fit(self, item: GeneratedItem, room: int) -> FittedPrompt | None:
        """Return the prompt, which has no examples."""
        conversation = check_conversation(item.conversation, item.place)
        prompt = self._generator(Sampling(0)).prompt(conversation, self.reading)
        return FittedPrompt(prompt, 0) if len(prompt.ids) <= room else None

    def write(
        self, model: GPT, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Output]:
        generator = self._generator(sampling)
        messages = generator.generate(model, prompts, self.reading, seeds, sampling.temperature)
        return [Output(message.text, message.finished) for message in messages]

    def _generator(self, sampling: Sampling) -> MessageGenerator:
        return MessageGenerator(self.direction, self.reversal, self.tokenizer, sampling.new_tokens, sampling.top_k)


def writer_of(loaded: LoadedModel, task: GeneratedTask, reading: str) -> Writer | str:
    """Return the writer of a model in a reading, or the reason why there is none."""
    experiment = loaded.config.experiment
    if reading not in TEXT_READINGS:
        return f"an output cannot be written in the order {reading}"
    if PHASES[experiment.phase].reads_documents:
        if is_mirrored(reading):
            return "read backward, an output would stand before its prompt"
        return TextWriter(experiment.direction, reading, loaded.tokenizer, task.stops)
    reversal = experiment.data.reversal
    if predicts_user_turn(reading, reversal):
        return f"read backward with reversal: {reversal}, the model writes the question, given the answer"
    return AnswerWriter(experiment.direction, reading, loaded.tokenizer, reversal)
