"""Decoding: generates ids after prompts, many rows at once or one row as a stream.

The ids of a row do not depend on the rows beside it, except for rounding: each row draws from its own stream of
random numbers.

Not here: the KV cache (`kv_cache.py`), the choice of an id (`sampling.py`), requests that join and leave a running
batch (`chat/engine.py`), and the order in which the ids of a text are read (`text/direction.py`).

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from random import Random

from torch import Tensor

from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.sampling import Sampling, choose
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
    sampling = _sampling(model.config, temperature, top_k, banned)
    limits = [_limit(model.config, len(prompt), new_tokens) for prompt in prompts]
    randoms = _randoms(seeds, len(prompts))
    new: list[list[int]] = [[] for _ in prompts]
    if any(limits):
        reader = KVCache(model)
        room = max(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True))
        logits = reader.read(prompts, room)
        for row, chosen in _decode(reader, logits, sampling, randoms, limits, stop):
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
    sampling = _sampling(reader.config, temperature, top_k, banned)
    limit, randoms, ids = _limit(reader.config, len(ids), new_tokens), _randoms([seed], 1), list(ids)

    def decoded() -> Iterator[int]:
        if limit:
            for _, chosen in _decode(reader, reader.reread(ids), sampling, randoms, [limit], stop):
                yield chosen

    return decoded()


def _decode(
    reader: KVCache,
    logits: Tensor,
    sampling: Sampling,
    randoms: Sequence[Random],
    limits: Sequence[int],
    stop: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yield (row, id) as ids are chosen. `logits` [B, V] are for the ids after the rows that the cache has read."""
    live, count = list(range(len(limits))), 0  # index of the prompt that each row of the cache belongs to
    while True:
        chosen = choose(logits, sampling, [randoms[row] for row in live])
        count += 1
        yield from zip(live, chosen, strict=True)
        ended = {n for n, row in enumerate(live) if chosen[n] in stop or count == limits[row]}
        if len(ended) == len(live):
            return
        order = reader.drop(ended)
        live = [live[n] for n in order]
        logits = reader.follow([chosen[n] for n in order])


def _sampling(config: GPTConfig, temperature: float, top_k: int | None, banned: Collection[int]) -> Sampling:
    sampling = Sampling(temperature, top_k, banned=frozenset(banned))
    sampling.check_vocabulary(config.vocab_size)
    return sampling


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
