"""Continuous batching: requests join a running batch at any step, and leave it when they end.

A row of the KV cache is called a slot. The first slots hold the requests that are being decoded; the others keep what
was last read in them, so that a prompt that begins like an earlier one, such as the next turn of a chat, is read from
where it differs. Prompts are read in parts between the steps of decoding, so that a long prompt does not hold up the
others.

What a request says does not depend on the others, except for rounding: each has its own random numbers.

Not here: text and directions (`dialogue.py`, `growth.py`), threads (`service.py`).

Axes: T ids, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from torch import Tensor

from bwlm.errors import BwlmError
from bwlm.model.compiled_cache import CompiledKVCache
from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.sampling import Sampling, choose

Finish = Literal["stop", "length"]
GREEDY = Sampling()


class Busy(BwlmError):
    """The engine has as many requests as it takes: try again later."""


@dataclass(frozen=True)
class Request:
    """Prompt, and how to go on from it."""

    id: str
    """Unique among the requests of an engine."""
    ids: Sequence[int]
    max_tokens: int
    """Most ids that are generated; 0: the prompt is only read."""
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: frozenset[int] = frozenset()
    """Ids that end it; the last one is part of what is generated."""
    is_over: Callable[[int], bool] | None = None
    """Called with each generated id: true if it ends the request, such as by a stop text."""
    logprobs: int | None = None
    """Give the log-probability of each generated id, and this many of the likeliest ids."""
    prompt_logprobs: int | None = None
    """The same for the ids of the prompt; the prompt is then read whole."""


@dataclass(frozen=True)
class Scored:
    """Id with its log-probability in nats, of the model itself: before temperature, penalty and filters."""

    id: int
    logprob: float | None
    """None for the first id of a prompt, or if it was not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest ids at its place, best first."""


@dataclass(frozen=True)
class Event:
    """Result of one step for one request."""

    request: str
    token: Scored | None = None
    """Generated id."""
    prompt: tuple[Scored, ...] = ()
    """Ids of the prompt, where their log-probabilities were asked for."""
    finish: Finish | None = None
    """Reason of the end; None while it goes on."""


@dataclass
class _Running:
    request: Request
    random: Random
    limit: int
    """Most ids that can be generated, as long as the row has room."""
    count: int = 0
    prompt: list[Scored] = field(default_factory=list)


class Engine:
    """Model that serves many requests at once; `step` does one round of work for all of them.

    Its memory is that of `slots` rows: 8 L K D bytes a place in float32. At most `waiting` more requests wait for a
    slot. `compiled` takes a `CompiledKVCache`, and may raise `CannotCompile`.
    """

    def __init__(
        self, model: GPT, slots: int = 8, waiting: int = 64, prompt_part: int = 256, compiled: bool = False
    ) -> None:
        self.config = model.config
        self.slots, self.waiting = slots, waiting
        self._cache = CompiledKVCache(model) if compiled else KVCache(model)
        self._cache.reserve(slots, model.config.sequence_length)
        self._prompt_part = prompt_part
        self._queue: deque[_Running] = deque()
        self._reading: _Running | None = None
        """Request whose prompt is read in slot `len(self._decoding)`."""
        self._decoding: list[_Running] = []
        """Requests of the first slots."""
        self._next: list[int] = []
        """Last id of each of them, not yet read."""
        self._used = [0] * slots
        self._clock = 0
        self.prompt_ids = self.reused_ids = self.generated_ids = 0
        """Ids of all prompts, those of them that were not read again, and ids that were generated."""

    # ---- requests ----

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._decoding) + (self._reading is not None)

    @property
    def queued(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._queue)

    def check(self, request: Request) -> None:
        """Raise `ValueError` if the model cannot serve a request."""
        longest = self.config.sequence_length
        if not 1 <= len(request.ids) <= longest:
            raise ValueError(f"the prompt has {len(request.ids)} ids: give 1 to {longest}")
        request.sampling.check_vocabulary(self.config.vocab_size)

    def add(self, request: Request) -> None:
        """Take a request. Raises `ValueError` as `check` does, and `Busy` if too many requests wait."""
        self.check(request)
        if self.running + self.queued >= self.slots + self.waiting:
            raise Busy("too many requests wait: try again in a second")
        room = self.config.sequence_length + 1 - len(request.ids)  # the last id follows a full row
        self._queue.append(_Running(request, Random(f"{request.seed}"), min(request.max_tokens, room)))

    def cancel(self, id: str) -> None:
        """Forget a request, wherever it is; one that has ended is none."""
        self._queue = deque(one for one in self._queue if one.request.id != id)
        if self._reading and self._reading.request.id == id:
            self._reading = None
        for slot in [slot for slot, one in enumerate(self._decoding) if one.request.id == id]:
            self._leave(slot)

    def cancel_all(self) -> None:
        """Forget all requests, and all that was read."""
        self._queue.clear()
        self._reading = None
        self._decoding.clear()
        self._next.clear()
        self._cache.reserve(self.slots, self.config.sequence_length)

    def stream(self, request: Request) -> Iterator[Event]:
        """Serve one request alone, step by step; a stream that is closed early is cancelled."""
        self.add(request)
        try:
            finished = False
            while not finished:
                for event in self.step():
                    if event.request == request.id:
                        finished = event.finish is not None
                        yield event
        finally:
            self.cancel(request.id)

    # ---- one round of work ----

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read up to `prompt_part` ids of prompts, then decode one id of each request; return what came out."""
        return [*self._read_prompts(), *self._decode()]

    def _decode(self) -> list[Event]:
        joined = len(self._next)
        if not joined:
            return []
        logits = self._cache.follow(self._next)
        return self._choose(logits, range(joined))

    def _choose(self, logits: Tensor, slots: Sequence[int]) -> list[Event]:
        """Choose the next id of the requests in `slots`, whose logits [B, V] are given; those that end leave."""
        chosen = self._sample(logits, slots)
        events, ended = [], []
        for row, (slot, new) in enumerate(zip(slots, chosen, strict=True)):
            one = self._decoding[slot]
            one.count += 1
            finish = _finish(one, new)
            wanted = one.request.logprobs
            token = Scored(new, None) if wanted is None else _scored(logits[row : row + 1], [new], wanted)[0]
            events.append(Event(one.request.id, token, tuple(one.prompt) if one.count == 1 else (), finish))
            self._next[slot] = new
            if finish:
                ended.append(slot)
        self.generated_ids += len(chosen)
        for slot in reversed(ended):  # from the last on: the one that moves into a free slot goes on
            self._leave(slot)
        return events

    def _sample(self, logits: Tensor, slots: Sequence[int]) -> list[int]:
        """Choose an id for each row of logits [B, V]; rows with the same settings are sampled together."""
        groups: dict[Sampling, list[int]] = {}
        for row, slot in enumerate(slots):
            groups.setdefault(self._decoding[slot].request.sampling, []).append(row)
        chosen = [0] * len(slots)
        for sampling, rows in groups.items():
            alone = logits if len(groups) == 1 else logits[rows]
            randoms = [self._decoding[slots[row]].random for row in rows]
            seen = [self._cache.rows[slots[row]] for row in rows]
            for row, new in zip(rows, choose(alone, sampling, randoms, seen), strict=True):
                chosen[row] = new
        return chosen

    def _leave(self, slot: int) -> None:
        """Free the slot of a request; the last request moves there, and the slot behind it is free."""
        last = len(self._decoding) - 1
        self._cache.swap(slot, last)
        self._clock += 1
        self._used[slot], self._used[last] = self._used[last], self._clock
        self._decoding[slot], self._next[slot] = self._decoding[last], self._next[last]
        del self._decoding[last], self._next[last]
        if self._reading is not None:  # its slot stays next to those that decode
            self._swap_idle(last, last + 1)

    def _swap_idle(self, first: int, second: int) -> None:
        self._cache.swap(first, second)
        self._used[first], self._used[second] = self._used[second], self._used[first]

    # ---- prompts ----

    def _read_prompts(self) -> list[Event]:
        events: list[Event] = []
        part = self._prompt_part
        while part > 0 and (self._reading or self._begin_next()):
            assert self._reading is not None
            read, ended = self._read_part(self._reading, part)
            part -= read
            events += ended
        return events

    def _begin_next(self) -> bool:
        """Give the first waiting request a slot, with as much of its prompt as some slot already holds."""
        slot = len(self._decoding)
        if not self._queue or slot == self.slots:
            return False
        one = self._reading = self._queue.popleft()
        ids = one.request.ids
        self.prompt_ids += len(ids)
        # the last id is always read, for its logits
        most = 0 if one.request.prompt_logprobs is not None else len(ids) - 1
        shared = [_shared(row, ids, most) for row in self._cache.rows]
        source = max(range(self.slots), key=lambda at: (shared[at], at >= slot))
        oldest = min(range(slot, self.slots), key=lambda at: self._used[at])
        # a slot that would lose most of its ids is copied, not overwritten
        in_place = source >= slot and 2 * shared[source] >= len(self._cache.rows[source])
        target = source if in_place else oldest
        if target != source:
            self._cache.copy(source, target, shared[source])
        self._cache.cut(target, shared[source])
        self.reused_ids += shared[source]
        self._swap_idle(slot, target)
        return True

    def _read_part(self, one: _Running, part: int) -> tuple[int, list[Event]]:
        """Read at most `part` further ids of a prompt; with the last of them the request joins those that decode."""
        slot, request = len(self._decoding), one.request
        known = len(self._cache.rows[slot])
        ids = list(request.ids[known : known + part])
        if request.prompt_logprobs is None:
            logits = self._cache.extend(slot, ids)
        else:
            logits = self._cache.extend_scored(slot, ids)
            one.prompt += self._prompt_scores(one, logits, known)
            logits = logits[-1:]
        if known + len(ids) < len(request.ids):
            return len(ids), []
        self._reading = None
        if not one.limit:
            return len(ids), [Event(request.id, None, tuple(one.prompt), "length")]
        self._decoding.append(one)
        self._next.append(0)
        return len(ids), self._choose(logits, [slot])

    def _prompt_scores(self, one: _Running, logits: Tensor, known: int) -> list[Scored]:
        """Return the ids of a prompt whose logits [T, V] are given, those of the places after `known` ids."""
        first = [Scored(one.request.ids[0], None)] if known == 0 else []
        following = list(one.request.ids[known + 1 : known + 1 + len(logits)])
        return first + _scored(logits[: len(following)], following, one.request.prompt_logprobs or 0)


def _finish(one: _Running, new: int) -> Finish | None:
    if new in one.request.stop or (one.request.is_over is not None and one.request.is_over(new)):
        return "stop"
    return "length" if one.count == one.limit else None


def _scored(logits: Tensor, ids: list[int], top: int) -> list[Scored]:
    """Return each of the ids [T] with its log-probability, given the logits [T, V] at its place."""
    log_p = torch.log_softmax(logits.float(), -1)
    own = log_p[torch.arange(len(ids)), torch.tensor(ids, device=log_p.device, dtype=torch.long)].tolist()
    best = log_p.topk(min(top, log_p.size(1)), -1)
    return [
        Scored(new, logprob, tuple(zip(likeliest, values, strict=True)))
        for new, logprob, likeliest, values in zip(ids, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _shared(row: Sequence[int], ids: Sequence[int], most: int) -> int:
    """Return how many first ids two rows have in common, at most `most`: by bisection, so that slices are compared."""
    most = min(most, len(row))
    if row[:most] == list(ids[:most]):
        return most
    return bisect_left(range(1, most + 1), True, key=lambda length: row[:length] != list(ids[:length]))
