"""Ray Data computes the same rows as this process, from any step on, and packs the same shards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bwlm.config import Reversal
from bwlm.errors import UserError
from bwlm.text import stream
from bwlm.text.batches import Batch, DirectedPlan, open_rows, row_plan
from bwlm.text.conversation import TurnIds, TurnLayout
from bwlm.text.corpus import Corpus, Shard
from bwlm.text.direction import SpecialIds
from bwlm.text.mixture import ConversationSource, prepare_mixture
from bwlm.text.packing import Job, Manifest, PackResult
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Prepared
from bwlm.text.stream import pack_corpus, stream_batches, with_ray
from tasks import TASKS
from tests.cluster.test_placement import holder

pytestmark = pytest.mark.usefixtures("ray_cluster")


def backwards(jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
    """In this process, with the results in another order than Ray's."""
    return [work(job) for job in jobs][::-1]


def plan_of(prepared: Prepared, direction: str, rank: int = 0, world: int = 1) -> DirectedPlan:
    folder = str(prepared.folder)
    rows = RowPlan(len(open_rows(folder, "train")), 8, 3)
    return DirectedPlan(folder, direction, SpecialIds.from_tokenizer(prepared.tokenizer), rows, rank, world)


def assert_equal(streamed: list[Batch], read: list[Batch]) -> None:
    assert len(streamed) == len(read)
    for one, other in zip(streamed, read, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == np.int32
            assert one[name].flags.c_contiguous
            assert np.array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("direction", "rank", "world", "first", "last"),
    [
        ("bidirectional", 0, 1, 0, 11),
        ("bidirectional", 1, 2, 5, 12),
        ("backward", 0, 2, 0, 4),
        ("forward", 0, 1, 9, 10),
    ],
)
def test_streamed_rows_are_those_read_in_process(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, direction: str, rank: int, world: int, first: int, last: int
) -> None:
    # blocks of two steps of one worker, so there are several, and a last one that is not full
    monkeypatch.setattr(stream, "_BLOCK_TOKENS", 2 * 8 // world * 64)
    plan = plan_of(prepared, direction, rank, world)
    assert_equal(list(stream_batches(plan, first, last)), list(plan.batches(first, last)))


@pytest.mark.parametrize(("direction", "reversal"), [("bidirectional", "whole"), ("backward", "turns")])
def test_conversations_are_streamed_as_they_are_read_in_process(
    mixture_for: Callable[[str], Prepared], monkeypatch: pytest.MonkeyPatch, direction: str, reversal: Reversal
) -> None:
    """With what is turned around in them, and what is a target."""
    monkeypatch.setattr(stream, "_BLOCK_TOKENS", 2 * 4 * 64)
    mixture = mixture_for("sft")
    layout = TurnLayout(TurnIds.from_tokenizer(mixture.tokenizer), reversal, supervised=True)
    rows, special = row_plan(str(mixture.folder), 8, 3), SpecialIds.from_tokenizer(mixture.tokenizer)
    plan = DirectedPlan(str(mixture.folder), direction, special, rows, 1, 2, layout)
    assert_equal(list(stream_batches(plan, 2, 7)), list(plan.batches(2, 7)))


def test_conversations_are_packed_as_in_process(mixture_for: Callable[[str], Prepared], tmp_path: Path) -> None:
    mixture, arithmetic = mixture_for("rl"), TASKS["builtin:arithmetic"]
    [share] = mixture.manifest.sources
    source = ConversationSource(arithmetic.name, share.weight, arithmetic.key(), arithmetic.conversations)
    width, folder = mixture.manifest.sequence_length, mixture.tokenizer_folder
    packed = prepare_mixture([source], folder, width, True, tmp_path, with_ray, lambda _: None)
    assert packed.manifest == mixture.manifest
    assert packed.manifest.digest == mixture.manifest.digest


def test_rows_come_where_cells_hold_all_cpus(prepared: Prepared) -> None:
    """Cells of two launches that counted the same room do, and so does a group that grows."""
    import ray

    plan, held = plan_of(prepared, "forward"), holder(6)
    with ThreadPoolExecutor() as workers:
        rows = workers.submit(lambda: list(stream_batches(plan, 0, 3)))
        try:
            assert_equal(rows.result(timeout=60), list(plan.batches(0, 3)))
        finally:
            ray.kill(held)


def test_one_block_for_all(prepared: Prepared) -> None:
    plan = plan_of(prepared, "permuted")
    assert_equal(list(stream_batches(plan, 3, 6)), list(plan.batches(3, 6)))


def test_no_steps_no_batches(prepared: Prepared) -> None:
    assert list(stream_batches(plan_of(prepared, "forward"), 5, 5)) == []


def test_ray_packs_the_same_shards_in_order(prepared: Prepared, tmp_path: Path) -> None:
    packed = pack_corpus(prepared.corpus, prepared.tokenizer_folder, 64, tmp_path)
    assert packed == prepared.manifest == Manifest.read(tmp_path)
    assert [shard["file"] for shard in packed.train.shards] == [f"shard_{index:05d}.arrow" for index in range(3)]
    for path in sorted(prepared.folder.rglob("*.arrow")):
        assert (tmp_path / path.relative_to(prepared.folder)).read_bytes() == path.read_bytes()


def test_shards_are_listed_in_order_whichever_is_done_first(prepared: Prepared, tmp_path: Path) -> None:
    packed = pack_corpus(prepared.corpus, prepared.tokenizer_folder, 64, tmp_path, run=backwards)
    assert packed == prepared.manifest


@pytest.mark.parametrize("with_ray", [True, False])
def test_the_first_shard_at_fault_is_told(prepared: Prepared, tmp_path: Path, with_ray: bool) -> None:
    first, second, third = prepared.corpus.train
    bad = [tmp_path / "bad_1.parquet", tmp_path / "bad_2.parquet"]
    for path in bad:
        path.write_bytes(Path(first.uri).read_bytes()[:-100])
    shards = [Shard(str(path), 0, "") for path in bad]
    corpus = Corpus((first, shards[0], second, shards[1], third), prepared.corpus.validation, "text")
    (tmp_path / "rows").mkdir()
    how: dict[str, Any] = {} if with_ray else {"run": backwards}
    with pytest.raises(UserError, match=rf"^{bad[0]}: not a readable parquet file"):
        pack_corpus(corpus, prepared.tokenizer_folder, 64, tmp_path / "rows", **how)
    assert not (tmp_path / "rows" / "manifest.json").exists()
