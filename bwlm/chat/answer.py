"""A text while a model writes it, and the log-probabilities of its tokens in the order of the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bwlm.chat.engine import Event, Finish, Request, Scored
from bwlm.chat.growth import TextGrowth
from bwlm.text.tokenizer import Tokenizer


class Echo(NamedTuple):
    """Prompt that is sent back as a part of the text."""

    text: str
    head: int
    """Number of ids of the prompt before its text: BOS, and the marker of the reading."""
    left_out: Sequence[int]
    """Ids of the text that do not fit the context, in reading order."""


@dataclass
class Answer:
    """Text that a request asks for, while it is written."""

    index: int
    request: Request
    growth: TextGrowth
    echo: Echo | None = None
    tokens: list[Scored] = field(default_factory=list)
    """Generated ids as they came, without the one that closed the text."""
    prompt: tuple[Scored, ...] = ()
    """Ids of the prompt, if their log-probabilities were asked for."""
    finish: Finish | None = None
    count: int = 0
    """Number of generated ids, with the one that closed the text."""

    @property
    def text(self) -> str:
        """Text that was written so far, in reading order."""
        return self.growth.text

    @property
    def whole(self) -> str:
        """The same with the prompt, if it is echoed."""
        echo = self.echo.text if self.echo else ""
        return self.text + echo if self.growth.at_front else echo + self.text

    def take(self, event: Event) -> str:
        """Add what a step brought; return the new text, whose place is the end, or for a backward reading the front."""
        self.prompt = self.prompt or event.prompt
        new = ""
        if event.token is not None:
            self.count += 1
            if event.token.id not in self.request.stop:
                self.tokens.append(event.token)
                new = self.growth.add(event.token.id)
        if event.finish is not None:
            rest = self.growth.close()
            new = rest + new if self.growth.at_front else new + rest
            self.finish = "stop" if self.growth.stopped else event.finish
        return new


class Placed(NamedTuple):
    """Token with its log-probability, and the index of the character where it begins in the text."""

    token: Scored
    offset: int


def in_order(answer: Answer, tokenizer: Tokenizer) -> list[Placed]:
    """Return the tokens of a text, and of its prompt if that is echoed, in reading order."""
    written = _written(answer, tokenizer)
    if answer.echo is None:
        return written
    prompt, text = _echoed(answer, answer.echo, tokenizer), answer.echo.text
    if answer.growth.at_front:
        return written + _moved(prompt, len(answer.text))
    return prompt + _moved(written, len(text))


def _moved(tokens: Sequence[Placed], by: int) -> list[Placed]:
    return [Placed(token, offset + by) for token, offset in tokens]


def _written(answer: Answer, tokenizer: Tokenizer) -> list[Placed]:
    """Return the generated tokens in reading order, without those of a stop text."""
    at_front, length = answer.growth.at_front, len(answer.text)
    tokens = answer.tokens[::-1] if at_front else answer.tokens
    starts = _starts([token.id for token in tokens], tokenizer)
    if not at_front:
        return [Placed(token, start) for token, start in zip(tokens, starts[:-1], strict=True) if start < length]
    extra = starts[-1] - length  # characters of the stop text, and of what stands before it
    spans = zip(tokens, starts[:-1], starts[1:], strict=True)
    return [Placed(token, max(0, start - extra)) for token, start, end in spans if end > extra]


def _echoed(answer: Answer, echo: Echo, tokenizer: Tokenizer) -> list[Placed]:
    """Return the tokens of the prompt in reading order; those that do not fit the context have no log-probability."""
    scored, left_out = list(answer.prompt[echo.head :]), [Scored(id, None) for id in echo.left_out]
    tokens = scored[::-1] + left_out if answer.growth.at_front else left_out + scored
    starts = _starts([token.id for token in tokens], tokenizer)
    return [Placed(token, start) for token, start in zip(tokens, starts[:-1], strict=True)]


def _starts(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return where each token begins in the text of all, in characters, and last the text's length."""
    places = Places(tokenizer)
    return [*(places.add(id) for id in ids), places.end()]


class Places:
    """Characters at which the tokens of a text begin, one token after the other.

    A token that goes on with a character begins where that character does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def add(self, id: int) -> int:
        """Return where the next token begins."""
        piece = self._tokenizer.decode_bytes([id])
        # bytes that are held back are a broken character, unless these bytes go on with it
        broken = bool(self._decoder.getstate()[0]) and piece[0] & 0xC0 != 0x80
        start = self._length + broken
        self._length += len(self._decoder.decode(piece))
        return start

    def end(self) -> int:
        """Return the length of the text."""
        return self._length + len(self._decoder.decode(b"", final=True))
