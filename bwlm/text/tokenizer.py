"""The tokenizer: a byte-level BPE trained with rustbpe and held as a `tiktoken.Encoding`.

One tokenizer, trained on forward text, serves every direction. All text that comes in is ordinary text: `<|bos|>`
written by a user becomes plain bytes, and ids of special tokens come from `Tokenizer.specials` alone. On disk a
tokenizer is `tokenizer.json` (pattern, special tokens, digest) beside `ranks.tiktoken` (one `base64 rank` a line).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray

from bwlm.errors import UserError
from bwlm.paths import read_json, write_atomic, write_json

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|pad|>",
    "<|forward|>",
    "<|backward|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
)
"""Special tokens; their ids follow those of the merges, in this order."""

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""Pattern of pieces that no merge crosses: nanochat's (nanochat/tokenizer.py), GPT-4's with numbers cut every two
digits."""

PIECE_CHARACTERS = 100_000
"""Longest text given to the regex engine at once. tiktoken 0.14 and rustbpe 0.1 panic on a million spaces (the stack
of their backtracking engine overflows); 100,000 characters of any one kind took 2 to 35 ms, and time grows linearly."""

FORMAT_VERSION = 1
_HEADER = "tokenizer.json"
_RANKS = "ranks.tiktoken"
_BYTES = 256
_BATCH = 64

# The split pattern always begins a new piece at a space before a word, so a cut there changes no token.
_LAST_WORD = re.compile(r".+(?= \S)", re.DOTALL)


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE_CHARACTERS`; a text that fits stays whole.

    Cuts fall before the last space that begins a word, else before the last line break, else anywhere. Joined, the
    pieces give the text back, except that a lone surrogate, which UTF-8 cannot hold, has become U+FFFD.
    """
    text = _without_surrogates(text)
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, limit: int) -> int:
    if word := _LAST_WORD.match(text, start, limit):
        return word.end()
    line_break = text.rfind("\n", start + 1, limit)
    return limit if line_break < 0 else line_break


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Fixed vocabulary: ranks 0..n-1 of byte strings, then the special tokens.

    Raises `ValueError` if the ranks are not 0..n-1 or lack a single byte, or if a special token is missing or
    doubled.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        specials: Sequence[str] = SPECIAL_TOKENS,
        pattern: str = SPLIT_PATTERN,
    ) -> None:
        tokens = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("ranks are not 0..n-1")
        if any(bytes([byte]) not in ranks for byte in range(_BYTES)):
            raise ValueError("ranks lack a single byte")
        if len(set(specials)) != len(specials) or not set(SPECIAL_TOKENS) <= set(specials):
            raise ValueError("a special token is missing or doubled")
        self.tokens: Sequence[bytes] = tokens
        """Byte string of each id, without the special tokens."""
        self.specials: Mapping[str, int] = {name: len(tokens) + index for index, name in enumerate(specials)}
        """Ids of the special tokens by name, in the order of the ids."""
        self._encoding = tiktoken.Encoding(
            "bwlm", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(self.specials)
        )
        self.pattern = pattern
        self.digest = _digest(_rank_lines(tokens), specials, pattern)
        """SHA-256, in hex, over the ranks, the special tokens and the pattern."""

    @property
    def vocab_size(self) -> int:
        """Number of bytes, merges and special tokens together."""
        return len(self.tokens) + len(self.specials)

    @property
    def bos(self) -> int:
        """Id of `<|bos|>`, which begins every segment and ends a document."""
        return self.specials["<|bos|>"]

    @property
    def pad(self) -> int:
        """Id of `<|pad|>`."""
        return self.specials["<|pad|>"]

    @property
    def forward(self) -> int:
        """Id of the marker `<|forward|>`."""
        return self.specials["<|forward|>"]

    @property
    def backward(self) -> int:
        """Id of the marker `<|backward|>`."""
        return self.specials["<|backward|>"]

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of ordinary text, without any special token. The array may be read-only."""
        return _join([self._encode_piece(piece) for piece in pieces(text)])

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, as `encode` gives them, with the pieces shared among threads."""
        per_text = [list(pieces(text)) for text in texts]
        encoded = iter(self._encode_pieces([piece for cut in per_text for piece in cut], threads))
        return [_join(list(itertools.islice(encoded, len(cut)))) for cut in per_text]

    def _encode_pieces(self, cut: list[str], threads: int) -> list[NDArray[np.uint32]]:
        if threads == 1:
            return self._encode_some(cut)
        # batches, since starting a task costs more than encoding a short piece
        batches = [cut[start : start + _BATCH] for start in range(0, len(cut), _BATCH)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for batch in pool.map(self._encode_some, batches) for ids in batch]

    def _encode_some(self, cut: list[str]) -> list[NDArray[np.uint32]]:
        return [self._encode_piece(piece) for piece in cut]

    def _encode_piece(self, piece: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(piece, disallowed_special=())

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """Return the bytes of ids; a special token gives its name."""
        return self._encoding.decode_bytes(np.asarray(ids).tolist())

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Return the text of ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        """Return the UTF-8 bytes of each id, 0 for special tokens: what bits per byte divides by."""
        return np.array([len(token) for token in self.tokens] + [0] * len(self.specials), dtype=np.int32)

    def save(self, folder: Path) -> None:
        """Write both files into `folder`; a reader in between finds digests that differ, never a wrong tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _RANKS, _rank_lines(self.tokens))
        header = {
            "format": FORMAT_VERSION,
            "pattern": self.pattern,
            "specials": list(self.specials),
            "digest": self.digest,
        }
        write_json(folder / _HEADER, header)

    @classmethod
    def load(cls, folder: Path, digest: str | None = None) -> Tokenizer:
        """Return the tokenizer that `save` wrote; with `digest`, only the one that has it.

        Raises `UserError` that names what is missing, damaged or of another tokenizer.
        """
        pattern, specials, noted = _read_header(folder / _HEADER)
        ranks = _read_ranks(folder / _RANKS)
        try:
            tokenizer = cls(ranks, specials, pattern)
        except ValueError as error:
            raise UserError(f"{folder}: not a tokenizer ({error}): train it again") from None
        if tokenizer.digest != noted:
            raise UserError(
                f"{folder / _HEADER}: digest: does not match this file and {_RANKS}: copy both again, or train again"
            )
        if digest not in (None, tokenizer.digest):
            raise UserError(
                f"{folder / _HEADER}: not the tokenizer of the run (digest {noted}, not {digest}): "
                "put the run's own back"
            )
        return tokenizer


def byte_counts(token_bytes: NDArray[np.integer]) -> str:
    """Return a digest of a table of bytes per token id, 16 hex digits: bits per byte compare only where it is equal."""
    return hashlib.sha256(token_bytes.astype("<i4").tobytes()).hexdigest()[:16]


def _join(arrays: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _rank_lines(tokens: Sequence[bytes]) -> bytes:
    """Return the tokens in tiktoken's own file format."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _digest(rank_lines: bytes, specials: Sequence[str], pattern: str) -> str:
    header = json.dumps({"pattern": pattern, "specials": list(specials)}, sort_keys=True)
    return hashlib.sha256(header.encode() + b"\n" + rank_lines).hexdigest()


def _read_header(path: Path) -> tuple[str, list[str], str]:
    if not path.exists():
        raise UserError(f"{path}: no such file: copy or train the tokenizer again")
    header = read_json(path)
    match header:
        case {"format": version} if version != FORMAT_VERSION:
            raise UserError(f"{path}: format: {version!r} is not {FORMAT_VERSION}: train the tokenizer again")
        case {"format": _, "pattern": str(pattern), "specials": [*specials], "digest": str(digest)}:
            return pattern, [str(name) for name in specials], digest
    raise UserError(f"{path}: not a tokenizer's header: train the tokenizer again")


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: copy or train the tokenizer again") from None
    return dict(_read_rank(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1))


def _read_rank(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except ValueError:
        raise UserError(f"{where}: not a token in base64 and its rank: copy or train the tokenizer again") from None


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`; the same texts in the same order give the same digest.

    A `vocab_size` of bytes and special tokens alone (264) gives the tokenizer without merges, whatever the texts.
    Text with too few different words gives a smaller vocabulary than asked for. Raises `UserError` for a `vocab_size`
    that leaves no room for the bytes, and if there is no text.
    """
    import rustbpe

    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.vocab_size: {vocab_size} is too small: give at least {smallest}")
    first = next((text for text in texts if text), None)
    if first is None:
        raise UserError("data.source: no text to train a tokenizer on: give documents that are not empty")
    if vocab_size == smallest:
        return Tokenizer({bytes([byte]): byte for byte in range(_BYTES)})
    cut = (piece for text in itertools.chain([first], texts) for piece in pieces(text))
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(cut, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    return Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
