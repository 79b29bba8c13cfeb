"""A KV cache whose decode step is one call: of compiled code on a CPU, of a CUDA graph on a GPU.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bwlm.model.compiled_decoder import CompiledDecoder
from bwlm.model.decoder import Decoder
from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.step_graphs import StepGraphs


class CompiledKVCache(KVCache):
    """KV cache that reads one further id of each row several times as fast; on a GPU for rows that are reserved.

    All that is compiled or captured is there when the cache is made and rows are reserved, nothing comes later. Raises
    `CannotCompile`.
    """

    def __init__(self, model: GPT) -> None:
        self._graphs: StepGraphs | None = None
        self._graphed: Tensor | None = None
        """Memory that the graphs read and write."""
        super().__init__(model, Decoder if model.embedding.weight.is_cuda else CompiledDecoder)

    @torch.inference_mode()
    def reserve(self, rows: int, room: int) -> None:
        """Forget all rows and make place for this many empty ones, of at most `room` ids each."""
        if self._kept is self._graphed and (self._kept.size(2), self._kept.size(4)) == (rows, room):
            self.rows = [[] for _ in range(rows)]
            self._kept.zero_()
            return
        super().reserve(rows, room)
        if not isinstance(self._decoder, CompiledDecoder):
            self._graphs, self._graphed = StepGraphs(self._follow_on_device, rows, room, self.device), self._kept

    @torch.inference_mode()
    def follow(self, ids: Sequence[int]) -> Tensor:
        """Read one further id of each of the first rows, [B]; return logits [B, V] for the id after it."""
        if isinstance(self._decoder, CompiledDecoder):
            logits = self._decoder.step(self._kept, ids, [len(row) for row in self.rows])
        elif self._graphs and self._kept is self._graphed:
            # an idle row is written to behind its end, and a full one at its last place, which no further id sees
            logits = self._graphs(ids, [min(len(row), self._kept.size(4) - 1) for row in self.rows])
        else:
            return super().follow(ids)
        for row, new in zip(self.rows, ids, strict=False):
            row.append(new)
        return logits

    def _follow_on_device(self, ids: Tensor, places: Tensor, seen: int) -> Tensor:
        """Return logits [B, V] after reading ids [B] of the first rows; where nothing is known but on the device."""
        step = self._step(0, places[:, None], seen, alike=False)
        return self._decoder.logits(self._read(ids[:, None], places[:, None], step)[:, 0])
