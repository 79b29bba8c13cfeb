"""A few rows as a model reads them, for a person or a script to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from bwlm.text.batches import DirectedPlan, open_rows
from bwlm.text.direction import SpecialIds, is_marked, lay_out, read_row, readings
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared


def inspect_rows(prepared: Prepared, direction: str, count: int) -> dict[str, Any]:
    """The plan's first rows with seed 0: ids and targets of length T, the text read back from the ids, and segments.

    `text` is in reading order, restored from the directed ids alone; `segments` is where each segment begins.
    """
    special = SpecialIds.of(prepared.tokenizer)
    rows_read = open_rows(str(prepared.folder), "train")
    plan = DirectedPlan(str(prepared.folder), direction, special, RowPlan(len(rows_read), count, seed=0))
    batch = plan.batch(0)
    rows = rows_read.take(*plan.plan.at(0))
    directed = lay_out(rows, readings(direction, rows, 0), is_marked(direction), special, rows_read.width)
    shown = []
    for index in range(count):
        restored = read_row(directed.ids[index], direction, special, rows_read.width)
        shown.append(
            {
                "ids": batch["inputs"][index].tolist(),
                "targets": batch["targets"][index].tolist(),
                "text": prepared.tokenizer.decode(np.concatenate(restored)) if restored else "",
                "segments": directed.starts[rows.row == index].tolist(),
            }
        )
    return {"bos": special.bos, "direction": direction, "rows": shown}
