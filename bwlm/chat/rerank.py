"""Documents in the order in which a query follows from them: log p(query | document), for each token of the query.

In either reading the model reads the document before the query:

- a model of documents, and one that answers, reads the two as one text: forward `document, blank line, query` from the
  beginning, backward `query, blank line, document` from the end;
- a model that asks, which reads whole conversations backward, reads the document as an answer, and scores the query as
  the question before it. That is what it was trained to write.
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bwlm.chat.dialogue import SEPARATOR
from bwlm.chat.engine import Event, Request
from bwlm.chat.served import ServedModel
from bwlm.errors import UserError
from bwlm.text.conversation import Message, build_prompt
from bwlm.text.direction import arrange, is_mirrored


class Ranking(NamedTuple):
    """Requests that score a query, one for each document, and how many ids of each are the query's."""

    requests: list[Request]
    query_ids: int

    def score(self, event: Event) -> float:
        """Return log p(query | document) in nats from what a request brought."""
        return math.fsum(token.logprob or 0.0 for token in event.prompt[-self.query_ids :])


def rank(model: ServedModel, reading: str, query: str, documents: Sequence[str]) -> Ranking:
    """Return what scores a query. Raises `UserError` if it takes more than half of the context.

    A document that does not fit beside it loses the ids farthest from it.
    """
    encoded = model.tokenizer.encode(query).astype(np.int64)
    ids = arrange(encoded, reading, len(encoded)).tolist()
    if len(ids) > model.context // 2:
        raise UserError(f"query: takes {len(ids)} tokens, and the model has room for {model.context // 2}: shorten it")
    return Ranking([_request(model, reading, document, ids) for document in documents], len(ids))


def _request(model: ServedModel, reading: str, document: str, query: list[int]) -> Request:
    before, opening = _before_query(model, reading, document)
    extra = max(0, len(before) + len(query) - model.context)
    ids = before[:opening] + before[opening + extra :] + query
    return Request(uuid.uuid4().hex, ids, max_tokens=0, prompt_logprobs=0)


def _before_query(model: ServedModel, reading: str, document: str) -> tuple[list[int], int]:
    """Return the ids that the model reads before the query, and how many of the first ones are not the document's."""
    voice, tokenizer = model.voice, model.tokenizer
    if voice.manner(reading) == "asks":
        answer = [Message("assistant", document)]
        return build_prompt(answer, reading, voice.direction, voice.reversal, tokenizer).ids, model.head + 1
    text = SEPARATOR + document if is_mirrored(reading) else document + SEPARATOR
    return model.document(text, reading, sys.maxsize).prompt.ids, model.head


def results(scores: Sequence[float], query_ids: int, documents: Sequence[str], most: int, whole: bool) -> list[Any]:
    """Return the best `most` documents in the form of Cohere and Jina, the best first; `whole` adds their texts.

    The relevance is the geometric mean of the query's token probabilities, so that it lies between 0 and 1.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:most]
    return [
        {"index": index, "relevance_score": math.exp(scores[index] / query_ids), "log_likelihood": scores[index]}
        | ({"document": {"text": documents[index]}} if whole else {})
        for index in order
    ]
