"""What text costs: figures worked out by hand, sums that do not depend on how the windows are dealt out."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from bwlm.config import Reversal
from bwlm.evaluate import windows as module
from bwlm.evaluate.windows import LossEvaluation, SegmentLosses
from bwlm.model.gpt import GPT
from bwlm.model.loss import Losses
from bwlm.model.shape import GPTConfig
from bwlm.text.batches import open_rows
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.direction import IGNORED, SpecialIds, arrange
from bwlm.text.packing import Manifest, PackedRows, PackedSplit, ShardCounts, write_rows
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import byte_counts

BOS = 9
SPECIAL = SpecialIds(bos=9, pad=10, forward=11, backward=12)
BYTES = np.array([1, 2, 3, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0])
COSTS = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 0, 0, 0, 0, 16.0, 1e6, 1e6, 1e6])
"""Nats of each target: text 0..4, BOS 16; padding and markers would spoil every sum."""


@dataclass
class Table:
    """A model for which a target costs what its id says, whatever stands before it; keeps what it was asked."""

    asked: list[tuple[Tensor, Tensor, Tensor | None]]

    def loss(self, ids: Tensor, targets: Tensor, segments: Tensor | None, predict: bool) -> Losses:
        assert not torch.is_grad_enabled()
        self.asked.append((ids, targets, segments))
        each = torch.where(targets == IGNORED, 0.0, COSTS[targets.clamp(min=0)])
        return Losses(each.sum(), each, torch.full_like(targets, 3))


def table() -> Any:
    return Table([])


@pytest.fixture
def by_hand(tmp_path: Path) -> PackedRows:
    """13 slots: a whole document 0 1 1, a piece 2 3, a whole 4 at the row's end; then one piece of seven tokens."""
    pieces = [
        [(0, 0, True, [0, 1, 1]), (1, 5, False, [2, 3]), (2, 0, True, [4])],
        [(3, 0, False, [0, 0, 0, 0, 3, 3, 2])],
    ]
    rows = [[(d, offset, whole, np.array(t, dtype=np.uint32)) for d, offset, whole, t in row] for row in pieces]
    (tmp_path / "validation").mkdir()
    counts = ShardCounts("shard_00000.arrow")
    write_rows(tmp_path / "validation" / counts.file, rows, 13, counts)
    Manifest(12, 13, "", PackedSplit.from_shards([]), PackedSplit.from_shards([counts.finish()])).write(tmp_path)
    return PackedRows(tmp_path, "validation")


def evaluation(rows: PackedRows, **fields: Any) -> LossEvaluation:
    usual: dict[str, Any] = {
        "special": SPECIAL, "token_bytes": BYTES, "tokens": 10**6, "batch_rows": 1,
        "device": torch.device("cpu"), "masked": False,
    }  # fmt: skip
    return LossEvaluation(rows, **(usual | fields))


@pytest.mark.parametrize(
    ("reading", "marked"),
    [("forward", False), ("backward", False), ("permuted", False), ("forward", True), ("backward", True)],
)
def test_figures_by_hand(by_hand: PackedRows, reading: str, marked: bool) -> None:
    found, tokens = evaluation(by_hand).measure(table(), reading, marked)
    assert found.window.tolist() == [0, 0, 0, 1]
    assert found.segment.tolist() == [0, 1, 2, 13]
    assert found.document.tolist() == [0, 1, 2, 3]
    assert found.tokens.tolist() == [3, 2, 1, 7]
    assert found.bytes.tolist() == [1 + 2 + 2, 3 + 1, 4, 4 + 2 + 3]
    assert found.nll.tolist() == [2.5, 6.0, 8.0, 4 * 0.5 + 2 * 4 + 2]
    # in reading order, whatever the direction; the model always says 3
    assert tokens.nll.tolist() == [0.5, 1, 1, 2, 4, 8, *[0.5] * 4, 4, 4, 2]
    assert tokens.correct.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    # the end is scored of whole documents, also of the one that ends its row: the same in every reading
    assert found.end_nll[[0, 2]].tolist() == [16.0, 16.0]
    assert np.isnan(found.end_nll[[1, 3]]).all()
    assert found.summary() == pytest.approx(
        {"loss": 28.5 / 13, "bpb": 28.5 / 22 / math.log(2), "bpb_with_end": 42.5 / 9 / math.log(2)}, rel=1e-12
    )


def test_one_bit_a_byte_is_one() -> None:
    ones = np.ones(3, dtype=np.int64)
    losses = SegmentLosses(ones, ones, ones, ones * 2, ones * 8, np.full(3, 8 * math.log(2)), np.full(3, np.nan))
    assert losses.summary() == pytest.approx({"loss": 4 * math.log(2), "bpb": 1.0})


def test_windows_are_taken_up_to_the_tokens_asked_for(by_hand: PackedRows) -> None:
    windows = {tokens: len(evaluation(by_hand, tokens=tokens).windows) for tokens in (1, 12, 23, 24, 10**9)}
    assert windows == {1: 1, 12: 1, 23: 1, 24: 2, 10**9: 2}


def test_the_windows_are_a_fixed_draw_over_the_whole_split(real: LossEvaluation) -> None:
    """Neighbouring windows share documents, so the first ones alone would stand on few."""
    chosen = real.windows
    assert len(chosen) == len(set(chosen.tolist())) == 30
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == replace(real).windows.tolist()
    spread = real.rows.take(chosen)
    first = real.rows.take(np.arange(30))
    assert len(np.unique(spread.document)) > len(np.unique(first.document))


def test_segments_reach_the_model_only_when_attention_stays_inside_them(by_hand: PackedRows) -> None:
    for masked in (False, True):
        model = table()
        evaluation(by_hand, masked=masked, batch_rows=2).measure(model, "backward", True)
        ((ids, targets, segments),) = model.asked
        assert (ids.dtype, targets.dtype) == (torch.int64, torch.int64)
        assert ids[0].tolist() == [BOS, 12, 4, BOS, 12, 3, 2, BOS, 12, 1, 1, 0]
        if not masked:
            assert segments is None
        else:
            assert segments is not None
            assert segments[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("reversal", "ids"),
    [
        ("whole", [BOS, 12, 4, BOS, 12, 3, 2, BOS, 12, 1, 1, 0]),
        ("turns", [BOS, 12, 1, 1, 0, BOS, 12, 3, 2, BOS, 12, 4]),
    ],
)
def test_conversations_are_mirrored_as_a_whole_and_stay_in_order_in_turns(
    by_hand: PackedRows, reversal: Reversal, ids: list[int]
) -> None:
    model, turns = table(), TurnLayout(TurnIds(5, 6, 7, 8), reversal, supervised=False)
    evaluation(by_hand, turns=turns).measure(model, "backward", True)
    assert model.asked[0][0][0].tolist() == ids


def test_saved_as_a_table_and_a_summary(by_hand: PackedRows, tmp_path: Path) -> None:
    found, _ = evaluation(by_hand).measure(table(), "forward", False)
    found.save(tmp_path / "evaluations" / "base" / "forward", "0123456789abcdef")
    folder = tmp_path / "evaluations" / "base" / "forward"
    assert sorted(path.name for path in folder.iterdir()) == ["validation.json", "validation.parquet"]
    read = pq.read_table(folder / "validation.parquet")
    assert read.column_names == list(vars(found))
    for name, values in vars(found).items():
        assert np.array_equal(read[name].to_numpy(), values, equal_nan=name == "end_nll")
    summary = json.loads((folder / "validation.json").read_text())
    size = {"windows": 2, "tokens": 13, "bytes": 22}
    assert summary == found.summary() | size | {"token_bytes": "0123456789abcdef"}


def test_a_table_of_bytes_has_a_digest(by_hand: PackedRows) -> None:
    """SHA-256 of the table as little-endian 32-bit integers, whatever type holds it: sha256sum of those bytes."""
    counts = np.array([1, 2, 0, 3])
    content = bytes.fromhex("01000000 02000000 00000000 03000000")
    assert byte_counts(counts) == byte_counts(counts.astype(np.int32)) == hashlib.sha256(content).hexdigest()[:16]
    assert byte_counts(counts + np.array([0, 0, 0, 1])) != byte_counts(counts)
    assert evaluation(by_hand).byte_counts == byte_counts(evaluation(by_hand).token_bytes)


# ---- real text, and a real model ----


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> GPT:
    model = GPT(GPTConfig(prepared.tokenizer.vocab_size, depth=1, width=32, heads=2, kv_heads=2, sequence_length=64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def real(prepared: Prepared) -> LossEvaluation:
    return evaluation(
        open_rows(str(prepared.folder), "validation"),
        special=SpecialIds.from_tokenizer(prepared.tokenizer),
        token_bytes=prepared.tokenizer.token_bytes().astype(np.int64),
        tokens=64 * 30,
        batch_rows=8,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reading", ["forward", "backward"])
def test_sums_are_those_of_each_window_laid_out_directly(
    real: LossEvaluation, model: GPT, reading: str, masked: bool
) -> None:
    found, _ = replace(real, masked=masked).measure(model, reading, False)
    for window in real.windows[[0, 3, 29]]:
        rows = real.rows.take(np.array([window]))
        ids, owner = [], []
        pieces = list(enumerate(np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])))
        for index, tokens in pieces[::-1] if reading == "backward" else pieces:
            ids += [real.special.bos, *arrange(tokens, reading, 64).tolist()]
            owner += [index] * (len(tokens) + 1)
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = model(inputs[:, :-1], torch.tensor([owner[:-1]]) if masked else None)
        nll = torch.nn.functional.cross_entropy(logits[0].double(), inputs[0, 1:], reduction="none").numpy()
        direct = np.zeros(len(rows.lengths))
        for place, (token, segment) in enumerate(zip(ids[1:], owner[1:], strict=True)):
            if token != real.special.bos:
                direct[segment] += nll[place]
        assert found.nll[found.window == window] == pytest.approx(direct, rel=1e-5)


def test_a_segments_loss_does_not_depend_on_the_batch(real: LossEvaluation, model: GPT) -> None:
    usual, _ = real.measure(model, "backward", True)
    for batch_rows in (1, 7, 64):
        other, _ = replace(real, batch_rows=batch_rows).measure(model, "backward", True)
        for name, values in vars(usual).items():
            if name.endswith("nll"):
                assert getattr(other, name) == pytest.approx(values, rel=1e-5, nan_ok=True)
            else:
                assert np.array_equal(getattr(other, name), values)


def test_the_other_reading_scores_the_same_text(real: LossEvaluation, model: GPT) -> None:
    forward, backward, marked = (
        real.measure(model, reading, marked)[0]
        for reading, marked in (("forward", False), ("backward", False), ("backward", True))
    )
    for name in ("window", "segment", "document", "tokens", "bytes"):
        assert np.array_equal(getattr(forward, name), getattr(backward, name))
        assert np.array_equal(getattr(forward, name), getattr(marked, name))
    whole = real.rows.take(real.windows).whole
    for found in (forward, backward, marked):
        assert np.array_equal(np.isnan(found.end_nll), ~whole)  # `bpb_with_end` is of the same documents
    assert not np.isclose(forward.nll, backward.nll).all()
    assert not np.isclose(marked.nll, backward.nll).all()
    assert forward.bytes.sum() > forward.tokens.sum() > 1000
    assert 0 < np.isnan(forward.end_nll).mean() < 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_measure_what_one_measures(
    real: LossEvaluation, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    costs = torch.linspace(0.1, 5.0, 400)

    class PerToken:
        def loss(self, ids: Tensor, targets: Tensor, *_: Any, predict: bool) -> Losses:
            each = torch.where(targets == IGNORED, 0.0, costs[targets.clamp(min=0)])
            return Losses(each.sum(), each, targets + (targets % 2))

    model: Any = PerToken()
    alone = replace(real, tokens=64 * 5).measure(model, "forward", False)
    parts: dict[int, Any] = {}
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: world)
    for rank in (*range(1, world), 0):  # the process group is played: each rank in turn, the first one last

        def gather(into: list[Any], mine: Any, rank: int = rank) -> None:
            parts[rank] = mine
            into[:] = [parts.get(other, mine) for other in range(world)]

        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(module.dist, "all_gather_object", gather)
        together = replace(real, tokens=64 * 5, batch_rows=2).measure(model, "forward", False)
    for one, other in zip(alone, together, strict=True):
        for name, values in vars(one).items():
            assert np.array_equal(getattr(other, name), values, equal_nan=name == "end_nll")
    what = replace(real, tokens=64 * 5).tokens_of()
    assert np.array_equal(alone[1].nll, costs.numpy()[what["token"]])
    assert np.array_equal(alone[1].correct, what["token"] % 2 == 0)
    assert np.bincount(np.unique(what["segment"], return_inverse=True)[1]).tolist() == alone[0].tokens.tolist()
