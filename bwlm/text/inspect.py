"""Rows and conversations as a model reads them, for a person or a script to look at."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Reversal
from bwlm.directions import READINGS, is_marked, own_readings
from bwlm.text.batches import DirectedPlan, open_rows
from bwlm.text.conversation import Conversation, TurnIds, TurnLayout, render, row_layout
from bwlm.text.direction import CLOSING_SLOTS, HEAD_SLOTS, Rows, SpecialIds, lay_out, read_row
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import Tokenizer


def inspect_rows(prepared: Prepared, direction: str, count: int) -> dict[str, Any]:
    """Return the plan's first rows with seed 0: ids and targets of length T, the text of the ids, and segments.

    `text` is in reading order, restored from the directed ids alone, with segments in the order of the text.
    `segments` are the slots where segments begin, in the order of the layout.
    """
    special = SpecialIds.from_tokenizer(prepared.tokenizer)
    rows_read = open_rows(str(prepared.folder), "train")
    plan = DirectedPlan(str(prepared.folder), direction, special, RowPlan(len(rows_read), count, seed=0))
    rows = plan.rows(0)
    directed = plan.lay_out(rows)
    shown = []
    for index in range(count):
        restored = read_row(directed.ids[index], direction, special, rows_read.width)
        shown.append(
            {
                "ids": directed.ids[index, :-1].tolist(),
                "targets": directed.targets[index].tolist(),
                "text": prepared.tokenizer.decode(np.concatenate(restored)) if restored else "",
                "segments": sorted(directed.starts[rows.row == index].tolist()),
            }
        )
    return {**asdict(special), "direction": direction, "rows": shown}


def inspect_conversation(
    conversation: Conversation, direction: str, reversal: Reversal, supervised: bool, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return a conversation as a model reads it, once for each reading of the direction.

    `ids` begin with BOS, `text` holds the text of each id, and `supervised` is true where the id is a target: what
    the model writes or, with `supervised` false, everything.
    """
    shown = []
    turns = TurnLayout(TurnIds.from_tokenizer(tokenizer), reversal, supervised)
    rows = one_row(render(conversation, tokenizer))
    for reading in own_readings(direction):
        number = np.array([READINGS.index(reading)])
        width = len(rows.tokens) + HEAD_SLOTS + CLOSING_SLOTS
        layout = row_layout(reading, rows, number, turns)
        directed = lay_out(rows, number, is_marked(direction), SpecialIds.from_tokenizer(tokenizer), width, layout)
        length = len(rows.tokens) + 1 + is_marked(direction)
        ids = directed.ids[0, :length]
        targets = [False, *(directed.targets[0, : length - 1] >= 0).tolist()]
        texts = [tokenizer.decode([token]) for token in ids]
        shown.append({"reading": reading, "ids": ids.tolist(), "supervised": targets, "text": texts})
    return shown


def one_row(ids: NDArray[np.uint32]) -> Rows:
    """Return a row that holds one segment alone."""
    first = np.zeros(1, dtype=np.int64)
    return Rows(1, ids.astype(np.int64), np.array([len(ids)]), first, first, first, first == 0, first)
