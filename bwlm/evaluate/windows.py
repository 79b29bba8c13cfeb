"""The loss of whole validation windows, segment by segment, in one reading.

bits per byte = sum of -log2 p over text tokens / UTF-8 bytes of the same text. BOS, markers and padding are
conditioned on, never scored. `bpb_with_end` also scores the boundary after whole documents, over those documents
alone: there it is the full joint likelihood in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bwlm.config import Reversal
from bwlm.directions import READINGS
from bwlm.model.gpt import GPT
from bwlm.paths import Check, unchecked, write_atomic, write_json
from bwlm.text.batches import open_rows
from bwlm.text.conversation import TurnIds, TurnLayout, loss_mask, row_layout
from bwlm.text.direction import IGNORED, Ids, Ints, Rows, SpecialIds, lay_out
from bwlm.text.packing import PackedRows
from bwlm.text.plan import permute
from bwlm.text.tokenizer import Tokenizer, byte_counts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SegmentLosses:
    """Losses of the evaluated windows, an entry for each segment; nll is in nats, summed over its text tokens."""

    window: Ints
    segment: Ints
    document: Ints
    tokens: Ints
    bytes: Ints
    nll: Floats
    end_nll: Floats
    """Nats of the boundary after the segment; NaN where none is scored."""

    def summary(self) -> dict[str, float]:
        """Return `loss` in nats per token, `bpb`, and `bpb_with_end` if a whole document was scored."""
        nll = self.nll.sum()
        figures = {"loss": nll / self.tokens.sum(), "bpb": nll / (math.log(2) * self.bytes.sum())}
        ended = ~np.isnan(self.end_nll)
        if ended.any():
            joint = self.nll[ended].sum() + self.end_nll[ended].sum()
            figures["bpb_with_end"] = joint / (math.log(2) * self.bytes[ended].sum())
        return {name: float(value) for name, value in figures.items()}

    def even_windows(self) -> SegmentLosses:
        """Return the tuning half, which may be used to choose settings: the even windows, or all if none is even."""
        even = self.window % 2 == 0
        return SegmentLosses(*(column[even] for column in vars(self).values())) if even.any() else self

    def save(self, folder: Path, counts: str, check: Check = unchecked, name: str = "validation") -> None:
        """Write `<name>.parquet` with every segment, and `<name>.json` with the summary.

        `counts` is the digest of the table of bytes per token by which bytes are counted.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = pa.BufferOutputStream()
        pq.write_table(pa.table(vars(self)), content)
        write_atomic(folder / f"{name}.parquet", content.getvalue().to_pybytes(), check)
        size = {
            "windows": len(np.unique(self.window)),
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.bytes.sum()),
        }
        write_json(folder / f"{name}.json", self.summary() | size | {"token_bytes": counts}, check)


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the evaluated windows, an entry for each text token, in reading order, segment after segment."""

    nll: NDArray[np.float32]
    """Nats."""
    correct: NDArray[np.int8]
    """1 where the token was the likeliest one."""


Measured = tuple[SegmentLosses, TokenLosses]


@dataclass(frozen=True)
class LossEvaluation:
    """Evaluates a model on some windows of a split, spread over the ranks of a process group."""

    rows: PackedRows
    special: SpecialIds
    token_bytes: Ints
    tokens: int
    """Windows are taken up to this many tokens (at least one window)."""
    batch_rows: int
    device: torch.device
    masked: bool
    """True: attention stays inside a segment."""
    turns: TurnLayout | None = None
    """Layout of conversations, all of whose text is measured; None: documents."""

    @classmethod
    def from_corpus(
        cls,
        corpus: str,
        tokenizer: Tokenizer,
        tokens: int,
        batch_rows: int,
        device: torch.device,
        masked: bool,
        turns: TurnLayout | None = None,
    ) -> LossEvaluation:
        """Return the evaluation of the validation windows in the folder `corpus`, all of whose text is measured."""
        return cls(
            rows=open_rows(corpus, "validation"),
            special=SpecialIds.from_tokenizer(tokenizer),
            token_bytes=tokenizer.token_bytes().astype(np.int64),
            tokens=tokens,
            batch_rows=batch_rows,
            device=device,
            masked=masked,
            turns=replace(turns, supervised=False) if turns else None,
        )

    @property
    def byte_counts(self) -> str:
        """Digest of `token_bytes`."""
        return byte_counts(self.token_bytes)

    @property
    def windows(self) -> Ints:
        """Evaluated windows: a fixed draw, since neighbours share documents and a verdict rests on documents."""
        count = max(1, min(len(self.rows), self.tokens // self.rows.width))
        return np.sort(permute(np.arange(count), len(self.rows), 0))

    def tokens_of(self) -> dict[str, Ints]:
        """Return token, bytes, segment, document and window of each entry of `TokenLosses`."""
        rows = self.rows.take(self.windows)
        each = {"segment": rows.segment, "document": rows.document, "window": self.windows[rows.row]}
        columns = {name: np.repeat(values, rows.lengths) for name, values in each.items()}
        columns |= {"token": rows.tokens, "bytes": self.token_bytes[rows.tokens]}
        return {name: values[self._is_text(rows)] for name, values in columns.items()}

    def loss_mask(self, reading: str, reversal: Reversal, turns: TurnIds) -> NDArray[np.bool_]:
        """Return the loss mask of conversations, an entry for each entry of `TokenLosses`.

        True where a model with this reading writes the token.
        """
        rows = self.rows.take(self.windows)
        chosen = np.full(len(rows.lengths), READINGS.index(reading))
        return loss_mask(rows.tokens, rows.lengths, chosen, reversal, turns)[self._is_text(rows)]

    def _is_text(self, rows: Rows) -> NDArray[np.bool_]:
        """Return [N], false for the markers of conversations, which are never scored."""
        is_text: NDArray[np.bool_] = self.token_bytes[rows.tokens] > 0
        return is_text

    def measure(self, model: GPT, reading: str, marked: bool, marker: str = "") -> Measured:
        """Return the losses of the same windows in the order of the split, whatever the number of ranks; a collective.

        `marker`: the reading whose marker stands after each BOS, if it is not `reading` itself.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = self.windows[rank::world]  # the results are gathered below and sorted back into the split's order
        parts = [
            self._batch(model, mine[start : start + self.batch_rows], reading, marked, marker or reading)
            for start in range(0, len(mine), self.batch_rows)
        ]
        if world > 1:
            gathered: list[list[Measured] | None] = [None] * world
            dist.all_gather_object(gathered, parts)
            parts = [part for ranks in gathered for part in ranks or []]
        of_token = np.concatenate([np.repeat(segments.segment, segments.tokens) for segments, _ in parts])
        segments, tokens = (_joined([part[kind] for part in parts]) for kind in (0, 1))
        in_segments, in_tokens = (np.argsort(key, kind="stable") for key in (segments["segment"], of_token))
        return (
            SegmentLosses(**{name: column[in_segments] for name, column in segments.items()}),
            TokenLosses(**{name: column[in_tokens] for name, column in tokens.items()}),
        )

    @torch.no_grad()
    def _batch(self, model: GPT, windows: Ints, reading: str, marked: bool, marker: str) -> Measured:
        rows = self.rows.take(windows)
        chosen, markers = (np.full(len(rows.lengths), READINGS.index(name)) for name in (reading, marker))
        layout = replace(row_layout(reading, rows, chosen, self.turns), markers=markers)
        directed = lay_out(rows, chosen, marked, self.special, self.rows.width, layout)
        segments = self._tensor(directed.segments) if self.masked else None
        inputs, targets = self._tensor(directed.ids[:, :-1]), self._tensor(directed.targets)
        losses = model.loss(inputs, targets, segments, predict=True)
        # `directed.text` and `directed.ends` index the flattened [R, T]: the loss of each text token, in reading order,
        # stands where the model predicted it
        flat = losses.each.double().cpu().numpy().reshape(-1)
        right = (losses.predicted == targets).cpu().numpy().reshape(-1)
        is_text = self._is_text(rows)
        text = directed.text[is_text]
        tokens = TokenLosses(flat[text].astype(np.float32), right[text].astype(np.int8))
        segments_of = SegmentLosses(
            window=windows[rows.row],
            segment=rows.segment,
            document=rows.document,
            tokens=_per_segment(is_text.astype(np.float64), rows).astype(np.int64),
            bytes=_per_segment(self.token_bytes[rows.tokens].astype(np.float64), rows).astype(np.int64),
            # markers of conversations are conditioned on, never scored
            nll=_per_segment(np.where(is_text, flat[directed.text], 0.0), rows),
            end_nll=np.where(directed.ends == IGNORED, np.nan, flat[directed.ends]),
        )
        return segments_of, tokens

    def _tensor(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(ids).long().to(self.device)


def _joined(parts: Sequence[SegmentLosses | TokenLosses]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}


def _per_segment(values: Floats, rows: Rows) -> Floats:
    owner = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    return np.bincount(owner, weights=values, minlength=len(rows.lengths)).astype(np.float64)
