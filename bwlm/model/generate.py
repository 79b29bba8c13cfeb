"""Decoding: generates ids after prompts, many rows at once or one row as a stream.

The ids of a row do not depend on the rows beside it, except for rounding: each row draws from its own stream of
random numbers.

Not here: the KV cache (`kv_cache.py`), and the order in which the ids of a text are read (`text/direction.py`).

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
    """Return at most `new_tokens` ids after each prompt, up to and including the first id in `stop`.

    Decodes greedily at temperature 0; else samples from softmax(logits / temperature), with `top_k` from the `top_k`
    best ids alone. Ids in `banned` are never chosen. `seeds` has one seed for each prompt, or is one seed from which
    each prompt gets its own. Decoding ends early where the row of `sequence_length` ids is full: the last id is the
    one that follows a full row.

    A prompt that occurs several times is read once. All rows are decoded at once: the caller bounds their memory.
    Raises `ValueError` if a prompt has no ids or more than a row holds, if there are not as many seeds as prompts, or
    if `temperature`, `top_k` or `banned` leave nothing to choose.
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
    """Return an iterator over the ids that `generate` gives for one prompt, each as soon as it is known.

    The ids are those of `seeds=[seed]`. In a conversation each prompt begins with the text so far. Pass the same
    `KVCache` instead of the model: it reads only the new ids. Run one stream at a time on a cache. Raises
    `ValueError` as `generate` does, before the first id.
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
    """Yield (row, id) as ids are chosen. `logits` [B, V] are for the ids after the rows that the cache has read."""
    live, count = list(range(len(limits))), 0  # index of the prompt that each row of the cache belongs to
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
    """Chooses the next id. Raises `ValueError` if temperature, `top_k` or `banned` leave nothing to choose."""

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
            raise ValueError("banned holds every id of the vocabulary: leave one out")

    def __call__(self, logits: Tensor, randoms: Sequence[Random]) -> list[int]:
        """Return an id for each row of logits [B, V]. Unless greedy, it draws one number from each row's stream."""
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
    """Return [B, 1]: the index where the cumulative sum of probabilities [B, V] passes the row's number in [0, 1).

    The sums are of integers, to 2^-40: they grow at every id that has a probability, at no other id, and equally on
    every device. Sums of floats that are added in parallel do not, and could choose a banned id.
    """
    sums = (probabilities * 2**40).long().cumsum(-1)
    reached = torch.tensor(uniform, dtype=torch.float64, device=sums.device) * sums[:, -1]
    return torch.searchsorted(sums, reached.long()[:, None], right=True)


def _randoms(seeds: Sequence[int] | int, rows: int) -> list[Random]:
    """Return a stream of random numbers for each row.

    Python's generator: a number takes 50 ns, and a row needs one at each step.
    """
    if isinstance(seeds, Sequence):
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} prompts: give one for each prompt")
        return [Random(f"{seed}") for seed in seeds]
    return [Random(f"{seeds} {row}") for row in range(rows)]


def _limit(config: GPTConfig, length: int, new_tokens: int) -> int:
    """Return how many ids can follow a prompt of `length` ids: `new_tokens`, or fewer where the row is full before."""
    longest = config.sequence_length
    if not 1 <= length <= longest:
        raise ValueError(f"the prompt has {length} ids: give 1 to {longest}")
    return max(0, min(new_tokens, longest + 1 - length))
