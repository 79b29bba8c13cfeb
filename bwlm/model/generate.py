"""Decoding: ids that follow ids, one at a time.

Not here: a cache of keys and values (each new id reads the whole row again, so a row of T ids costs T forward passes),
batches, top-k, and in what order a text's ids go in (`text/direction.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bwlm.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    ids: Sequence[int],
    new_tokens: int,
    temperature: float = 0.0,
    stop: Collection[int] = frozenset(),
    seed: int = 0,
) -> list[int]:
    """At most `new_tokens` ids that follow `ids`, up to and with the first one that is in `stop`.

    Greedy at temperature 0, else drawn from softmax(logits / temperature) with a generator of `seed`. Where the row of
    `sequence_length` ids is full, decoding ends early: the last id is the one that follows a full row. Raises
    ValueError where `ids` are none or more than a row, or the temperature is negative.
    """
    longest = model.config.sequence_length
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"{len(ids)} ids to go on from: give 1 to {longest}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    row = list(ids)
    for _ in range(min(new_tokens, longest + 1 - len(ids))):
        logits = model(torch.tensor([row], device=device))[0, -1]
        row.append(_choose(logits.cpu(), temperature, generator))
        if row[-1] in stop:
            break
    return row[len(ids) :]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """An id by its logits [V], which lie on the CPU: other devices' generators draw other ids for the same seed."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
