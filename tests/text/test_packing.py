"""Packing: nothing cropped, nothing moved, rows full, and a digest that sees every token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.directions import READINGS
from bwlm.text import packing
from bwlm.text.direction import HEAD_SLOTS, SpecialIds, lay_out
from bwlm.text.packing import (
    Manifest,
    PackedRows,
    PackedSplit,
    Piece,
    ShardCounts,
    cut,
    pack_whole,
    room_of,
    row_schema,
    write_rows,
)
from bwlm.text.prepare import Prepared

law = settings(derandomize=True, deadline=None, max_examples=80)
Documents = list[tuple[int, np.ndarray]]


def documents_of(lengths: list[int], first: int = 0) -> Documents:
    """Documents whose tokens count up, so that any loss or change of order shows."""
    ends = np.cumsum([first, *lengths])
    return [(10 * index, np.arange(ends[index], ends[index + 1], dtype=np.uint32)) for index in range(len(lengths))]


corpora = st.tuples(st.lists(st.integers(0, 120), max_size=25), st.integers(8, 40))


@law
@given(corpora)
def test_every_token_of_every_document_is_there_once_in_order(case: tuple[list[int], int]) -> None:
    lengths, width = case
    documents = documents_of(lengths)
    pieces = [piece for row in cut(documents, width) for piece in row]
    assert [token for *_, tokens in pieces for token in tokens.tolist()] == list(range(sum(lengths)))
    for document, tokens in documents:
        found = [piece for piece in pieces if piece[0] == document]
        assert [piece[1] for piece in found] == np.cumsum([0, *(len(piece[3]) for piece in found)])[:-1].tolist()
        assert sum(len(piece[3]) for piece in found) == len(tokens)
        assert [piece[2] for piece in found] == ([True] if len(found) == 1 else [False] * len(found))
    assert all(len(piece[3]) for piece in pieces)


@law
@given(corpora)
def test_rows_are_full_but_for_remainders_and_the_last(case: tuple[list[int], int]) -> None:
    lengths, width = case
    used = [sum(len(tokens) + HEAD_SLOTS for *_, tokens in row) for row in cut(documents_of(lengths), width)]
    assert all(slots <= width for slots in used)  # of width + 1, one is kept for the BOS that closes the row
    assert all(slots > width - 3 for slots in used[:-1])
    assert all(slots >= HEAD_SLOTS + 1 for slots in used)


def test_cutting_by_hand() -> None:
    # 10 slots, one of them for closing: 3+2 and 2+2 fill a row; 8 are cut 7+2 | 1+2; 4+2 leave none; 2 left are padding
    rows = list(cut(documents_of([3, 2, 8, 4, 0, 5, 2]), 9))
    assert [[(document, offset, whole, len(tokens)) for document, offset, whole, tokens in row] for row in rows] == [
        [(0, 0, True, 3), (10, 0, True, 2)],
        [(20, 0, False, 7)],
        [(20, 7, False, 1), (30, 0, True, 4)],
        [(50, 0, True, 5)],
        [(60, 0, True, 2)],
    ]


# ---- files ----


def write_split(folder: Path, shards: list[list[int]], width: int, vocab_size: int = 400) -> list[list[Piece]]:
    """A prepared folder whose train split has a shard for each list of document lengths; returns its rows."""
    (folder / "train").mkdir(parents=True)
    rows, counted, tokens = [], [], 0
    for index, lengths in enumerate(shards):
        counts = ShardCounts(f"shard_{index:05d}.arrow")
        shard = list(cut(documents_of(lengths, tokens), width))
        write_rows(folder / "train" / counts.file, shard, vocab_size, counts)
        tokens += sum(lengths)
        counted.append(counts.finish())
        rows += shard
    Manifest(width, vocab_size, "tokenizer", PackedSplit.from_shards(counted), PackedSplit.from_shards([])).write(
        folder
    )
    return rows


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_any_row_can_be_taken_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    monkeypatch.setattr(packing, "BATCH_ROWS", 3)
    rows = write_split(tmp_path, [[5, 40, 3, 0, 17], [], [1, 1, 1, 90], [2]], 12, vocab_size)
    assert row_schema(vocab_size).field("tokens").type.value_type == (
        pa.uint16() if vocab_size == 2**16 else pa.uint32()
    )
    packed = PackedRows(tmp_path, "train")
    assert len(packed) == len(rows)
    rng = np.random.default_rng(0)
    for chosen in (np.arange(len(rows)), rng.permutation(len(rows)), rng.integers(0, len(rows), 50), np.array([4])):
        taken = packed.take(chosen, chosen + 7)
        assert taken.count == len(chosen)
        ends = np.cumsum(taken.lengths)
        for place, row in enumerate(chosen):
            here = np.flatnonzero(taken.row == place)
            expected = rows[row]
            assert taken.document[here].tolist() == [document for document, *_ in expected]
            assert taken.whole[here].tolist() == [whole for _, _, whole, _ in expected]
            assert taken.segment[here].tolist() == [row * 13 + ordinal for ordinal in range(len(expected))]
            assert (taken.epoch[here] == row + 7).all()
            for segment, (*_, tokens) in zip(here, expected, strict=True):
                assert np.array_equal(taken.tokens[ends[segment] - taken.lengths[segment] : ends[segment]], tokens)
    assert not packed.take(np.array([0])).epoch.any()


def test_a_row_costs_its_own_memory_and_not_its_shards(tmp_path: Path) -> None:
    write_split(tmp_path, [[400] * 4000], 511, vocab_size=2**21)
    packed = PackedRows(tmp_path, "train")
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        packed.take(np.arange(0, len(packed), 1000))
    finally:
        pa.set_memory_pool(usual)
    assert (tmp_path / "train" / "shard_00000.arrow").stat().st_size > 3e6
    assert pool.max_memory() < 1e5


def digest_of(tmp_path: Path, documents: Documents, width: int = 12) -> str:
    counts = ShardCounts("shard_00000.arrow")
    write_rows(tmp_path / counts.file, cut(documents, width), 400, counts)
    return PackedSplit.from_shards([counts.finish()]).digest


def test_the_digest_repeats_and_sees_every_change(tmp_path: Path) -> None:
    documents = documents_of([5, 40, 3, 17])
    digest = digest_of(tmp_path, documents)
    assert digest_of(tmp_path, documents_of([5, 40, 3, 17])) == digest
    changes = {
        "one token": [(d, np.where(tokens == 64, 1, tokens).astype(np.uint32)) for d, tokens in documents],
        "another id": [(d + (d == 30), tokens) for d, tokens in documents],
        "another border": documents_of([5, 41, 2, 17]),
        "another order": [documents[1], documents[0], *documents[2:]],
        "one less": documents[:-1],
    }
    found = {name: digest_of(tmp_path, changed) for name, changed in changes.items()}
    assert len({digest, digest_of(tmp_path, documents, 13), *found.values()}) == len(changes) + 2


def test_the_digest_sees_which_documents_are_whole() -> None:
    """The end of a whole document is a target, so rows of equal tokens may still train otherwise."""
    digests = set()
    for whole in (True, False):
        counts = ShardCounts("shard_00000.arrow")
        counts.add([(0, 0, whole, np.arange(5, dtype=np.uint32))])
        digests.add(counts.finish()["sha256"])
    assert len(digests) == 2


def test_the_manifests_digest_covers_splits_and_tokenizer() -> None:
    shards = [{"file": f"shard_{index:05d}.arrow", "sha256": str(index)} for index in range(3)]
    whole, fewer = PackedSplit.from_shards(shards), PackedSplit.from_shards(shards[:2])
    assert PackedSplit.from_shards(reversed(shards)) == whole
    assert [shard["file"] for shard in PackedSplit.from_shards(reversed(shards)).shards] == [
        shard["file"] for shard in shards
    ]
    digests = {
        Manifest(64, 400, "a", whole, fewer).digest,
        Manifest(64, 400, "b", whole, fewer).digest,
        Manifest(32, 400, "a", whole, fewer).digest,
        Manifest(64, 400, "a", fewer, fewer).digest,
        Manifest(64, 400, "a", whole, whole).digest,
    }
    assert len(digests) == 5


# ---- a real corpus ----


def shard_texts(prepared: Prepared, split: str) -> list[list[str]]:
    shards = prepared.corpus.train if split == "train" else prepared.corpus.validation
    return [pq.read_table(shard.uri)["text"].to_pylist() for shard in shards]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_counts_are_those_of_the_text(prepared: Prepared, split: str) -> None:
    counted: PackedSplit = getattr(prepared.manifest, split)
    rows = PackedRows(prepared.folder, split)
    everything = rows.take(np.arange(len(rows)))
    for shard, texts in zip(counted.shards, shard_texts(prepared, split), strict=True):
        assert shard["documents"] == len(texts)
        assert shard["empty_documents"] == sum(not text for text in texts) > 0
        assert shard["bytes"] == sum(len(text.encode()) for text in texts)
    assert counted.total("rows") == len(rows)
    assert counted.total("segments") == len(everything.lengths)
    assert counted.total("tokens") == everything.lengths.sum() == len(everything.tokens)
    assert prepared.manifest == Manifest.read(prepared.folder)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_text_comes_back_document_by_document(prepared: Prepared, split: str) -> None:
    rows = PackedRows(prepared.folder, split)
    taken = rows.take(np.arange(len(rows)))
    tokens = np.split(taken.tokens, np.cumsum(taken.lengths)[:-1])
    documents: dict[int, list[int]] = {}
    for document, piece in zip(taken.document.tolist(), tokens, strict=True):
        documents.setdefault(document, []).extend(piece.tolist())
    decoded = [prepared.tokenizer.decode(documents[number]) for number in sorted(documents)]
    assert decoded == [text for texts in shard_texts(prepared, split) for text in texts if text]
    assert list(documents) != sorted(documents), "the documents of a shard are shuffled"


def test_every_row_fits_in_every_direction_and_padding_is_what_the_manifest_says(prepared: Prepared) -> None:
    rows, special = PackedRows(prepared.folder, "train"), SpecialIds.from_tokenizer(prepared.tokenizer)
    taken = rows.take(np.arange(len(rows)))
    for reading in range(len(READINGS)):
        laid = lay_out(taken, np.full(len(taken.lengths), reading), False, special, rows.width)
        closings = (laid.ids == special.bos).sum() - len(taken.lengths)
        share = ((laid.ids == special.pad).sum() + closings) / laid.ids.size
        assert share == pytest.approx(prepared.manifest.train.padding_share(rows.width), abs=1e-12)
    marked = lay_out(taken, np.zeros(len(taken.lengths), dtype=int), True, special, rows.width)
    assert (marked.ids == special.pad).sum() == (laid.ids == special.pad).sum() - len(taken.lengths)
    # a slot for closing, remainders of 1 or 2 slots, and the ends of three shards
    assert (marked.ids == special.pad).sum() <= 3 * len(rows) + 3 * rows.width


def test_padding_of_long_documents_is_under_one_percent(tmp_path: Path) -> None:
    write_split(tmp_path, [[1500] * 200], 511, vocab_size=2**21)
    assert Manifest.read(tmp_path).train.padding_share(511) < 0.01
    assert PackedSplit.from_shards([]).padding_share(511) == 0


# ---- documents that stay whole ----


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(32, 64))
def test_whole_documents_fill_rows_and_none_is_split_or_lost(lengths: list[int], width: int) -> None:
    documents = [
        (index, np.full(length, index, dtype=np.uint32), index % 3 > 0) for index, length in enumerate(lengths)
    ]
    rows = list(pack_whole(iter(documents), width))
    packed = [piece for row in rows for piece in row]
    assert sorted(document for document, _, _, _ in packed) == list(range(len(lengths)))
    assert all(offset == 0 and len(ids) == lengths[document] for document, offset, _, ids in packed)
    assert all(whole == (document % 3 > 0) for document, _, whole, _ in packed)  # as it was told
    free = [room_of(width) - sum(len(piece[3]) + HEAD_SLOTS for piece in row) for row in rows]
    assert min(free, default=0) >= 0
    if sum(lengths) and len(lengths) <= 250:  # all wait at once: what comes later would not have fitted
        for index, room in enumerate(free):
            assert all(len(piece[3]) + HEAD_SLOTS > room for row in rows[index + 1 :] for piece in row)


def test_a_row_takes_the_longest_that_fits() -> None:
    documents = [(index, np.zeros(length, dtype=np.uint32), True) for index, length in enumerate([5, 4, 9, 2, 9, 8])]
    rows = [
        [document for document, _, _, _ in row] for row in pack_whole(iter(documents), 20)
    ]  # 20 slots and one for closing
    assert rows == [[0, 2], [1, 4], [3, 5]]  # with their two slots 7 + 11, where 4 more do not fit, 6 + 11, 4 + 10
