"""Samples of a model of documents: several texts that go on from one prompt, decoded as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bwlm.chat.dialogue import Voice, document_prompt, prompt_room
from bwlm.chat.engine import Engine
from bwlm.chat.reply import Reply
from bwlm.chat.settings import Settings
from bwlm.text.tokenizer import Tokenizer


class Samples(NamedTuple):
    """Texts that a model wrote, and what was left out of its prompt."""

    replies: list[Reply]
    dropped: int
    """Tokens of the prompt that did not fit."""


def sample(
    engine: Engine,
    voice: Voice,
    tokenizer: Tokenizer,
    text: str,
    reading: str,
    settings: Settings,
    number: int,
    stops: Sequence[str] = (),
) -> Samples:
    """Return texts that the model writes after a text, or read backward before it; without text, whole documents.

    Each has its own seed, the numbers from `settings.seed` on, so that more samples change none of the first ones.
    """
    room = prompt_room(engine.config.sequence_length, settings.max_tokens)
    prompt, dropped = document_prompt(text, reading, voice.direction, tokenizer, room)
    replies = {
        f"{n}": Reply(f"{n}", prompt, reading, tokenizer, settings, settings.seed + n, stops) for n in range(number)
    }
    for reply in replies.values():
        engine.add(reply.request)
    while engine.running or engine.queued:
        for event in engine.step():
            replies[event.request].take(event)
    return Samples(list(replies.values()), dropped)
