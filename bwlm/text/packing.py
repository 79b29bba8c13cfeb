"""Packing: documents of tokens -> rows of T+1 slots, before any direction is known.

Rows are filled completely: a document that does not fit is split at the row's end and continues in the next row as a
new segment. Nothing is cropped. Each segment reserves `HEAD_SLOTS` slots, so that its text fits in every direction,
and each row reserves one slot for the BOS that may close it. A shard of text becomes one Arrow file of rows; a
manifest lists the files with counts and digests.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bwlm.errors import UserError
from bwlm.paths import read_json, sync, write_json
from bwlm.text.direction import CLOSING_SLOTS, HEAD_SLOTS, Ints, Rows
from bwlm.text.overlap import Overlap, count_overlap
from bwlm.text.plan import rows_drawn

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

MANIFEST_VERSION = 3
"""Version of the manifest and the packed files."""
BATCH_ROWS = 1024
"""Rows of each record batch of a packed file, so that a row is found without reading others."""

_WAITING = 256
"""Documents among which the next document of a row is chosen when none may be split."""

_SMALLEST = HEAD_SLOTS + 1
"""Fewest free slots that are used: a smaller remainder is padding, since no segment with text fits in it."""


@dataclass(frozen=True)
class PackJob:
    """Job that writes one file of packed rows."""

    split: SplitName
    index: int
    """Number of the file in its split."""
    file: str
    folder: str
    """Folder of the packed corpus."""

    @property
    def target(self) -> Path:
        """Path of the file to write."""
        return Path(self.folder) / self.split / self.file


@dataclass(frozen=True)
class PackResult:
    """Counts of a written file, or the error that a user can fix."""

    split: SplitName
    file: str
    counts: dict[str, Any] = field(default_factory=dict)
    """Counts as `ShardCounts.finish` returns them."""
    error: str = ""
    """Message of a `UserError`, '' where there was none."""


Job = TypeVar("Job", bound=PackJob)


class RunJobs(Protocol):
    """Runs work on every job: with Ray Data (`bwlm.text.stream.with_ray`), or in this process."""

    def __call__(self, jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]: ...


def run_here(jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
    """Run the work in this process, job after job."""
    return [work(job) for job in jobs]


Piece = tuple[int, int, bool, NDArray[np.uint32]]
"""(document, offset of the first token in it, whole, tokens) of a segment"""
Unsplit = tuple[int, NDArray[np.uint32], bool]
"""(document, tokens, whether they are all of it) of a document that must not be split. A document that was cut short
has no end that may be learned."""


def room_of(width: int) -> int:
    """Return the slots that a row of `width` + 1 has for its segments, their heads included."""
    return width + 1 - CLOSING_SLOTS


def cut(documents: Iterable[tuple[int, NDArray[np.uint32]]], width: int) -> Iterator[list[Piece]]:
    """Yield the segments of each row of `width` + 1 slots; documents without tokens are skipped."""
    row: list[Piece] = []
    free = room_of(width)
    for document, tokens in documents:
        offset = 0
        while offset < len(tokens):
            if free < _SMALLEST:
                yield row
                row, free = [], room_of(width)
            piece = tokens[offset : offset + free - HEAD_SLOTS]
            row.append((document, offset, len(piece) == len(tokens), piece))
            offset += len(piece)
            free -= len(piece) + HEAD_SLOTS
    if row:
        yield row


def pack_whole(documents: Iterable[Unsplit], width: int) -> Iterator[list[Piece]]:
    """Yield the documents of each row of `width` + 1 slots, none of them split; each must fit into a row.

    A row begins with the first waiting document. Then it takes, as long as one fits, the longest fitting document of
    the next `_WAITING`: best fit, as in nanochat. The rest is padding.
    """
    waiting: deque[Unsplit] = deque()
    source = iter(documents)
    while True:
        waiting.extend(itertools.islice(source, _WAITING - len(waiting)))
        if not waiting:
            return
        row, free = [waiting.popleft()], room_of(width)
        assert len(row[0][1]) + HEAD_SLOTS <= free, "a document that is longer than a row"
        free -= len(row[0][1]) + HEAD_SLOTS
        while (fitting := _longest(waiting, free - HEAD_SLOTS)) is not None:
            row.append(waiting[fitting])
            del waiting[fitting]
            free -= len(row[-1][1]) + HEAD_SLOTS
        yield [(document, 0, whole, tokens) for document, tokens, whole in row]


def _longest(documents: Iterable[Unsplit], room: int) -> int | None:
    """Return the index of the longest document that fits, the first of equals; None if none fits."""
    fitting = [(len(tokens), -index) for index, (_, tokens, _) in enumerate(documents) if len(tokens) <= room]
    return -max(fitting)[1] if fitting else None


@dataclass
class ShardCounts:
    """Counts of the rows that one shard of text became."""

    file: str
    rows: int = 0
    segments: int = 0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    empty_documents: int = 0
    cut: int = 0
    """Conversations that lost their end because they are longer than a row."""
    left_out: int = 0
    """Conversations that were dropped: no part that can be learned fits into a row."""
    sha256: str = ""
    _hash: Any = field(default_factory=hashlib.sha256, repr=False)

    def add(self, row: list[Piece]) -> None:
        """Count a row and add it to the hash."""
        self.rows += 1
        self.segments += len(row)
        for document, offset, whole, tokens in row:
            self.tokens += len(tokens)
            self._hash.update(f"{document} {offset} {whole} {len(tokens)};".encode())
            self._hash.update(tokens.astype("<u4").tobytes())
        self._hash.update(b"\n")

    def finish(self) -> dict[str, Any]:
        """Return the counts by name, with the SHA-256 over all rows."""
        self.sha256 = self._hash.hexdigest()
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def row_schema(vocab_size: int) -> pa.Schema:
    """Return the columns of a packed file: one record a row, lists over its segments (and over its text tokens)."""
    token = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    return pa.schema(
        {
            "tokens": pa.list_(token),
            "lengths": pa.list_(pa.int32()),
            "documents": pa.list_(pa.int64()),
            "offsets": pa.list_(pa.int64()),
            "whole": pa.list_(pa.bool_()),
        }
    )


def write_rows(path: Path, rows: Iterable[list[Piece]], vocab_size: int, counts: ShardCounts) -> None:
    """Write an Arrow IPC file of packed rows, which readers map into memory, and count them in `counts`."""
    schema = row_schema(vocab_size)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        pending: list[list[Piece]] = []
        for row in rows:
            counts.add(row)
            pending.append(row)
            if len(pending) == BATCH_ROWS:
                writer.write_batch(_record_batch(pending, schema))
                pending = []
        if pending:
            writer.write_batch(_record_batch(pending, schema))
    sync(path)
    sync(path.parent)


def _record_batch(rows: list[list[Piece]], schema: pa.Schema) -> pa.RecordBatch:
    pieces = [piece for row in rows for piece in row]
    per_row = np.array([len(row) for row in rows])
    row_ends = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32)
    lengths = np.array([len(tokens) for _, _, _, tokens in pieces], dtype=np.int32)
    token_ends = np.concatenate([[0], np.cumsum(lengths)])[row_ends].astype(np.int32)
    values = {
        "tokens": np.concatenate([tokens for _, _, _, tokens in pieces]),
        "lengths": lengths,
        "documents": np.array([document for document, _, _, _ in pieces], dtype=np.int64),
        "offsets": np.array([offset for _, offset, _, _ in pieces], dtype=np.int64),
        "whole": np.array([whole for _, _, whole, _ in pieces], dtype=bool),
    }
    columns = []
    for column in schema:
        ends = token_ends if column.name == "tokens" else row_ends
        items = pa.array(values[column.name], type=column.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(ends), items))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class PackedSplit:
    """Counts of a split, and its files in order."""

    shards: tuple[dict[str, Any], ...]
    digest: str

    @classmethod
    def from_shards(cls, shards: Iterable[dict[str, Any]]) -> PackedSplit:
        """Return the split of these shards, sorted by file name, with a digest over their hashes."""
        ordered = tuple(sorted(shards, key=lambda shard: shard["file"]))
        return cls(ordered, hashlib.sha256(" ".join(shard["sha256"] for shard in ordered).encode()).hexdigest())

    def total(self, count: str) -> int:
        """Return the sum of a count over the shards."""
        return sum(int(shard[count]) for shard in self.shards)

    def padding_share(self, width: int) -> float:
        """Return the share of slots after the last segment of each row, in one-directional runs.

        The first of these slots may hold the BOS that closes the row.
        """
        slots = self.total("rows") * (width + 1)
        return 1 - (self.total("tokens") + self.total("segments")) / slots if slots else 0.0


class Splits(TypedDict):
    """Training and validation split of a packed corpus."""

    train: PackedSplit
    validation: PackedSplit


def packed_splits(results: list[PackResult]) -> Splits:
    """Return the splits that packed files make. Raises the first error as `UserError`."""
    for result in sorted(results, key=lambda result: (result.split, result.file)):
        if result.error:
            raise UserError(result.error)

    def split(name: str) -> PackedSplit:
        return PackedSplit.from_shards(result.counts for result in results if result.split == name)

    return {"train": split("train"), "validation": split("validation")}


@dataclass(frozen=True)
class Source:
    """Part of a mixture."""

    name: str
    weight: float
    """Times that each of its rows comes in an epoch, on average."""
    rows: int
    """Rows of the training split."""
    validation_rows: int

    @property
    def drawn(self) -> int:
        """Rows that an epoch takes."""
        return rows_drawn(self.weight, self.rows)


@dataclass(frozen=True)
class Manifest:
    """Prepared corpus: the contents of its folder or, for a mixture, of its sources' folders."""

    sequence_length: int
    vocab_size: int
    tokenizer: str
    """Digest of the tokenizer."""
    train: PackedSplit
    validation: PackedSplit
    sources: tuple[Source, ...] = ()
    """Sources of a mixture, in the order of their rows; empty for documents."""
    overlap: Overlap | None = None
    """Documents that both splits share; None: packed by a version that did not count them."""

    @property
    def digest(self) -> str:
        """Digest of every token with its document and segment, in order, of both splits, the tokenizer and the
        weights.
        """
        parts = f"{self.tokenizer} {self.sequence_length} {self.train.digest} {self.validation.digest}"
        parts += "".join(f" {source.rows} {float(source.weight)!r}" for source in self.sources)
        return hashlib.sha256(parts.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        write_json(folder / "manifest.json", {"version": MANIFEST_VERSION, "digest": self.digest, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest of a packed folder."""
        content = read_json(folder / "manifest.json")
        splits = {
            name: PackedSplit(tuple(content[name]["shards"]), content[name]["digest"])
            for name in ("train", "validation")
        }
        sources = tuple(Source(**source) for source in content.get("sources", []))
        overlap = Overlap(**content["overlap"]) if content.get("overlap") else None
        return cls(
            content["sequence_length"], content["vocab_size"], content["tokenizer"],
            **splits, sources=sources, overlap=overlap,
        )  # fmt: skip


def packed_files(folder: Path, name: str, split: PackedSplit) -> list[Path]:
    """Return the paths of a split's files; a mixture's lie beside its own folder, in those of its sources."""
    return [Path(os.path.normpath(folder / name / shard["file"])) for shard in split.shards]


def overlap_of(folder: Path, train: PackedSplit, validation: PackedSplit) -> Overlap:
    """Return how many documents stand in both splits of a packed folder."""
    return count_overlap(packed_files(folder, "train", train), packed_files(folder, "validation", validation))


class PackedRows:
    """Random access to the packed rows of a split, over memory-mapped files: a row costs the same in any shard."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = Manifest.read(folder)
        shards: PackedSplit = getattr(manifest, split)
        self.width = manifest.sequence_length
        self.sources = manifest.sources
        self._split = split
        self._ends = np.cumsum([shard["rows"] for shard in shards.shards])
        self._files = [str(path) for path in packed_files(folder, split, shards)]
        self._batches: dict[tuple[int, int], pa.RecordBatch] = {}
        self._readers: dict[int, pa.RecordBatchFileReader] = {}

    def source_rows(self) -> list[tuple[int, int]]:
        """Return (first, last + 1) of the rows of each source of a mixture."""
        rows = [source.rows if self._split == "train" else source.validation_rows for source in self.sources]
        ends = np.cumsum(rows).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _row(self, place: int) -> pa.RecordBatch:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        batch, index = divmod(place - int(self._ends[shard - 1] if shard else 0), BATCH_ROWS)
        if (shard, batch) not in self._batches:
            if shard not in self._readers:
                self._readers[shard] = pa.ipc.open_file(pa.memory_map(self._files[shard]))
            self._batches[shard, batch] = self._readers[shard].get_batch(batch)
        return self._batches[shard, batch].slice(index, 1)

    def take(self, chosen: Ints, epochs: Ints | None = None) -> Rows:
        """Return the rows at the given places of the split; row i of the result is `chosen[i]`."""
        records = [self._row(place) for place in chosen.tolist()]

        def joined(name: str, dtype: type) -> NDArray[Any]:
            flat = [record.column(name).flatten().to_numpy(zero_copy_only=False) for record in records]
            return np.concatenate(flat).astype(dtype)

        per_row = [len(record.column("lengths")[0]) for record in records]
        row = np.repeat(np.arange(len(records)), per_row)
        return Rows(
            count=len(records),
            tokens=joined("tokens", np.int64),
            lengths=joined("lengths", np.int64),
            row=row,
            segment=chosen[row] * (self.width + 1) + np.concatenate([np.arange(count) for count in per_row]),
            document=joined("documents", np.int64),
            whole=joined("whole", np.bool_),
            epoch=np.zeros_like(row) if epochs is None else epochs[row],
        )
