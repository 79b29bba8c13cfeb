"""What a person or a script sees of the rows: the shape that `bwlm data inspect --json` promises."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bwlm.directions import DIRECTIONS
from bwlm.text.batches import DirectedPlan, open_rows
from bwlm.text.direction import SpecialIds
from bwlm.text.inspect import inspect_rows
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_are_the_plans_first_with_seed_0(prepared: Prepared, direction: str) -> None:
    shown = inspect_rows(prepared, direction, 5)
    assert json.loads(json.dumps(shown)) == shown
    assert list(shown) == ["bos", "pad", "forward", "backward", "direction", "rows"]
    special = SpecialIds.from_tokenizer(prepared.tokenizer)
    assert [shown[name] for name in ("bos", "pad", "forward", "backward")] == [
        special.bos, special.pad, special.forward, special.backward,
    ]  # fmt: skip
    assert shown["direction"] == direction
    rows = len(open_rows(str(prepared.folder), "train"))
    batch = DirectedPlan(str(prepared.folder), direction, special, RowPlan(rows, 5, 0)).batch(0)
    for index, row in enumerate(shown["rows"]):
        assert list(row) == ["ids", "targets", "text", "segments"]
        assert row["ids"] == batch["inputs"][index].tolist()
        assert row["targets"] == batch["targets"][index].tolist()
        assert len(row["ids"]) == len(row["targets"]) == 64
        openings = [at for at, token in enumerate(row["ids"]) if token == shown["bos"]]
        closing = openings[len(row["segments"]) :]
        assert openings[: len(row["segments"])] == row["segments"]
        assert all(row["targets"][at - 1] == shown["bos"] for at in closing)
        assert len(closing) <= 1


def test_text_is_in_reading_order_whatever_the_direction(prepared: Prepared) -> None:
    shown = {name: inspect_rows(prepared, name, 5)["rows"] for name in DIRECTIONS}
    rows = open_rows(str(prepared.folder), "train")
    for index, place in enumerate(RowPlan(len(rows), 5, 0).at(0)[0]):
        text = prepared.tokenizer.decode(rows.take(np.array([place])).tokens)
        assert text
        assert {shown[name][index]["text"] for name in DIRECTIONS} == {text}


def test_more_rows_than_there_are_begin_again(prepared: Prepared) -> None:
    rows = len(open_rows(str(prepared.folder), "train"))
    shown = inspect_rows(prepared, "forward", rows + 3)["rows"]
    assert len(shown) == rows + 3
    assert sorted(row["text"] for row in shown[:rows]) == sorted({row["text"] for row in shown})
