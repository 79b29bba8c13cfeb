"""Prepares a corpus once, however many cells share it: finds the text, gets its tokenizer, packs its rows.

Everything lies below `<storage>/cache`, named by what it was made from, and is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Recipe
from bwlm.errors import UserError
from bwlm.format import counted, file_size
from bwlm.paths import atomic_folder, local_path
from bwlm.progress import track, working
from bwlm.text.corpus import Corpus, checked, find_corpus, read_texts
from bwlm.text.packing import MANIFEST_VERSION, SPLITS, Manifest, PackedSplit, ShardCounts, cut, write_rows
from bwlm.text.tally import discard_tallies, items_done
from bwlm.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer

ShowProgress = Callable[[str], None]
Pack = Callable[[Corpus, Path, int, Path], Manifest]

_TRAINING_CHARACTERS = 2_000_000_000
"""Most characters that BPE training reads, as nanochat's tok_train.py does."""
_HEAD_CHARACTERS = 1_000_000
"""Characters from which a tokenizer is trained where only the head of a corpus is looked at."""


@dataclass(frozen=True)
class Prepared:
    """Corpus that is ready to be streamed."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    tokenizer_folder: Path
    corpus: Corpus | None = None
    """Shards that it was made from; None: a mixture of conversations."""


def prepare(recipe: Recipe, storage: Path, pack: Pack, progress: ShowProgress) -> Prepared:
    """Return the corpus that `recipe` asks for, from the cache where it was prepared before.

    `pack` does the parallel work (`bwlm.text.stream.pack_corpus`). Raises `UserError` for every fault of the text.
    """
    cache = storage / "cache"
    before = {path for path in (storage, cache, *cache.glob("*"), *cache.glob("tokenizers/*")) if path.exists()}
    corpus, tokenizer_folder, tokenizer = get_tokenizer(recipe, cache, progress)
    width = recipe.model.sequence_length
    folder = _packed_folder(cache, corpus, tokenizer, width)
    if not (folder / "manifest.json").exists():
        progress(f"tokenizing and packing {len(corpus.train) + len(corpus.validation)} shards")
        try:
            with (
                atomic_folder(folder) as temporary,
                packing_progress("text", "documents", sum(corpus.documents), temporary),
            ):
                pack(corpus, tokenizer_folder, width, temporary)
        except UserError:
            # corrected text is another corpus, so the tokenizer that was just trained on this one would never be used
            if tokenizer_folder.is_relative_to(cache) and tokenizer_folder not in before:
                shutil.rmtree(tokenizer_folder)
                _remove_empty([cache / "tokenizers", cache, storage], before)
            raise
    manifest = Manifest.read(folder)
    if manifest.overlap and (note := manifest.overlap.words()):
        progress(note)
    return Prepared(folder, manifest, tokenizer, tokenizer_folder, corpus)


@contextlib.contextmanager
def packing_progress(what: str, noun: str, total: int, folder: Path) -> Iterator[None]:
    """Show how much the workers have read while they pack a folder; `total` 0: nobody knows how much there is."""
    with working(f"packing {what}", noun, total, lambda: items_done(folder)):
        yield
    discard_tallies(folder)


def _packed_folder(cache: Path, corpus: Corpus, tokenizer: Tokenizer, width: int) -> Path:
    made_from = f"{MANIFEST_VERSION} {corpus.listing()} {corpus.shuffle} {tokenizer.digest} {width}"
    return cache / "packed" / hashlib.sha256(made_from.encode()).hexdigest()[:16]


def find_prepared(recipe: Recipe, corpus: Corpus, cache: Path) -> Prepared | None:
    """Return what `prepare` would return for a corpus, if it is in the cache; None if it must still be prepared."""
    if (known := _known_tokenizer(recipe, corpus, cache)) is None:
        return None
    folder = _packed_folder(cache, corpus, known[1], recipe.model.sequence_length)
    if not (folder / "manifest.json").exists():
        return None
    return Prepared(folder, Manifest.read(folder), known[1], known[0], corpus)


def prepare_head(recipe: Recipe, corpus: Corpus, cache: Path, rows: int, folder: Path) -> Prepared:
    """Pack the first rows of a corpus into `folder`, in the order of its files, and read no more than they need.

    A tokenizer that is not there yet is trained on the first `_HEAD_CHARACTERS`, for this purpose alone. The
    validation split is the same rows again.
    """
    known = _known_tokenizer(recipe, corpus, cache)
    tokenizer_folder, tokenizer = known or (folder, _tokenizer_of_head(recipe, corpus))
    width, counts = recipe.model.sequence_length, ShardCounts("head.arrow")
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    first = itertools.islice(cut(_documents(corpus, tokenizer), width), rows)
    write_rows(folder / SPLITS[0] / counts.file, first, tokenizer.vocab_size, counts)
    if not counts.rows:
        raise UserError("data.source: the train shards hold no text: give shards with documents that are not empty")
    packed = PackedSplit.from_shards([counts.finish()])
    manifest = Manifest(width, tokenizer.vocab_size, tokenizer.digest, packed, packed)
    manifest.write(folder)
    return Prepared(folder, manifest, tokenizer, tokenizer_folder, corpus)


def _documents(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Yield the number and the tokens of each training document, in the order of the files."""
    return enumerate(tokenizer.encode(text) for text in _training_documents(corpus))


def _tokenizer_of_head(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    return train_tokenizer(_training_texts(corpus, _HEAD_CHARACTERS), recipe.tokenizer.vocab_size)


def find_packed(storage: Path, named: Path, digest: str) -> Path | None:
    """Return the packed text with this digest: the folder `named`, else any in the cache; None if it is gone."""
    for folder in (named, *sorted((storage / "cache" / "packed").glob("*"))):
        if (folder / "manifest.json").exists() and Manifest.read(folder).digest == digest:
            return folder
    return None


def _remove_empty(folders: list[Path], before: set[Path]) -> None:
    for folder in folders:
        if folder not in before:
            with contextlib.suppress(OSError):  # not empty: still in use
                folder.rmdir()


def get_tokenizer(recipe: Recipe, cache: Path, progress: ShowProgress) -> tuple[Corpus, Path, Tokenizer]:
    """Return the corpus, and its tokenizer with its folder: that at `tokenizer.path`, else one trained on the corpus.

    A tokenizer that was trained on the same corpus before is read from the cache. Raises `UserError` for a fault of
    the text or of the tokenizer.
    """
    _given_tokenizer(recipe)  # a mistake in it is reported before the text is read
    corpus = checked(find_corpus(recipe.data, cache, progress))
    known = _known_tokenizer(recipe, corpus, cache)
    folder, tokenizer = known or _trained_tokenizer(recipe.tokenizer.vocab_size, corpus, cache, progress)
    return corpus, folder, tokenizer


def _known_tokenizer(recipe: Recipe, corpus: Corpus, cache: Path) -> tuple[Path, Tokenizer] | None:
    """Return the tokenizer at `tokenizer.path`, else one that was trained on the corpus before, with its folder."""
    if (given := _given_tokenizer(recipe)) is not None:
        return given
    folder = _tokenizer_folder(recipe.tokenizer.vocab_size, corpus, cache)
    return (folder, Tokenizer.load(folder)) if folder.exists() else None


def _given_tokenizer(recipe: Recipe) -> tuple[Path, Tokenizer] | None:
    if recipe.tokenizer.path is None:
        return None
    wanted, path = recipe.tokenizer.vocab_size, local_path(recipe.tokenizer.path)
    if path is None:
        raise UserError(f"tokenizer.path: {recipe.tokenizer.path!r} is not a folder: give a local or shared (NFS) path")
    folder = path.resolve()
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != wanted:
        raise UserError(
            f"tokenizer.vocab_size: {wanted}, but {folder} has {tokenizer.vocab_size}: "
            f"set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return folder, tokenizer


def _tokenizer_folder(wanted: int, corpus: Corpus, cache: Path) -> Path:
    rules = hashlib.sha256(repr((SPLIT_PATTERN, SPECIAL_TOKENS)).encode()).hexdigest()[:8]
    return cache / "tokenizers" / f"{corpus.listing()}-{rules}-{wanted}"


def _trained_tokenizer(wanted: int, corpus: Corpus, cache: Path, progress: ShowProgress) -> tuple[Path, Tokenizer]:
    progress(f"training a tokenizer of {wanted} tokens")
    with working("merging pairs of tokens"):
        trained = train_tokenizer(_training_texts(corpus, _TRAINING_CHARACTERS), wanted)
    if trained.vocab_size != wanted:
        raise UserError(
            f"tokenizer.vocab_size: the text to train on ({_amount(corpus)}) yields only {trained.vocab_size} tokens, "
            f"not {wanted}: give more text, or set tokenizer.vocab_size={trained.vocab_size}"
        )
    folder = _tokenizer_folder(wanted, corpus, cache)
    with atomic_folder(folder) as temporary:
        trained.save(temporary)
    return folder, Tokenizer.load(folder)


def _amount(corpus: Corpus) -> str:
    """Return the amount of training text in words: `1 document, 24 B`."""
    sizes = [len(text.encode()) for text in _training_documents(corpus)]
    return f"{counted(len(sizes), 'document')}, {file_size(sum(sizes))}"


def _training_documents(corpus: Corpus) -> Iterator[str]:
    for shard in corpus.train:
        for texts in read_texts(shard.uri, corpus.text_column):
            yield from texts


def _training_texts(corpus: Corpus, characters: int) -> Iterator[str]:
    """Yield the first `characters` of the training text."""
    left, documents = characters, _training_documents(corpus)
    for text in track(documents, "reading text for the tokenizer", "documents", corpus.documents[0]):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def bytes_per_token(tokenizer: Tokenizer, corpus: Corpus) -> float:
    """Return the UTF-8 bytes per token of the validation text, which the tokenizer was not trained on.

    Raises `UserError` if it has no tokens.
    """
    lengths, counted, tokens = tokenizer.token_bytes(), 0, 0
    for shard in corpus.validation:
        texts_read = read_texts(shard.uri, corpus.text_column)
        for texts in track(texts_read, f"tokenizing {shard.uri}", "batches of documents"):
            for ids in tokenizer.encode_batch(texts, threads=2):
                counted += int(lengths[ids].sum())
                tokens += len(ids)
    if tokens == 0:
        raise UserError(
            "data.validation: the validation shards hold no text: give shards with documents that are not empty"
        )
    return counted / tokens
