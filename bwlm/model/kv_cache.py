"""The KV cache: decodes the next token without reading the row again.

Every row begins at place 0 of the cache and grows to the right, to a length of its own. So a place is a position, a
row is read as it would be alone, and none runs into the limit of a longer one. What lies beyond a row's end, padding or
what it was before it was taken back, is hidden from it until it grows over it.

Not here: which id comes next and when a row ends (`generate.py`).

Axes: L layers, B rows, T ids of a row that are read at once, S places seen, H heads, K kv heads, G = H / K of them to a
group, D head dimension, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.attention import AttentionKernel, Mask, attend
from bwlm.model.gpt import GPT, KVState


class KVCache:
    """Reads rows with a model and goes on from what it has read.

    It decodes with the weights as they are when it is made, and leaves the model alone: the mode that it is in, and
    whether its blocks are compiled. Every key and value of its rows is kept: 2 L K D numbers a place.
    """

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.device = model.embedding.weight.device
        self.rows: list[list[int]] = []
        """What has been read."""
        self._model = _in_compute_dtype(model)
        self._kept = self._empty(0, 0)

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]], room: int) -> Tensor:
        """Forgets all rows and reads these, of any lengths: logits [B, V] for the id after each.

        None of them will have more than `room` ids. Rows that are the same are read once. Raises ValueError where there
        is none, one is empty, or the room is too small or more than the model's.
        """
        shortest, longest = min(map(len, rows), default=0), max(map(len, rows), default=0)
        if not 1 <= shortest <= longest <= room <= self.config.sequence_length:
            raise ValueError(
                f"rows of {shortest} to {longest} ids, in room for {room} of {self.config.sequence_length}"
            )
        distinct = {tuple(row): n for n, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        self.rows, self._kept = [[] for _ in distinct], self._empty(len(distinct), longest)
        logits, once = self._go_on(list(distinct)), self._kept
        copies = torch.tensor([distinct[tuple(row)] for row in rows], device=self.device)
        self.rows, self._kept = [list(row) for row in rows], self._empty(len(rows), room)
        self._kept[..., :longest, :] = once[:, :, copies]
        return logits[copies]

    @torch.inference_mode()
    def reread(self, row: Sequence[int]) -> Tensor:
        """Reads one row, but for what it begins with like the one before it: logits [1, V] for the id after it.

        Raises ValueError where it is empty or longer than the model's.
        """
        room = self.config.sequence_length
        if not 1 <= len(row) <= room:
            raise ValueError(f"{len(row)} ids in a row: give 1 to {room}")
        if len(self.rows) != 1 or self._kept.size(-2) < room:
            self.rows, self._kept = [[]], self._empty(1, room)
        # the last id is read in any case, for its logits
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.rows[0], row[:-1], strict=False))
        known = sum(1 for _ in alike)
        del self.rows[0][known:]
        return self._go_on([row[known:]])

    @torch.inference_mode()
    def follow(self, ids: Sequence[int]) -> Tensor:
        """Reads one further id of each row: logits [B, V] for the id after it."""
        return self._go_on([[new] for new in ids])

    @torch.inference_mode()
    def drop(self, ended: Collection[int]) -> list[int]:
        """Forgets these rows. The last ones move into their places, so that few are copied.

        Returns where each row of now was before.
        """
        left = len(self.rows) - len(ended)
        holes = [row for row in sorted(ended) if row < left]
        movers = [row for row in range(left, len(self.rows)) if row not in ended]
        if holes:
            longest = max(map(len, self.rows))
            self._kept[:, :, holes, :, :longest] = self._kept[:, :, movers, :, :longest]
        moved = dict(zip(holes, movers, strict=True))
        order = [moved.get(row, row) for row in range(left)]
        self.rows = [self.rows[row] for row in order]
        return order

    def _go_on(self, more: Sequence[Sequence[int]]) -> Tensor:
        """Reads further ids of each row: logits [B, V] for the id after the last of them."""
        time = max(map(len, more))
        ids = torch.tensor([[*row, *[0] * (time - len(row))] for row in more], device=self.device)
        last = torch.tensor([len(row) - 1 for row in more], device=self.device)
        logits = self._model.next_logits(ids, last, self._past(time))
        for row, new in zip(self.rows, more, strict=True):
            row.extend(new)
        return logits

    def _past(self, time: int) -> KVState:
        """For `time` further ids of each row."""
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        places = lengths[:, None] + torch.arange(time, device=self.device)
        seen = max(map(len, self.rows)) + time
        mask = None
        if seen > time:
            groups = self.config.heads // self.config.kv_heads
            mask = _mask(places, seen, self._kept.dtype).repeat(1, 1, groups, 1)
        rope = self._model.cos[places][:, None], self._model.sin[places][:, None]
        return KVState(rope, [partial(_attend, kept, _Step(places, seen, mask)) for kept in self._kept])

    def _empty(self, rows: int, places: int) -> Tensor:
        """[L, 2, B, K, S, D] of zeros, not of whatever memory holds: what is hidden is multiplied too, by 0."""
        config = self.config
        # CPUs multiply single queries by keys in float32 two to five times as fast as in bfloat16
        dtype = torch.float32 if self.device.type == "cpu" else self._model.compute_dtype
        shape = (config.depth, 2, rows, config.kv_heads, places, config.head_dim)
        return torch.zeros(shape, dtype=dtype, device=self.device)


class _Step(NamedTuple):
    """What the layers share when rows go on."""

    places: Tensor
    """[B, T] of the ids that are read"""
    seen: int
    """Places up to the last of them, in any row"""
    mask: Tensor | None
    """[B, 1, G T, S], to be added; None where rows begin"""


def _mask(places: Tensor, seen: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, S]: 0 where the id at a place [B, T] may look, -inf at what comes later."""
    later = torch.arange(seen, device=places.device) > places[..., None]
    return torch.zeros(later.shape, dtype=dtype, device=places.device).masked_fill_(later, -torch.inf)[:, None]


def _attend(kept: Tensor, step: _Step, q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: AttentionKernel) -> Tensor:
    """What `attend` does, for queries that also see what was read before; keeps k and v [B, K, T, D] in one layer."""
    keys, values = kept
    rows = torch.arange(len(q), device=q.device)[:, None]
    keys[rows, :, step.places] = k.transpose(1, 2).to(keys.dtype)
    values[rows, :, step.places] = v.transpose(1, 2).to(values.dtype)
    if step.mask is None:
        return attend(q, k, v, mask, kernel)
    # a group's queries see the same keys, and are multiplied by them as if they were one head's
    y = F.scaled_dot_product_attention(
        q.reshape(len(q), k.size(1), -1, q.size(-1)).to(keys.dtype),  # [B, K, G T, D]
        keys[: len(q), :, : step.seen],
        values[: len(q), :, : step.seen],
        attn_mask=step.mask,
    )
    return y.view_as(q).to(q.dtype)


def _in_compute_dtype(model: GPT) -> GPT:
    """The model with its weights in the dtype that it multiplies in: the same numbers, cast once and not at every id.

    In evaluation mode, not compiled, and of the same memory where nothing is to be cast.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor.detach().to(model.compute_dtype) for tensor in tensors}).eval()
