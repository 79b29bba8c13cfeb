"""Mixtures of conversations: each source rendered and packed once, and one manifest over the rows of all.

A source is packed for itself, below `<storage>/cache`, named by what it was made from, so that mixtures share it; the
weights only say how many of its rows an epoch takes (`MixturePlan`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bwlm.errors import UserError
from bwlm.paths import whole_folder
from bwlm.text.conversation import TurnIds, check_conversation, cut_to, render
from bwlm.text.direction import HEAD_SLOTS
from bwlm.text.overlap import DocumentHashes
from bwlm.text.packing import (
    MANIFEST_VERSION,
    Items,
    Manifest,
    Run,
    ShardCounts,
    Source,
    Split,
    Unsplit,
    cut,
    overlap_of,
    pack_whole,
    packed_splits,
    room_of,
    write_rows,
)
from bwlm.text.prepare import Prepared, Progress
from bwlm.text.tokenizer import Tokenizer

_SOURCE_BITS = 32
"""A document's id is a part of its source's key, shifted by this, plus its index there: one id in any mixture."""

Name = Literal["train", "validation"]
SPLITS: tuple[Name, ...] = ("train", "validation")
FORMAT_VERSION = 3
"""Counts up whenever the same conversations would give other rows."""


@dataclass(frozen=True)
class ConversationSource:
    """Where conversations come from, as a task or a file gives them."""

    name: str
    weight: float
    key: str
    """Names what `read` gives."""
    read: Callable[[Name], Iterator[Any]]
    """The messages of each conversation of a split, always in one order."""
    parts: int = 1
    """In which the training split is packed, beside each other; each reads all of it, so more than 1 is for files."""
    notes: tuple[str, ...] = ()
    """Lines that tell a person which of its files are left out."""


def prepare_mixture(
    sources: list[ConversationSource],
    tokenizer_folder: Path,
    width: int,
    whole: bool,
    storage: Path,
    run: Run,
    progress: Progress,
) -> Prepared:
    """Rows of `width` + 1 slots of all sources, from the cache where they were packed before.

    `whole`: no conversation is split over rows, and one that is longer than a row is cut (`cut_to`); else they are
    packed as documents are. Raises `UserError` for every fault of a conversation, and for a split without any.
    """
    tokenizer, cache = Tokenizer.load(tokenizer_folder), storage / "cache" / "packed"
    folders = [_folder(cache, f"{source.key} {tokenizer.digest} {width} {whole}") for source in sources]
    for source, folder in zip(sources, folders, strict=True):
        for note in source.notes:
            progress(note)
        if not (folder / "manifest.json").exists():
            progress(f"rendering and packing the conversations of {source.name}")
            with whole_folder(folder) as temporary:
                manifest = _pack(source, tokenizer_folder, tokenizer, width, whole, temporary, run)
            for line in _lost(source.name, manifest):
                progress(line)
    mixture = _mixed(sources, folders)
    folder = _folder(cache, f"mixture {mixture.digest}")
    if not (folder / "manifest.json").exists():
        with whole_folder(folder) as temporary:
            overlap = overlap_of(temporary, mixture.train, mixture.validation)
            replace(mixture, overlap=overlap).write(temporary)
    mixture = Manifest.read(folder)
    if mixture.overlap and (told := mixture.overlap.words("conversation")):
        progress(told)
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
    run: Run,
) -> Manifest:
    items: Items = []
    for split, parts in (("train", source.parts), ("validation", 1)):
        (folder / split).mkdir()
        items += [{"split": split, "part": part, "parts": parts, "folder": str(folder)} for part in range(parts)]
    results = run(items, partial(_pack_part, source, str(tokenizer_folder), width, whole))
    splits = packed_splits(results)
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


def _pack_part(
    source: ConversationSource, tokenizer_folder: str, width: int, whole: bool, item: dict[str, Any]
) -> dict[str, Any]:
    """Every `parts`-th conversation of a split in, one file of packed rows out; as `bwlm.text.stream.pack_shard`."""
    tokenizer = Tokenizer.load(Path(tokenizer_folder))
    counts = ShardCounts(f"part_{item['part']:05d}.arrow")
    hashes = DocumentHashes()
    rendered = _render_part(source, item, tokenizer, counts, hashes, room_of(width) - HEAD_SLOTS if whole else None)
    rows = pack_whole(rendered, width) if whole else cut(((document, ids) for document, ids, _ in rendered), width)
    target = Path(item["folder"]) / item["split"] / counts.file
    try:
        write_rows(target, rows, tokenizer.vocab_size, counts)
        hashes.save(target)
    except UserError as error:
        return {"split": item["split"], "file": counts.file, "counts": {}, "error": str(error)}
    return {"split": item["split"], "file": counts.file, "counts": counts.finish(), "error": ""}


def _render_part(
    source: ConversationSource,
    item: dict[str, Any],
    tokenizer: Tokenizer,
    counts: ShardCounts,
    hashes: DocumentHashes,
    room: int | None,
) -> Iterator[Unsplit]:
    """Each conversation, cut to `room` tokens where there is one."""
    turns, token_bytes = TurnIds.of(tokenizer), tokenizer.token_bytes()
    first = int(source.key[:6], 16) << _SOURCE_BITS
    for index, messages in enumerate(source.read(item["split"])):
        if index % item["parts"] != item["part"]:
            continue
        counts.documents += 1
        whole = render(check_conversation(messages, f"{source.name}: {item['split']} conversation {index}"), tokenizer)
        hashes.add(whole)
        ids = whole if room is None else cut_to(whole, room, turns)
        if ids is None:
            counts.left_out += 1
            continue
        is_whole = len(ids) == len(whole)
        counts.cut += not is_whole
        counts.bytes += int(token_bytes[ids].sum())
        yield first + index, ids, is_whole


def _lost(name: str, manifest: Manifest) -> Iterator[str]:
    for split in SPLITS:
        counted: Split = getattr(manifest, split)
        cut_short, left_out = counted.total("cut"), counted.total("left_out")
        if cut_short or left_out:
            yield (
                f"{name}: of {counted.total('documents'):,} {split} conversations {cut_short:,} were cut to the length "
                f"of a row, and {left_out:,} left out, of which nothing to learn would have been left"
            )


def _mixed(sources: list[ConversationSource], folders: list[Path]) -> Manifest:
    """One manifest over all sources, whose shards lie in the folders beside its own."""
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


def _joined(name: Name, parts: list[tuple[str, Split]]) -> Split:
    """The shards of one split of all sources, in order, as they lie from the mixture's folder."""
    shards = [
        shard | {"file": f"../../{folder}/{name}/{shard['file']}"} for folder, part in parts for shard in part.shards
    ]
    return Split(tuple(shards), hashlib.sha256(" ".join(part.digest for _, part in parts).encode()).hexdigest())
