"""The middle of a text, written from both sides by a bidirectional model.

The model goes on from the prefix, and writes backward from the suffix, texts of the same number of tokens. Candidates
are each of them, and each pair's first half from the one and second half from the other. The best is the one that makes
the whole text likeliest: log p(prefix, middle, suffix), which is the joint likelihood in either reading, as the mean
of both. Candidates have equally many tokens, since a shorter one would be likelier for its length alone.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bwlm.chat.engine import Event, Request
from bwlm.chat.protocol import InfillRequest
from bwlm.chat.served import ServedModel
from bwlm.directions import TEXT_READINGS
from bwlm.errors import UserError

FORWARD, BACKWARD = TEXT_READINGS
_SPARE = 16
"""Ids by which the joined text may be longer than its parts."""


class Candidate(NamedTuple):
    """Text for the middle."""

    content: str
    written: str
    """`forward`, `backward`, or `both`."""
    scoring: dict[str, Request]
    """Requests that score the whole text, by reading."""


class Infill:
    """Prefix and suffix, cut to what fits the context: the ids farthest from the middle are left out."""

    def __init__(self, model: ServedModel, body: InfillRequest) -> None:
        """Take a request. Raises `UserError` if the model has one reading alone, or the middle leaves no room."""
        if set(model.voice.readings) != set(TEXT_READINGS):
            only = model.voice.readings[0]
            raise UserError(f"model: {model.name} reads {only} alone: /infill needs a bidirectional model")
        room = model.context - body.n_predict - _SPARE
        if room < model.context // 2:
            raise UserError(f"n_predict: {body.n_predict}, at most {model.context // 2 - _SPARE} for this model")
        self.model, self.body = model, body
        before, after = model.tokenizer.encode(body.input_prefix), model.tokenizer.encode(body.input_suffix)
        kept_after = min(len(after), max(room // 2, room - len(before)))
        kept_before = min(len(before), room - kept_after)
        self.prefix = _text(model, before[len(before) - kept_before :].tolist())
        self.suffix = _text(model, after[:kept_after].tolist())
        self.left_out = len(before) - kept_before + len(after) - kept_after

        self._sampling = model.sampling(body, closing=None)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        self._forward = self._writing(FORWARD, self.prefix, seed)
        self._backward = self._writing(BACKWARD, self.suffix, seed)
        self._candidates: list[Candidate] = []

    def _writing(self, reading: str, text: str, seed: int) -> list[Request]:
        ids = self.model.document(text, reading).prompt.ids
        indices = range(self.body.n)
        return [
            Request(uuid.uuid4().hex, ids, self.body.n_predict, self._sampling, seed + (index << 64))
            for index in indices
        ]

    @property
    def writing(self) -> list[Request]:
        """Requests that write from both sides."""
        return self._forward + self._backward

    def scoring(self, events: Mapping[str, Sequence[Event]]) -> list[Request]:
        """Return requests that score the candidates, from what the requests that write brought."""
        self._candidates = self._found(events)
        return [request for one in self._candidates for request in one.scoring.values()]

    def _found(self, events: Mapping[str, Sequence[Event]]) -> list[Candidate]:
        """Return the candidates that differ."""
        forward = [_ids(events[request.id]) for request in self._forward]
        backward = [_ids(events[request.id])[::-1] for request in self._backward]
        half = self.body.n_predict // 2
        both = [before[:half] + after[half:] for before, after in zip(forward, backward, strict=True)]
        found: dict[str, Candidate] = {}
        for written, texts in ((FORWARD, forward), (BACKWARD, backward), ("both", both)):
            for text in texts:
                content = _text(self.model, text)
                scoring = {reading: self._scoring_in(reading, content) for reading in TEXT_READINGS}
                found.setdefault(content, Candidate(content, written, scoring))
        return list(found.values())

    def _scoring_in(self, reading: str, middle: str) -> Request:
        ids = self.model.document(self.prefix + middle + self.suffix, reading).prompt.ids
        return Request(uuid.uuid4().hex, ids, max_tokens=0, prompt_logprobs=0)

    def ranked(self, events: Mapping[str, Sequence[Event]]) -> list[dict[str, Any]]:
        """Return the candidates with their scores, the best first, from what their requests brought."""
        middles = []
        for one in self._candidates:
            by_reading = {
                reading: math.fsum(token.logprob or 0.0 for token in events[request.id][-1].prompt[self.model.head :])
                for reading, request in one.scoring.items()
            }
            score = sum(by_reading.values()) / len(by_reading)
            middles.append({"content": one.content, "written": one.written, "log_likelihood": score} | by_reading)
        return sorted(middles, key=lambda middle: -middle["log_likelihood"])


def _ids(events: Sequence[Event]) -> list[int]:
    return [event.token.id for event in events if event.token]


def _text(model: ServedModel, ids: list[int]) -> str:
    """Return the text of ids, without parts of characters at its ends."""
    return model.tokenizer.decode_bytes(ids).decode(errors="ignore")
