"""Messages that a model writes: conversations in, answers out, in batches, whatever the direction.

A forward model is given a conversation that ends with the user and writes the answer. A model that reads whole
conversations backward is given one that begins with the assistant and writes the question before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bwlm.config import Reversal
from bwlm.model.generate import generate
from bwlm.model.gpt import GPT
from bwlm.text.conversation import Conversation, Prompt, build_prompt, predicts_user_turn, read_message
from bwlm.text.tokenizer import Tokenizer

_ROWS_AT_ONCE = 256
"""Messages that are decoded together: each row holds keys and values of its whole length."""


@dataclass(frozen=True)
class GeneratedMessage:
    """Message that a model wrote."""

    prompt: Prompt
    ids: list[int]
    """Generated ids, in the order in which they were written, with the closing marker if it came."""
    text: str
    """Text in reading order, without markers."""

    @property
    def finished(self) -> bool:
        """True if the model ended the message itself; otherwise its continuation is not known."""
        return self.ids[-1:] == [self.prompt.stop]


@dataclass(frozen=True)
class MessageGenerator:
    """Prompts for messages and decodes them, for models of one direction."""

    direction: str
    reversal: Reversal
    tokenizer: Tokenizer
    new_tokens: int
    """Most ids of a message."""
    top_k: int | None = None

    def prompt(self, conversation: Conversation, reading: str) -> Prompt:
        """Return the prompt for the last answer of a whole conversation, or for its first question."""
        context = conversation[1:] if predicts_user_turn(reading, self.reversal) else conversation[:-1]
        return build_prompt(context, reading, self.direction, self.reversal, self.tokenizer)

    def generate(
        self, model: GPT, prompts: Sequence[Prompt], reading: str, seeds: Sequence[int], temperature: float = 0.0
    ) -> list[GeneratedMessage]:
        """Write a message for each prompt, greedily at temperature 0; all prompts have the same reading.

        `seeds` has one seed for each prompt, so that a message does not depend on the others of its batch, except for
        rounding.
        """
        specials, messages = set(self.tokenizer.specials.values()), list[GeneratedMessage]()
        for start in range(0, len(prompts), _ROWS_AT_ONCE):
            batch = prompts[start : start + _ROWS_AT_ONCE]
            stop = batch[0].stop
            generated = generate(
                model,
                [prompt.ids for prompt in batch],
                self.new_tokens,
                temperature=temperature,
                top_k=self.top_k,
                stop={stop},
                banned=specials - {stop},
                seeds=seeds[start : start + len(batch)],
            )
            messages += [
                GeneratedMessage(prompt, ids, read_message(ids, reading, self.tokenizer))
                for prompt, ids in zip(batch, generated, strict=True)
            ]
        return messages
