"""Prepares a corpus once, however many cells share it: finds the text, gets its tokenizer, packs its rows.

Everything lies below `<storage>/cache`, named by what it was made from, and is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bwlm.config import Recipe
from bwlm.errors import UserError
from bwlm.paths import atomic_folder, local_path
from bwlm.text.corpus import Corpus, check_shards, find_corpus, read_texts
from bwlm.text.packing import MANIFEST_VERSION, Manifest
from bwlm.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer

ShowProgress = Callable[[str], None]
Pack = Callable[[Corpus, Path, int, Path], Manifest]

_TRAINING_CHARACTERS = 2_000_000_000
"""Most characters that BPE training reads, as nanochat's tok_train.py does."""


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
    made_from = f"{MANIFEST_VERSION} {corpus.listing()} {corpus.shuffle} {tokenizer.digest} {width}"
    folder = cache / "packed" / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    if not (folder / "manifest.json").exists():
        progress(f"tokenizing and packing {len(corpus.train) + len(corpus.validation)} shards")
        try:
            with atomic_folder(folder) as temporary:
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
    named = _given_tokenizer(recipe)
    corpus = find_corpus(recipe.data, cache, progress)
    check_shards(corpus)
    folder, tokenizer = named or _trained_tokenizer(recipe.tokenizer.vocab_size, corpus, cache, progress)
    return corpus, folder, tokenizer


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


def _trained_tokenizer(wanted: int, corpus: Corpus, cache: Path, progress: ShowProgress) -> tuple[Path, Tokenizer]:
    rules = hashlib.sha256(repr((SPLIT_PATTERN, SPECIAL_TOKENS)).encode()).hexdigest()[:8]
    folder = cache / "tokenizers" / f"{corpus.listing()}-{rules}-{wanted}"
    if not folder.exists():
        progress(f"training a tokenizer of {wanted} tokens")
        trained = train_tokenizer(_training_texts(corpus), wanted)
        if trained.vocab_size != wanted:
            raise UserError(
                f"tokenizer.vocab_size: the text yields only {trained.vocab_size} tokens, not {wanted}: "
                f"set tokenizer.vocab_size={trained.vocab_size} or give more text"
            )
        with atomic_folder(folder) as temporary:
            trained.save(temporary)
    return folder, Tokenizer.load(folder)


def _training_texts(corpus: Corpus) -> Iterator[str]:
    left = _TRAINING_CHARACTERS
    for shard in corpus.train:
        for texts in read_texts(shard.uri, corpus.text_column):
            for text in texts:
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
        for texts in read_texts(shard.uri, corpus.text_column):
            for ids in tokenizer.encode_batch(texts, threads=2):
                counted += int(lengths[ids].sum())
                tokens += len(ids)
    if tokens == 0:
        raise UserError(
            "data.validation: the validation shards hold no text: give shards with documents that are not empty"
        )
    return counted / tokens
