"""The KV cache: decodes the next token without reading the row again.

Every row begins at place 0 of the cache and grows to the right, to a length of its own. So a place in the cache is a
position, a row is read as it would be alone, and no row meets the length limit of a longer one. Places beyond a row's
end hold padding or dropped ids; the row does not see them until it overwrites them.

Not here: the choice of the next id and the end of a row (`generate.py`), and a faster step (`compiled_cache.py`).

Axes: L layers, B rows, T ids of a row that are read at once, S places seen, H heads, K kv heads, G = H / K heads of a
group, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.attention import AttentionKernel, attend
from bwlm.model.decoder import Decoder
from bwlm.model.gpt import GPT


class KVCache:
    """Keys and values of the rows that a model has read, to continue them.

    Decodes with the weights that the model had when the cache was made. The model itself stays as it is, in its mode
    and with its blocks compiled or not. The cache holds every key and value of its rows: 2 L K D numbers a place.
    """

    def __init__(self, model: GPT, decoder: type[Decoder] = Decoder) -> None:
        self.config = model.config
        self.device = model.embedding.weight.device
        self.rows: list[list[int]] = []
        """Ids of each row that has been read."""
        self._decoder = decoder(model)
        self._kept = self._empty(0, 0)

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]], room: int) -> Tensor:
        """Forget all rows and read these, of any lengths; return logits [B, V] for the id after each.

        No row may grow beyond `room` ids. Equal rows are read once. Raises `ValueError` if there is no row, a row is
        empty or longer than `room`, or `room` is more than the model's sequence length.
        """
        shortest, longest = min(map(len, rows), default=0), max(map(len, rows), default=0)
        if not 1 <= shortest <= longest <= room <= self.config.sequence_length:
            raise ValueError(
                f"rows have {shortest} to {longest} ids: give 1 to room={room}, and room at most "
                f"{self.config.sequence_length}"
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
        """Read one row, except for the beginning that it shares with the previous one; return logits [1, V] after it.

        Raises `ValueError` if the row is empty or longer than the model's sequence length.
        """
        room = self.config.sequence_length
        if not 1 <= len(row) <= room:
            raise ValueError(f"{len(row)} ids in a row: give 1 to {room}")
        if len(self.rows) != 1 or self._kept.size(-2) < room:
            self.rows, self._kept = [[]], self._empty(1, room)
        # always read the last id, for its logits
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.rows[0], row[:-1], strict=False))
        known = sum(1 for _ in alike)
        del self.rows[0][known:]
        return self._go_on([row[known:]])

    def reserve(self, rows: int, room: int) -> None:
        """Forget all rows and make place for this many empty ones, of at most `room` ids each."""
        self.rows, self._kept = [[] for _ in range(rows)], self._empty(rows, room)

    @torch.inference_mode()
    def extend(self, row: int, ids: Sequence[int]) -> Tensor:
        """Read further ids of one row; return logits [1, V] for the id after them."""
        return self._go_on([ids], row)

    @torch.inference_mode()
    def extend_scored(self, row: int, ids: Sequence[int]) -> Tensor:
        """Read further ids of one row; return logits [T, V] for the id after each of them."""
        return self._decoder.logits(self._states([ids], row)[0])

    @torch.inference_mode()
    def follow(self, ids: Sequence[int]) -> Tensor:
        """Read one further id of each of the first rows, [B]; return logits [B, V] for the id after it."""
        return self._go_on([[new] for new in ids])

    def cut(self, row: int, length: int) -> None:
        """Forget the ids of a row from place `length` on."""
        del self.rows[row][length:]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Make a row the first `length` ids of another one."""
        self._kept[:, :, target, :, :length] = self._kept[:, :, source, :, :length]
        self.rows[target] = self.rows[source][:length]

    @torch.inference_mode()
    def swap(self, first: int, second: int) -> None:
        """Exchange two rows."""
        if first != second:
            longest = max(len(self.rows[first]), len(self.rows[second]))
            self._kept[:, :, [first, second], :, :longest] = self._kept[:, :, [second, first], :, :longest]
            self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    @torch.inference_mode()
    def drop(self, ended: Collection[int]) -> list[int]:
        """Forget the rows in `ended`. The last rows move into the free places, so that few are copied.

        Returns the former index of each remaining row.
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

    def _go_on(self, more: Sequence[Sequence[int]], first: int = 0) -> Tensor:
        """Read further ids of the rows from `first` on; return logits [B, V] for the id after the last of them."""
        states = self._states(more, first)
        if states.size(1) == 1:
            return self._decoder.logits(states[:, 0])
        last = torch.tensor([len(row) - 1 for row in more], device=self.device)
        return self._decoder.logits(states[torch.arange(len(more), device=self.device), last])

    def _states(self, more: Sequence[Sequence[int]], first: int) -> Tensor:
        """Read further ids of the rows from `first` on; return the states [B, T, C] after each of them."""
        read, time = [len(row) for row in self.rows[first : first + len(more)]], max(map(len, more))
        ids = torch.tensor([[*row, *[0] * (time - len(row))] for row in more], device=self.device)
        places = torch.tensor([[*range(length, length + time)] for length in read], device=self.device)
        states = self._read(ids, places, self._step(first, places, max(read) + time, len(set(read)) == 1))
        for row, new in zip(self.rows[first:], more, strict=False):
            row.extend(new)
        return states

    def _read(self, ids: Tensor, places: Tensor, step: _Step) -> Tensor:
        return self._decoder.states(ids, places, partial(_attend, self._kept, step, self._decoder.kernel))

    def _step(self, first: int, places: Tensor, seen: int, alike: bool) -> _Step:
        """Return what all layers share when ids at these places [B, T] are read; `alike`: all rows are as long."""
        rows, time = places.shape
        _, _, all_rows, heads, room, _ = self._kept.shape
        row = torch.arange(first, first + rows, device=self.device)[:, None, None]
        head = torch.arange(heads, device=self.device)[:, None]
        keys = (row * heads + head) * room + places[:, None]  # [B, K, T]
        mask = None
        if seen > time and not (time == 1 and alike):
            mask = _mask(places, seen, self._kept.dtype).repeat(1, 1, self.config.heads // heads, 1)
        stored = torch.stack([keys, keys + all_rows * heads * room]).flatten()
        return _Step(stored, slice(first, first + rows), seen, seen > time, mask)

    def _empty(self, rows: int, places: int) -> Tensor:
        """Return zeros [L, 2, B, K, S, D], not uninitialised memory: hidden places are multiplied too, by 0."""
        config = self.config
        # CPUs multiply single queries by keys in float32 two to five times as fast as in bfloat16
        dtype = torch.float32 if self.device.type == "cpu" else self._decoder.dtype
        shape = (config.depth, 2, rows, config.kv_heads, places, config.head_dim)
        return torch.zeros(shape, dtype=dtype, device=self.device)


class _Step(NamedTuple):
    """Arguments that all layers share when rows grow."""

    stored: Tensor
    """[2 B K T] places of the keys, then of the values, among all places of a layer"""
    rows: slice
    seen: int
    """Places up to the last id that is read, in any row"""
    goes_on: bool
    """False where rows begin: they see only what is read now"""
    mask: Tensor | None
    """[B, 1, G T, S], added to the scores; None where every id sees all places, or where rows begin"""


def _mask(places: Tensor, seen: int, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, T, S]: 0 where the id at a place [B, T] may look, -inf at later places."""
    later = torch.arange(seen, device=places.device) > places[..., None]
    return torch.zeros(later.shape, dtype=dtype, device=places.device).masked_fill_(later, -torch.inf)[:, None]


def _attend(
    all_kept: Tensor, step: _Step, kernel: AttentionKernel, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Return what `attend` does for queries that also see earlier ids; store k and v [B, K, T, D] in the cache."""
    kept = all_kept[layer]
    new = torch.stack([k, v]).to(kept.dtype)
    kept.view(-1, kept.size(-1)).index_copy_(0, step.stored, new.view(-1, kept.size(-1)))
    if not step.goes_on:
        return attend(q, k, v, None, kernel)
    keys, values = kept[:, step.rows, :, : step.seen]
    # the queries of a group see the same keys, so they are multiplied as if they belonged to one head
    y = F.scaled_dot_product_attention(
        q.reshape(len(q), k.size(1), -1, q.size(-1)).to(keys.dtype),  # [B, K, G T, D]
        keys,
        values,
        attn_mask=step.mask,
    )
    return y.view_as(q)
