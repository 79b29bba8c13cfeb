"""Mixtures of conversations: each source rendered and packed once, and one manifest over the rows of all.

Each source is packed on its own below `<storage>/cache`, named by what it was made from, so that mixtures share it.
The weights only say how many of its rows an epoch takes (`MixturePlan`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import atomic_folder
from bwlm.text.conversation import TurnIds, check_conversation, cut_to, render
from bwlm.text.direction import HEAD_SLOTS
from bwlm.text.overlap import DocumentHashes
from bwlm.text.packing import (
    MANIFEST_VERSION,
    SPLITS,
    Manifest,
    PackedSplit,
    PackJob,
    PackResult,
    RunJobs,
    ShardCounts,
    Source,
    SplitName,
    Unsplit,
    cut,
    overlap_of,
    pack_whole,
    packed_splits,
    room_of,
    write_rows,
)
from bwlm.text.prepare import Prepared, ShowProgress, packing_progress
from bwlm.text.tally import tallied
from bwlm.text.tokenizer import Tokenizer

_SOURCE_BITS = 32
"""Bits of a conversation's index in its document id. Above them stand 24 bits of its source's key, so that the id is
the same in any mixture."""

FORMAT_VERSION = 4
"""Version of packing: raise it whenever the same conversations would give other rows."""


@dataclass(frozen=True)
class ConversationSource:
    """Source of conversations, from a task or a file."""

    name: str
    weight: float
    key: str
    """Name of what `read` gives: hexadecimal digits, different for different conversations."""
    read: Callable[[SplitName], Iterator[Any]]
    """Messages of each conversation of a split, always in one order."""
    parts: int = 1
    """Number of files that the training split is packed into, in parallel. Each part reads the whole split, so use
    more than 1 only for files."""
    notes: tuple[str, ...] = ()
    """Lines that tell a person which of its files are left out."""
    check: Callable[[ShowProgress], None] = lambda _: None
    """Reads all conversations once before they are packed: tells what is left out, or raises `UserError` with every
    fault."""


@dataclass(frozen=True)
class PartJob(PackJob):
    """Part of a source's split that becomes a file of packed rows: every `parts`-th conversation."""

    parts: int


def prepare_mixture(
    sources: list[ConversationSource],
    tokenizer_folder: Path,
    width: int,
    whole: bool,
    storage: Path,
    run: RunJobs,
    progress: ShowProgress,
) -> Prepared:
    """Return rows of `width` + 1 slots of all sources, from the cache where they were packed before.

    `whole`: no conversation is split over rows, and a conversation longer than a row is cut (`cut_to`); else they are
    packed as documents are. Raises `UserError` for every fault of a conversation, and for a split without any.
    """
    tokenizer, cache = Tokenizer.load(tokenizer_folder), storage / "cache" / "packed"
    folders = [_folder(cache, f"{source.key} {tokenizer.digest} {width} {whole}") for source in sources]
    for source, folder in zip(sources, folders, strict=True):
        for note in source.notes:
            progress(note)
        if not (folder / "manifest.json").exists():
            source.check(progress)
            progress(f"rendering and packing the conversations of {source.name}")
            with atomic_folder(folder) as temporary, packing_progress(source.name, "conversations", 0, temporary):
                manifest = _pack(source, tokenizer_folder, tokenizer, width, whole, temporary, run)
            for line in _lost(source.name, manifest):
                progress(line)
    mixture = _mixed(sources, folders)
    folder = _folder(cache, f"mixture {mixture.digest}")
    if not (folder / "manifest.json").exists():
        with atomic_folder(folder) as temporary:
            overlap = overlap_of(temporary, mixture.train, mixture.validation)
            replace(mixture, overlap=overlap).write(temporary)
    mixture = Manifest.read(folder)
    if mixture.overlap and (repeated := mixture.overlap.words("conversation")):
        progress(repeated)
    return Prepared(folder, mixture, tokenizer, tokenizer_folder)


def _folder(cache: Path, recipe: str) -> Path:
    return cache / hashlib.sha256(f"{FORMAT_VERSION} {MANIFEST_VERSION} {recipe}".encode()).hexdigest()[:16]


def _pack(
    source: ConversationSource,
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    width: int,
    whole: bool,
    folder: Path,
    run: RunJobs,
) -> Manifest:
    jobs: list[PartJob] = []
    parts = {"train": source.parts, "validation": 1}
    for split in SPLITS:
        (folder / split).mkdir()
        jobs += [
            PartJob(split, index, f"part_{index:05d}.arrow", str(folder), parts[split]) for index in range(parts[split])
        ]
    splits = packed_splits(run(jobs, partial(_pack_part, source, str(tokenizer_folder), width, whole)))
    for name in SPLITS:
        if not splits[name].total("rows"):
            raise UserError(_empty(source.name, name, splits[name].total("documents"), width))
    manifest = Manifest(width, tokenizer.vocab_size, tokenizer.digest, **splits)
    manifest.write(folder)
    return manifest


def _empty(source: str, split: str, conversations: int, width: int) -> str:
    if not conversations:
        return f"data.mixture: {source}: has no {split} conversations: give some for training and some for validation"
    return (
        f"data.mixture: {source}: none of its {conversations:,} {split} conversations fits into {width} tokens: "
        "give shorter ones, or a model with a longer model.sequence_length"
    )


def _pack_part(source: ConversationSource, tokenizer_folder: str, width: int, whole: bool, job: PartJob) -> PackResult:
    """Render every `parts`-th conversation of a split and write one file of packed rows."""
    tokenizer = Tokenizer.load(Path(tokenizer_folder))
    counts = ShardCounts(job.file)
    hashes = DocumentHashes()
    rendered = _render_part(source, job, tokenizer, counts, hashes, room_of(width) - HEAD_SLOTS if whole else None)
    rows = pack_whole(rendered, width) if whole else cut(((document, ids) for document, ids, _ in rendered), width)
    try:
        write_rows(job.target, rows, tokenizer.vocab_size, counts)
        hashes.save(job.target)
    except UserError as error:
        return PackResult(job.split, job.file, error=str(error))
    return PackResult(job.split, job.file, counts.finish())


def _render_part(
    source: ConversationSource,
    job: PartJob,
    tokenizer: Tokenizer,
    counts: ShardCounts,
    hashes: DocumentHashes,
    room: int | None,
) -> Iterator[Unsplit]:
    """Yield each conversation of a part, cut to `room` tokens unless that is None."""
    turns, token_bytes = TurnIds.from_tokenizer(tokenizer), tokenizer.token_bytes()
    first = int(source.key[:6], 16) << _SOURCE_BITS
    own = ((index, messages) for index, messages in enumerate(source.read(job.split)) if index % job.parts == job.index)
    for [(index, messages)] in tallied(([one] for one in own), job.target):
        counts.documents += 1
        where = f"{source.name}: {job.split} conversation {index}: messages"
        whole = render(check_conversation(messages, where), tokenizer)
        hashes.add(whole)
        ids = whole if room is None else cut_to(whole, room, turns)
        if ids is None:
            counts.left_out += 1
            continue
        is_whole = len(ids) == len(whole)
        counts.cut += not is_whole
        counts.bytes += int(token_bytes[ids].sum())
        yield first + index, ids, is_whole


_ADVICE = ": begin from a run with a longer model.sequence_length"
"""Advice if most conversations of a source were cut."""


def _lost(name: str, manifest: Manifest) -> Iterator[str]:
    for split in SPLITS:
        counted: PackedSplit = getattr(manifest, split)
        cut_short, left_out = counted.total("cut"), counted.total("left_out")
        total, width = counted.total("documents"), manifest.sequence_length
        if cut_short:
            yield (
                f"{name}: {cut_short:,} of {total:,} {split} conversations are longer than a row of {width:,} tokens "
                f"and were cut{_ADVICE if cut_short > total / 2 else ''}"
            )
        if left_out:
            yield (
                f"{name}: {left_out:,} of {total:,} {split} conversations left out: nothing to learn of them fits into "
                f"a row of {width:,} tokens"
            )


def _mixed(sources: list[ConversationSource], folders: list[Path]) -> Manifest:
    """Return the manifest over all sources, whose shards lie in the folders beside its own."""
    manifests = [Manifest.read(folder) for folder in folders]
    named = list(zip([folder.name for folder in folders], manifests, strict=True))
    train = _joined("train", [(name, manifest.train) for name, manifest in named])
    validation = _joined("validation", [(name, manifest.validation) for name, manifest in named])
    shares = tuple(
        Source(source.name, source.weight, manifest.train.total("rows"), manifest.validation.total("rows"))
        for source, manifest in zip(sources, manifests, strict=True)
    )
    first = manifests[0]
    return Manifest(first.sequence_length, first.vocab_size, first.tokenizer, train, validation, shares)


def _joined(name: SplitName, parts: list[tuple[str, PackedSplit]]) -> PackedSplit:
    """Return one split over all sources: their shards in order, with paths relative to the mixture's folder."""
    shards = [
        shard | {"file": f"../../{folder}/{name}/{shard['file']}"} for folder, part in parts for shard in part.shards
    ]
    return PackedSplit(tuple(shards), hashlib.sha256(" ".join(part.digest for _, part in parts).encode()).hexdigest())
