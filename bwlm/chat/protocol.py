"""The requests that the server takes, checked before a model is asked: OpenAI's, reranking, and infilling.

A field that is missing or null has its default. A field that the server does not know is refused, so that a misspelt
one does not pass unseen; those that change nothing here are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bwlm.directions import TEXT_READINGS

MOST_MESSAGES = 500
MOST_CHARACTERS = 8_000
"""Most characters of a prompt, a document, or a message that a person wrote."""
MOST_CHARACTERS_IN_ALL = 32_000
"""Most characters of all messages, or all prompts, of a request."""
MOST_DOCUMENTS = 100
MOST_CHOICES = 16
"""Most texts that one request may ask for."""

_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields of OpenAI's protocol that change no answer here."""
_REFUSED = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "logit_bias": "it is not offered",
    "best_of": "use n and logprobs",
    "suffix": "use /infill",
    "tools": "the models call none",
    "functions": "the models call none",
    "response_format": "the models write plain text",
}
"""Fields of OpenAI's protocol that are not offered, and what to do instead."""
_NEUTRAL: tuple[Any, ...] = (None, 0, "", {}, [], {"type": "text"})
"""Values of such fields that ask for nothing; of `best_of` it is 1."""

Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Name = Annotated[str, Field(max_length=300)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


def _check_reading(reading: str) -> str:
    if reading not in TEXT_READINGS:
        raise ValueError(f"must be one of {', '.join(TEXT_READINGS)} (found {reading[:40]!r})")
    return reading


Reading = Annotated[str, AfterValidator(_check_reading)]


class _Body(BaseModel):
    """JSON object whose values must have the types that are declared: "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, content: Any) -> Any:
        """Leave out fields that are null or change nothing. Raises `ValueError` for a field that is not offered."""
        if not isinstance(content, Mapping):
            return content
        for name in _REFUSED.keys() & content.keys() - cls.model_fields.keys():
            if content[name] not in _NEUTRAL and (name, content[name]) != ("best_of", 1):
                raise ValueError(f"{name} is not supported: {_REFUSED[name]}")
        left_out = (_IGNORED | _REFUSED.keys()) - cls.model_fields.keys()
        return {name: value for name, value in content.items() if value is not None and name not in left_out}


class Generation(_Body):
    """Fields that say by which model, and how, text is written."""

    model: Name | None = None
    """`ID` or `ID:reading`; without one the first model."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class WritingRequest(Generation):
    """Fields that OpenAI's two endpoints share."""

    default_tokens: ClassVar[int]
    """Most tokens of an answer if nothing is said, and the context has so many."""

    direction: Reading | None = None
    """Reading in which to write; by default the one that the model's name says, or else its first."""
    stop: Annotated[list[StopText], Field(max_length=16)] = []
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, None if nothing is said."""
        return self.max_tokens


class ChatMessage(_Body):
    """Message of a talk: what the person wrote has the role user, what the model wrote the role assistant."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MOST_CHARACTERS_IN_ALL)]
    direction: Reading | None = None
    """Reading of the exchange that the message belongs to."""
    name: Name | None = None
    """Taken, and not used."""

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Return one text for OpenAI's list of parts. Raises `ValueError` for a part that is no text."""
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError('each part must be {"type": "text", "text": ..}')
        return "".join(part["text"] for part in content)

    @field_validator("content")
    @classmethod
    def _not_too_long(cls, content: str, message: ValidationInfo) -> str:
        """Check what a person wrote. A model's answer may be longer: it must be taken back as history."""
        if message.data.get("role") != "assistant" and len(content) > MOST_CHARACTERS:
            raise ValueError(f"{len(content)} characters: at most {MOST_CHARACTERS} characters in a message")
        return content


class ChatRequest(WritingRequest):
    """Body of `/v1/chat/completions`."""

    default_tokens = 256

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Newer name of `max_tokens`, which it goes before."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, None if nothing is said."""
        return self.max_completion_tokens or self.max_tokens

    @field_validator("messages")
    @classmethod
    def _not_too_long(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        _check_total(message.content for message in messages)
        return messages


class CompletionRequest(WritingRequest):
    """Body of `/v1/completions`."""

    default_tokens = 16

    prompt: Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, prompt: Any) -> Any:
        return [prompt] if isinstance(prompt, str) else prompt

    @field_validator("prompt")
    @classmethod
    def _not_too_long(cls, prompt: list[str]) -> list[str]:
        _check_total(prompt)
        return prompt

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MOST_CHOICES:
            raise ValueError(f"n times the number of prompts must be at most {MOST_CHOICES}")
        if self.limit == 0 and not self.echo:
            raise ValueError("max_tokens 0 gives nothing: set echo, or ask for tokens")
        return self


class RerankRequest(_Body):
    """Body of `/v1/rerank`, in the schema that Cohere's and Jina's clients share."""

    model: Name | None = None
    direction: Reading | None = None
    query: Annotated[Text, Field(min_length=1)]
    documents: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=MOST_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, documents: Any) -> Any:
        if not isinstance(documents, list):
            return documents
        return [one.get("text") if isinstance(one, dict) else one for one in documents]


class InfillRequest(Generation):
    """Body of `/infill`, with llama.cpp's names."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    n_predict: Annotated[int, Field(ge=1)] = 16
    """Tokens of the middle."""
    n: Annotated[int, Field(ge=1, le=4)] = 2
    """Texts that are written from each side."""
    stream: Literal[False] = False

    @model_validator(mode="after")
    def _has_a_side(self) -> InfillRequest:
        if not (self.input_prefix or self.input_suffix):
            raise ValueError("input_prefix and input_suffix are empty: give at least one")
        return self


def _check_total(texts: Any) -> None:
    if (total := sum(map(len, texts))) > MOST_CHARACTERS_IN_ALL:
        raise ValueError(f"{total} characters in all: at most {MOST_CHARACTERS_IN_ALL}")


BODIES = (ChatRequest, CompletionRequest, RerankRequest, InfillRequest)
"""Bodies of all endpoints."""
