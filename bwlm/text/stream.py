"""Ray Data: tokenizes and packs shards in parallel, and streams directed batches to a worker.

The plan fixes the rows of a step. The stream only decides where they are computed: its batches are equal, row for
row, to `DirectedPlan.batches` read in-process.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.text.batches import Batch, DirectedPlan, join
from bwlm.text.corpus import Corpus, read_texts
from bwlm.text.overlap import DocumentHashes
from bwlm.text.packing import (
    SPLITS,
    Job,
    Manifest,
    PackJob,
    PackResult,
    RunJobs,
    ShardCounts,
    cut,
    overlap_of,
    packed_splits,
    write_rows,
)
from bwlm.text.plan import counter_hash
from bwlm.text.tally import tallied
from bwlm.text.tokenizer import Tokenizer

_BLOCK_TOKENS = 2**19
"""Tokens of one Ray Data block: large enough to hide a task's cost, small enough to start soon."""

_TASKS_AT_ONCE = 2
"""Tasks of a worker that make its batches at once. They ask for no CPU: where cells hold all CPUs while they wait for
their batches, such a task would wait for ever."""

Document = tuple[int, NDArray[np.uint32]]
"""(number, tokens) of a document"""

_SHARD_BITS = 32
"""Bits of a document's row in its shard: its id is the shard's index, shifted by this, plus that row."""


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(Path(folder))


@dataclass(frozen=True)
class ShardJob(PackJob):
    """Shard of text that becomes a file of packed rows."""

    uri: str


def pack_shard(tokenizer_folder: str, column: str, shuffle: bool, width: int, job: ShardJob) -> PackResult:
    """Tokenize one shard of text and write one file of packed rows. A `UserError` is returned in the result.

    Documents that are shuffled are held in memory as tokens, of 4 bytes each, until the last of their shard has been
    read.
    """
    tokenizer = _tokenizer(tokenizer_folder)
    counts, hashes, content = ShardCounts(job.file), DocumentHashes(), hashlib.sha256()
    token_bytes = tokenizer.token_bytes()

    def documents() -> Iterator[Document]:
        for texts in tallied(read_texts(job.uri, column), job.target):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts, threads=1), strict=True):
                text_bytes = text.encode()
                content.update(len(text_bytes).to_bytes(8) + text_bytes)
                document = (job.index << _SHARD_BITS) + counts.documents
                counts.documents += 1
                counts.empty_documents += len(tokens) == 0
                counts.bytes += int(token_bytes[tokens].sum())
                hashes.add(tokens)
                yield document, tokens

    try:
        ordered = _shuffled(documents(), content.digest) if shuffle else documents()
        write_rows(job.target, cut(ordered, width), tokenizer.vocab_size, counts)
        hashes.save(job.target)
    except UserError as error:
        return PackResult(job.split, job.file, error=str(error))
    return PackResult(job.split, job.file, counts.finish())


def _shuffled(documents: Iterable[Document], digest: Callable[[], bytes]) -> list[Document]:
    """Return all documents of a shard, ordered by a hash of the shard's digest and of each document's place in it.

    The content alone decides, so a copy of the shard elsewhere has the same order. Neighbours in a file often belong
    together; where attention crosses documents, their order would be a part of what is measured.
    """
    held = list(documents)
    key = int.from_bytes(digest()[:8])  # only now: the digest covers all documents
    order = np.argsort(counter_hash(np.array(key, np.uint64), np.arange(len(held))), kind="stable")
    return [held[index] for index in order]


def with_ray(jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
    """Run the work on each job in a task of Ray Data."""
    quiet()
    rows = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    return [row["result"] for row in rows.map(lambda row: {"result": work(row["job"])}).take_all()]


def pack_corpus(corpus: Corpus, tokenizer_folder: Path, width: int, folder: Path, run: RunJobs = with_ray) -> Manifest:
    """Tokenize and pack every shard (by default with Ray Data), write the manifest and return it.

    Raises the first shard's `UserError`, and one for a split without text.
    """
    shards = {"train": corpus.train, "validation": corpus.validation}
    jobs = [
        ShardJob(split, index, f"shard_{index:05d}.arrow", str(folder), shard.uri)
        for split in SPLITS
        for index, shard in enumerate(shards[split])
    ]
    for split in SPLITS:
        (folder / split).mkdir()
    work = partial(pack_shard, str(tokenizer_folder), corpus.text_column, corpus.shuffle, width)
    splits = packed_splits(run(jobs, work))
    tokenizer = _tokenizer(str(tokenizer_folder))
    overlap = overlap_of(folder, **splits)
    manifest = Manifest(width, tokenizer.vocab_size, tokenizer.digest, **splits, overlap=overlap)
    for name, counts in (("train", splits["train"]), ("validation", splits["validation"])):
        if counts.total("tokens") == 0:
            field = "data.source" if name == "train" else "data.validation"
            empty = counted(counts.total("documents"), "empty document")
            raise UserError(
                f"{field}: the {name} shards hold no text ({empty}): "
                f"give {name} shards with documents that are not empty"
            )
    manifest.write(folder)
    return manifest


def quiet() -> None:
    """Turn off Ray Data's progress bars and its log of each execution: a grid of cells needs neither."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def stream_batches(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
    """Yield the batches of steps first..last-1 of one rank, directed by Ray Data's tasks before the step needs them."""
    if first >= last:
        return
    rows = plan.plan.rows_per_step // plan.world
    width = _width(plan)
    steps_per_block = max(1, _BLOCK_TOKENS // (rows * width))
    blocks = -(-(last - first) // steps_per_block)

    def expand(block: Batch) -> Batch:
        parts = []
        for index in block["id"]:
            start = first + int(index) * steps_per_block
            parts += [plan.batch(step) for step in range(start, min(start + steps_per_block, last))]
        return join(parts)

    quiet()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    numbers = ray.data.from_items([{"id": index} for index in range(blocks)], override_num_blocks=blocks)
    tasks = ray.data.TaskPoolStrategy(size=min(blocks, _TASKS_AT_ONCE))
    dataset = numbers.map_batches(expand, batch_size=None, num_cpus=0, compute=tasks)
    for batch in dataset.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=2):
        yield {name: np.ascontiguousarray(column) for name, column in batch.items()}


def _width(plan: DirectedPlan) -> int:
    return Manifest.read(Path(plan.folder)).sequence_length
