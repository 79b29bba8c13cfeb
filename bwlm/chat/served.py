"""A model that is served: its engine, its readings, and requests to it by name."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bwlm.chat.answer import Answer, Echo
from bwlm.chat.dialogue import SEPARATOR, Dialogue, Fitted, Turn, Voice, document_prompt, from_talk
from bwlm.chat.engine import Engine, Request
from bwlm.chat.growth import TextGrowth
from bwlm.chat.protocol import ChatMessage, Generation, WritingRequest
from bwlm.chat.service import EngineService
from bwlm.directions import is_marked
from bwlm.errors import UserError, nearest
from bwlm.model.sampling import Sampling
from bwlm.text.conversation import Prompt
from bwlm.text.direction import is_mirrored
from bwlm.text.tokenizer import Tokenizer
from bwlm.trained.load import LoadedModel


class UnknownModel(UserError):
    """The model of a request is not among those that are served."""


@dataclass
class ServedModel:
    """Model under the name by which clients ask for it."""

    name: str
    voice: Voice
    tokenizer: Tokenizer
    engine: Engine
    about: dict[str, Any]
    """Facts that clients are told: phase, direction, depth, ..."""
    service: EngineService | None = None
    """Set while the server runs."""

    @classmethod
    def from_loaded(
        cls, name: str, loaded: LoadedModel, slots: int, waiting: int, compiled: bool = False
    ) -> ServedModel:
        """Return a loaded model with an engine. Raises `UserError` for a control direction, and as `Engine` does."""
        experiment = loaded.config.experiment
        voice = Voice.from_experiment(experiment)
        about = {
            "phase": experiment.phase,
            "depth": experiment.depth,
            "direction": experiment.direction,
            "readings": list(voice.readings),
            "manners": {reading: voice.manner(reading) for reading in voice.readings},
            "reversal": voice.reversal,
            "sequence_length": loaded.config.shape.sequence_length,
            "parameters": loaded.config.parameters.total,
            "run": loaded.config.id,
            "step": loaded.step,
            "created": int(time.time()),
            "fingerprint": loaded.config.fingerprint,
            "tokenizer": loaded.tokenizer.digest,
        }
        return cls(name, voice, loaded.tokenizer, Engine(loaded.model, slots, waiting, compiled=compiled), about)

    @property
    def context(self) -> int:
        """Most ids of a prompt."""
        return self.engine.config.sequence_length

    @property
    def head(self) -> int:
        """Number of ids before a text: BOS, and the marker of the reading if the model has two."""
        return 2 if is_marked(self.voice.direction) else 1

    def document(self, text: str, reading: str, room: int | None = None) -> Fitted:
        """Return the prompt for a text as a document, in at most `room` ids; by default all of the context."""
        return document_prompt(text, reading, self.voice.direction, self.tokenizer, room or self.context)

    def echo(self, text: str, reading: str, fitted: Fitted) -> Echo:
        """Return a text as it is sent back, with the ids that its prompt leaves out."""
        ids = self.tokenizer.encode(text).tolist()
        left_out = ids[len(ids) - fitted.dropped :] if is_mirrored(reading) else ids[: fitted.dropped]
        return Echo(text, self.head, left_out)

    @property
    def rendered_as(self) -> str:
        """Return `document` for a model of documents, which takes messages as one text; else `conversation`."""
        return "document" if self.voice.on_documents else "conversation"

    def as_object(self) -> dict[str, Any]:
        """Return the model as OpenAI's protocol lists it, with what is told about it."""
        return {"id": self.name, "object": "model", "owned_by": "bwlm", **self.about}

    def running(self) -> EngineService:
        """Return the service of the engine, while the server runs."""
        assert self.service is not None, "the server runs"
        return self.service

    def limit(self, body: WritingRequest) -> int:
        """Return the most tokens of an answer. Raises `UserError` for more than the context has."""
        if body.limit is None:
            return min(body.default_tokens, self.context)
        if body.limit > self.context:
            raise UserError(f"max_tokens: {body.limit}, and the model's context has {self.context}: ask for fewer")
        return body.limit

    def dialogue(self, messages: Sequence[ChatMessage], reading: str) -> Dialogue:
        """Return the dialogue of messages, in the order of the talk; `reading` is that of messages that name none.

        A system message joins the first message of the person, as in training. Raises `UserError` for messages that do
        not alternate from the person to the person, or that the model cannot take.
        """
        system, spoken = _without_system(messages)
        _check_alternate(spoken, len(messages) - len(spoken))
        turns: list[Turn] = []
        for message in spoken:
            if message.role == "user":
                turns.append(Turn("person", message.content, message.direction or reading))
            else:
                turns.append(Turn("model", self._apart(message.content, turns[-1].reading), turns[-1].reading))
        if system.strip():
            if self.voice.manner(turns[0].reading) == "asks":
                raise UserError("messages[0]: this model writes the user's messages, which a system message begins")
            turns[0] = turns[0]._replace(text=f"{system}{SEPARATOR}{turns[0].text}")
        return from_talk(self.voice, self.tokenizer, turns)

    def _apart(self, text: str, reading: str) -> str:
        """Return a message of the model; of a document with the blank line that the protocol puts between messages."""
        if not self.voice.on_documents:
            return text
        return text + SEPARATOR if is_mirrored(reading) else SEPARATOR + text

    def sampling(self, body: Generation, closing: int | None) -> Sampling:
        """Return how a request wants ids to be chosen; of special tokens `closing` alone may come."""
        banned = frozenset(self.tokenizer.specials.values()) - {closing}
        return Sampling(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty, banned)

    def answers(
        self,
        body: WritingRequest,
        limit: int,
        prompt: Prompt,
        reading: str,
        indices: range,
        logprobs: int | None = None,
        echo: Echo | None = None,
    ) -> list[Answer]:
        """Return an answer for each index, to be written after a prompt; the same seed gives the same texts.

        With `logprobs` the log-probability of each token is given, and this many of the likeliest ones.
        """
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sampling = self.sampling(body, prompt.stop)
        return [
            Answer(
                index,
                Request(
                    uuid.uuid4().hex,
                    prompt.ids,
                    limit,
                    sampling,
                    seed=seed + (index - indices.start << 64),  # no seed of another request
                    stop=frozenset({prompt.stop}),
                    is_over=_stop_text(self.tokenizer, reading, body.stop),
                    logprobs=logprobs,
                    prompt_logprobs=logprobs if echo else None,
                ),
                TextGrowth(self.tokenizer, reading, body.stop),
                echo,
            )
            for index in indices
        ]


def _without_system(messages: Sequence[ChatMessage]) -> tuple[str, Sequence[ChatMessage]]:
    """Return the text of a system message, which may come first, and the messages after it."""
    first = messages[0]
    return (first.content, messages[1:]) if first.role in ("system", "developer") else ("", messages)


def _check_alternate(messages: Sequence[ChatMessage], first: int) -> None:
    """Raise `UserError` unless user and assistant speak in turn, the user first and last; `first` is an index."""
    for place, message in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise UserError(f"messages[{first + place}].role: {message.role}, and it is the {expected}'s turn")
    if len(messages) % 2 == 0:
        raise UserError("messages: must end with the user, whom the model answers: add a message")


def _stop_text(tokenizer: Tokenizer, reading: str, stops: Sequence[str]) -> Callable[[int], bool] | None:
    """Return a function of each new id: true once the text has come to one of `stops`. Without any it is None."""
    if not stops:
        return None
    growth = TextGrowth(tokenizer, reading, stops)

    def is_over(id: int) -> bool:
        growth.add(id)
        return growth.stopped

    return is_over


def find(models: Sequence[ServedModel], name: str | None, direction: str | None) -> tuple[ServedModel, str]:
    """Return the model of a name, `ID` or `ID:reading`, and the reading in which it is to write.

    Without a name it is the first model, without a direction the model's first reading. Raises `UnknownModel`, and
    `UserError` for a reading in which the model cannot write.
    """
    if name is None:
        model, named = models[0], None
    else:
        id, _, named = name.partition(":")
        found = {model.name: model for model in models}
        if id not in found:
            raise UnknownModel(f"model: {id!r} is not served{nearest(id, found)}: see /v1/models")
        model = found[id]
    if named and direction and named != direction:
        raise UserError(f"direction: {direction}, and the model's name says {named}: leave one out")
    return model, model.voice.check(direction or named or model.voice.readings[0])
