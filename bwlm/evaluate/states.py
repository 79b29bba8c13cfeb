"""States and attention of a model for a fixed set of validation tokens.

Axes: L layers, Q tokens, C width, T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bwlm.directions import READINGS
from bwlm.model.gpt import GPT
from bwlm.model.observe import AttentionStatistics, attention_statistics, evaluating
from bwlm.record.researchlog_schema import MAP_POSITIONS, STATE_WINDOWS
from bwlm.text.conversation import TurnLayout, row_layout
from bwlm.text.direction import Directed, Ids, Ints, Rows, SpecialIds, lay_out
from bwlm.text.packing import PackedRows

ATTENTION_WINDOWS = 2
"""Windows that attention is measured on."""


@dataclass(frozen=True)
class ActivationProbe:
    """Observes a model while it reads the first of the given windows."""

    rows: PackedRows
    windows: Ints
    special: SpecialIds
    tokens: int
    """Most tokens whose states are taken."""
    device: torch.device
    masked: bool
    turns: TurnLayout | None = None
    """Layout of conversations; None: documents."""

    def tokens_of(self) -> dict[str, Ints]:
        """Return `token` and `window` of each state, in reading order."""
        rows, windows = self._rows(STATE_WINDOWS)
        chosen = self._chosen(rows)
        return {"token": rows.tokens[chosen], "window": windows[np.repeat(rows.row, rows.lengths)[chosen]]}

    @torch.no_grad()
    def states(self, model: GPT, reading: str, marked: bool) -> NDArray[np.float16]:
        """Return [L+1, Q, C]: the embedding's output and each block's, at the places where the tokens are read."""
        rows, _ = self._rows(STATE_WINDOWS)
        directed = self._directed(rows, reading, marked)
        place = torch.from_numpy(directed.text[self._chosen(rows)] + 1).to(self.device)  # one after its predictor
        with evaluating(model):
            states = [
                state.flatten(0, 1)[place].half().cpu().numpy() for state in model.states(*self._inputs(directed))
            ]
        return np.stack(states)

    def attention(self, model: GPT, reading: str, marked: bool) -> AttentionStatistics:
        """Return the attention statistics over all positions of the first windows, except padding."""
        directed = self._directed(self._rows(ATTENTION_WINDOWS)[0], reading, marked)
        ids, segments = self._inputs(directed)
        return attention_statistics(model, ids, segments, ids != self.special.pad, MAP_POSITIONS)

    def _rows(self, count: int) -> tuple[Rows, Ints]:
        windows = self.windows[:count]
        return self.rows.take(windows), windows

    def _chosen(self, rows: Rows) -> Ints:
        """Return the indices of tokens, spread evenly over the windows.

        Any token will do: each is an input in every reading, since a row's last slot, which is only a target, is
        reserved for the BOS that closes it.
        """
        count = min(self.tokens, len(rows.tokens))
        return np.linspace(0, len(rows.tokens) - 1, count).astype(np.int64)

    def _directed(self, rows: Rows, reading: str, marked: bool) -> Directed:
        chosen = np.full(len(rows.lengths), READINGS.index(reading))
        layout = row_layout(reading, rows, chosen, self.turns)
        return lay_out(rows, chosen, marked, self.special, self.rows.width, layout)

    def _inputs(self, directed: Directed) -> tuple[torch.Tensor, torch.Tensor | None]:
        def tensor(ids: Ids) -> torch.Tensor:
            return torch.from_numpy(ids).long().to(self.device)

        return tensor(directed.ids[:, :-1]), tensor(directed.segments) if self.masked else None
