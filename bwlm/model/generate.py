"""Decoding: generates ids after prompts, many rows at once or one row as a stream.

What a row says does not depend on the rows beside it, except for rounding: each draws from a stream of random numbers
of its own.

Not here: what is kept of a row that is read (`cache.py`), and in what order a text's ids go in (`text/direction.py`).

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.shape import GPTConfig


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: Collection[int] = frozenset(),
    banned: Collection[int] = frozenset(),
    seeds: Sequence[int] | int = 0,
) -> list[list[int]]:
    """At most `new_tokens` ids that follow each prompt, up to and with the first one that is in `stop`.

    Greedy at temperature 0, else drawn from softmax(logits / temperature), of the `top_k` best alone where that is
    given; never one of `banned`. `seeds` has one for each prompt, or is one from which each gets its own. Where the row
    of `sequence_length` ids is full, decoding ends early: the last id is the one that follows a full row.

    A prompt that occurs several times is read once. All rows are decoded at once: what they need is the caller's to
    bound. Raises ValueError where a prompt has no ids or more than a row, where seeds are not as many as prompts, and
    for a temperature, `top_k` or `banned` with which nothing can be chosen.
    """
    choice = Sampler(model.config, temperature, top_k, banned)
    limits = [_limit(model.config, len(prompt), new_tokens) for prompt in prompts]
    randoms = _randoms(seeds, len(prompts))
    new: list[list[int]] = [[] for _ in prompts]
    if any(limits):
        reader = KVCache(model)
        room = max(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True))
        logits = reader.read(prompts, room)
        for row, chosen in _decode(reader, logits, choice, randoms, limits, stop):
            new[row].append(chosen)
    return new


def stream(
    model: GPT | KVCache,
    ids: Sequence[int],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: Collection[int] = frozenset(),
    banned: Collection[int] = frozenset(),
    seed: int = 0,
) -> Iterator[int]:
    """The ids that `generate` gives for one prompt and `seeds=[seed]`, each as soon as it is known.

    In a conversation, which begins each time with what was said before, a `KVCache` that is given instead of its model
    reads only what is new; one stream of it at a time. Raises ValueError as `generate` does, before the first id.
    """
    reader = model if isinstance(model, KVCache) else KVCache(model)
    choice = Sampler(reader.config, temperature, top_k, banned)
    limit, randoms, ids = _limit(reader.config, len(ids), new_tokens), _randoms([seed], 1), list(ids)

    def decoded() -> Iterator[int]:
        if limit:
            for _, chosen in _decode(reader, reader.reread(ids), choice, randoms, [limit], stop):
                yield chosen

    return decoded()


def _decode(
    reader: KVCache,
    logits: Tensor,
    choice: Sampler,
    randoms: Sequence[Random],
    limits: Sequence[int],
    stop: Collection[int],
) -> Iterator[tuple[int, int]]:
    """(row, id) as they are chosen. `logits` [B, V] are for the ids after the rows that were read."""
    live, count = list(range(len(limits))), 0  # which of the rows each row of the reader is
    while True:
        chosen = choice(logits, [randoms[row] for row in live])
        count += 1
        yield from zip(live, chosen, strict=True)
        ended = {n for n, row in enumerate(live) if chosen[n] in stop or count == limits[row]}
        if len(ended) == len(live):
            return
        order = reader.drop(ended)
        live = [live[n] for n in order]
        logits = reader.follow([chosen[n] for n in order])


class Sampler:
    """Which id comes next. Raises ValueError for what leaves nothing to choose."""

    def __init__(self, config: GPTConfig, temperature: float, top_k: int | None, banned: Collection[int]) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        self.temperature = temperature
        self.top_k = None if top_k is None else min(top_k, config.vocab_size)
        self.banned = sorted(set(banned))
        if self.banned and not 0 <= self.banned[0] <= self.banned[-1] < config.vocab_size:
            raise ValueError(f"banned ids must be of the vocabulary, 0 to {config.vocab_size - 1}, not {self.banned}")
        if len(self.banned) == config.vocab_size:
            raise ValueError("every id is banned")

    def __call__(self, logits: Tensor, randoms: Sequence[Random]) -> list[int]:
        """An id for each row of logits [B, V]; each row's random numbers are advanced by one."""
        if self.banned:
            logits = logits.index_fill(1, torch.tensor(self.banned, device=logits.device), -torch.inf)
        if self.temperature == 0:
            return [int(best) for best in logits.argmax(-1).tolist()]
        kept = None
        if self.top_k is not None:
            logits, kept = logits.topk(self.top_k)
        drawn = _draw(torch.softmax(logits / self.temperature, -1), [random.random() for random in randoms])
        if kept is not None:
            drawn = kept.gather(1, drawn)
        return [int(one) for one in drawn.flatten().tolist()]


def _draw(probabilities: Tensor, uniform: list[float]) -> Tensor:
    """[B, 1]: where the sum of probabilities [B, V] passes a row's number of [0, 1).

    The sums are of integers, to 2^-40: they grow with every id that has a probability, with no other, and alike on
    every device. Sums of floats that are added in parallel do not, and would let ids through that are banned.
    """
    sums = (probabilities * 2**40).long().cumsum(-1)
    reached = torch.tensor(uniform, dtype=torch.float64, device=sums.device) * sums[:, -1]
    return torch.searchsorted(sums, reached.long()[:, None], right=True)


def _randoms(seeds: Sequence[int] | int, rows: int) -> list[Random]:
    """A stream of random numbers for each row. Python's: a number of it takes 50 ns, and a row has one at each step."""
    if isinstance(seeds, Sequence):
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} prompts")
        return [Random(f"{seed}") for seed in seeds]
    return [Random(f"{seeds} {row}") for row in range(rows)]


def _limit(config: GPTConfig, length: int, new_tokens: int) -> int:
    """How many ids can follow as many."""
    longest = config.sequence_length
    if not 1 <= length <= longest:
        raise ValueError(f"{length} ids to go on from: give 1 to {longest}")
    return max(0, min(new_tokens, longest + 1 - length))
