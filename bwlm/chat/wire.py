"""Responses of the server: OpenAI's objects and streams of chat and completions, with the fields that a direction adds.

A text that is written backward grows at its front. A stream then has each new piece in `prepend`, with an empty
`content` (of completions: `text`), and before its end the whole text there: a client that knows OpenAI's protocol alone
gets the right text, one that knows `prepend` shows it as it grows.

The constant part of a chunk is made once a stream: what is left for a token is one string of JSON.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bwlm.chat.answer import Answer, Placed, Places, in_order
from bwlm.chat.engine import Event, Scored
from bwlm.text.tokenizer import Tokenizer

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_HOLE = "\x00"
"""Stands for the text in the constant part of a chunk."""


def error_object(message: str, type: str, param: str | None = None, code: str | None = None) -> Json:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def to_line(content: Json) -> bytes:
    """Return an event of a stream."""
    return f"data: {json.dumps(content)}\n\n".encode()


@dataclass
class Wire:
    """Form of the responses to one request; the subclasses know the endpoints."""

    model: str
    direction: str
    rendered_as: str
    dropped: int
    prompt_tokens: int
    tokenizer: Tokenizer
    answers: Sequence[Answer]
    logprobs: bool
    include_usage: bool
    head: Json = field(init=False)
    """Fields that every chunk has."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __post_init__(self) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        self._around = {answer.index: self._constant(answer) for answer in self.answers}
        self._places = {answer.index: Places(self.tokenizer) for answer in self.answers}
        self._unsent: dict[int, list[Placed]] = {answer.index: [] for answer in self.answers}
        """Tokens whose text is held back; in a stream, log-probabilities come with the text."""

    # ---- for the endpoints to say ----

    def choice(self, answer: Answer) -> Json:
        """Return the whole text of an answer as it stands in a response."""
        raise NotImplementedError

    def delta(self, text: str, prepend: str | None = None) -> Json:
        """Return the fields of a chunk's choice that hold new text."""
        raise NotImplementedError

    def scores(self, tokens: Sequence[Placed]) -> Json:
        """Return the log-probabilities of tokens."""
        raise NotImplementedError

    def opening(self, answer: Answer) -> Json:
        """Return the choice of the chunk before the first token."""
        raise NotImplementedError

    # ---- responses ----

    @property
    def _told(self) -> Json:
        return {"direction": self.direction, "rendered_as": self.rendered_as, "dropped": self.dropped}

    @property
    def usage(self) -> Json:
        """Tokens that were read and written."""
        written = sum(answer.count for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def response(self) -> Json:
        """Return the response without streaming."""
        choices = [
            {
                "index": answer.index,
                **self.choice(answer),
                "logprobs": self.scores(in_order(answer, self.tokenizer)) if self.logprobs else None,
                "finish_reason": answer.finish,
            }
            for answer in self.answers
        ]
        return self.head | {"object": self.kind, **self._told, "choices": choices, "usage": self.usage}

    async def lines(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the events of a stream, from what the engine's steps bring."""
        by_request = {answer.request.id: answer for answer in self.answers}
        told = self._told
        for answer in self.answers:
            yield to_line(self._chunk(answer, self.opening(answer)) | told)
        async for event in events:
            answer = by_request[event.request]
            new = answer.take(event)
            if self._scores_now(answer) and event.token is not None:
                start = self._places[answer.index].add(event.token.id)
                self._unsent[answer.index].append(Placed(event.token, start))
            if new:
                yield self._grown(answer, new)
            if answer.finish is not None:
                for choice in self._closing(answer):
                    yield to_line(self._chunk(answer, choice))
        if self.include_usage:
            yield to_line(self.head | {"object": self.chunk_kind, "choices": [], "usage": self.usage})
        yield DONE

    def _chunk(self, answer: Answer, choice: Json) -> Json:
        choice = {"index": answer.index, "logprobs": None, "finish_reason": None} | choice
        return self.head | {"object": self.chunk_kind, "choices": [choice]}

    def _constant(self, answer: Answer) -> tuple[str, str]:
        """Return what stands before and after the new text of a chunk."""
        growth = self.delta("", _HOLE) if answer.growth.at_front else self.delta(_HOLE)
        before, _, after = to_line(self._chunk(answer, growth)).decode().partition(json.dumps(_HOLE))
        return before, after

    def _scores_now(self, answer: Answer) -> bool:
        """Return true if chunks have log-probabilities; of a text that grows at its front, they come last."""
        return self.logprobs and not answer.growth.at_front

    def _grown(self, answer: Answer, new: str) -> bytes:
        if self._scores_now(answer):
            tokens = self._sendable(answer)
            return to_line(self._chunk(answer, self.delta(new) | {"logprobs": self.scores(tokens)}))
        before, after = self._around[answer.index]
        return f"{before}{json.dumps(new)}{after}".encode()

    def _sendable(self, answer: Answer) -> list[Placed]:
        """Return the tokens, not yet sent, that begin in the text so far: those of a stop text never do."""
        unsent, length = self._unsent[answer.index], len(answer.text)
        self._unsent[answer.index] = [one for one in unsent if one.offset >= length]
        return [one for one in unsent if one.offset < length]

    def _closing(self, answer: Answer) -> Iterator[Json]:
        if answer.growth.at_front:
            scores = self.scores(in_order(answer, self.tokenizer)) if self.logprobs else None
            yield self.delta(answer.whole) | {"logprobs": scores}
        yield self.delta("") | {"finish_reason": answer.finish}


class ChatWire(Wire):
    """Responses of `/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, answer: Answer) -> Json:
        """Return the message."""
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def delta(self, text: str, prepend: str | None = None) -> Json:
        """Return `delta` with new text."""
        return {"delta": {"content": text} if prepend is None else {"prepend": prepend, "content": text}}

    def opening(self, answer: Answer) -> Json:
        """Return the choice that says who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def scores(self, tokens: Sequence[Placed]) -> Json:
        """Return the log-probabilities with each token's bytes."""
        return {"content": [self._token(one.token) for one in tokens], "refusal": None}

    def _token(self, token: Scored) -> Json:
        assert token.logprob is not None, "log-probabilities were asked for"
        top = [self._piece(id, logprob) for id, logprob in token.top]
        return self._piece(token.id, token.logprob) | {"top_logprobs": top}

    def _piece(self, id: int, logprob: float) -> Json:
        piece = self.tokenizer.decode_bytes([id])
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}


class CompletionWire(Wire):
    """Responses of `/v1/completions`."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, answer: Answer) -> Json:
        """Return the text, with the prompt if it is echoed."""
        return {"text": answer.whole}

    def delta(self, text: str, prepend: str | None = None) -> Json:
        """Return `text` with new text."""
        return {"text": text} if prepend is None else {"text": text, "prepend": prepend}

    def opening(self, answer: Answer) -> Json:
        """Return the choice with the prompt, if it is echoed."""
        echo = answer.echo.text if answer.echo else ""
        return self.delta("", echo) if answer.growth.at_front else self.delta(echo)

    def scores(self, tokens: Sequence[Placed]) -> Json:
        """Return the log-probabilities in columns; null for a token that does not fit the context."""
        return {
            "tokens": [self._name(one.token.id) for one in tokens],
            "token_logprobs": [one.token.logprob for one in tokens],
            "top_logprobs": [{self._name(id): logprob for id, logprob in one.token.top} or None for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _name(self, id: int) -> str:
        """Return a token's text; a part of a character as OpenAI writes it, such as `bytes:\\xe6\\x9d`."""
        piece = self.tokenizer.decode_bytes([id])
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
