"""The tokenizer: nothing is lost, nobody smuggles in special tokens, and a damaged file is refused."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from bwlm.text import tokenizer as module
from bwlm.text.tokenizer import PIECE_CHARACTERS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, pieces, train_tokenizer

VOCAB_SIZE = 800
SPACES = " " * 1_200_000
"""More than tiktoken's and rustbpe's regex engines survive at once."""

anything = settings(derandomize=True, deadline=None)
bytes_only = {bytes([byte]): byte for byte in range(256)}


def train() -> Tokenizer:
    return train_tokenizer((topics[name] for name in sorted(topics)[:20]), VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


@anything
@given(st.text())
def test_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_words_become_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("statement")) < len("statement") / 2
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_special_tokens_stand_after_the_merges_and_count_no_bytes(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.specials[name] for name in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert ids[:4] == [tokenizer.bos, tokenizer.pad, tokenizer.forward, tokenizer.backward]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.shape == (VOCAB_SIZE,)
    assert token_bytes.dtype == np.int32
    assert not token_bytes[ids].any()
    assert token_bytes[: ids[0]].all()


@anything
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<|", "|>"])).map("".join))
def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text], threads=2)):
        assert (ids < tokenizer.bos).all()
        assert tokenizer.decode(ids) == text


def test_half_a_character_and_a_lone_surrogate_become_replacements() -> None:
    bare = Tokenizer(bytes_only)
    assert bare.decode_bytes(bare.encode("é")[:1]) == b"\xc3"
    assert bare.decode(bare.encode("é")[:1]) == "\ufffd"
    assert bare.decode(bare.encode("a\ud800b")) == "a\ufffdb"
    assert train_tokenizer(iter(["a\ud800b"]), 300).vocab_size > 256


@anything
@given(st.text(alphabet="ab .\n\u3000é"), st.integers(2, 12))
def test_pieces_join_to_the_text_and_keep_their_bound(text: str, bound: int) -> None:
    with patch.object(module, "PIECE_CHARACTERS", bound):
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= bound
        assert len(cut) == 1 or all(cut)
        assert len(text) > bound or cut == [text]


words = st.text(alphabet="abZé1', .\n(", min_size=1, max_size=6).filter(lambda word: not word[0].isspace())


@settings(anything, max_examples=300)
@given(st.lists(words, min_size=2, max_size=30), st.sampled_from([" ", "  ", "\n ", ".\n\n "]))
def test_cutting_before_a_word_changes_no_token(tokenizer: Tokenizer, parts: list[str], space: str) -> None:
    text = space.join(parts)
    uncut = tokenizer.encode(text)
    with patch.object(module, "PIECE_CHARACTERS", 16):
        np.testing.assert_array_equal(tokenizer.encode(text), uncut)


def test_without_a_word_the_cut_falls_before_a_line_break() -> None:
    with patch.object(module, "PIECE_CHARACTERS", 8):
        assert list(pieces("abc\ndefgh")) == ["abc", "\ndefgh"]
        assert list(pieces("abcdefghij")) == ["abcdefgh", "ij"]


@pytest.mark.parametrize(
    "text",
    [
        "a" * (PIECE_CHARACTERS + 1),
        "".join(random.Random(0).choices(string.ascii_letters, k=300_000)),
        SPACES,
        SPACES + "x",
        "漢" * 250_000,
        "the quick brown fox " * 20_000,
    ],
    ids=["letter", "letters", "spaces", "spaces and x", "wide", "words"],
)
def test_long_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode_batch(["short", text], threads=2)[1], ids)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_equals_its_texts(tokenizer: Tokenizer, threads: int) -> None:
    texts = [*topics.values(), "", "x" * (2 * PIECE_CHARACTERS), "", "end"]
    batch = tokenizer.encode_batch(texts, threads)
    assert len(batch) == len(texts)
    for text, ids in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([], threads) == []


def test_training_gives_the_same_digest_in_other_processes(tokenizer: Tokenizer) -> None:
    command = "import sys; sys.path.insert(0, 'tests/text'); import test_tokenizer as t; print(t.train().digest)"
    root = Path(__file__).parents[2]
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        child = subprocess.run([sys.executable, "-c", command], cwd=root, env=environment, capture_output=True)
        assert child.stdout.decode().strip() == tokenizer.digest, child.stderr.decode()


def test_little_text_gives_a_smaller_vocabulary() -> None:
    small = train_tokenizer(iter(["", "abc abc abc"]), VOCAB_SIZE)
    assert small.vocab_size == 256 + 3 + len(SPECIAL_TOKENS)
    assert small.decode(small.encode("anything at all")) == "anything at all"


def test_training_survives_what_the_regex_engine_does_not() -> None:
    assert train_tokenizer(iter(["a b", SPACES]), VOCAB_SIZE).vocab_size > 256


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_the_users_mistake(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.source: no text"):
        train_tokenizer(iter(texts), VOCAB_SIZE)


def test_a_vocabulary_without_room_for_the_bytes_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: 263 is too small: give at least 264"):
        train_tokenizer(iter(["abc abc"]), 263)
    assert train_tokenizer(iter(["abc abc"]), 265).vocab_size == 265


@pytest.fixture(scope="module")
def merge_free() -> Tokenizer:
    return train_tokenizer(iter(["abc abc"]), 264)


@anything
@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, "é", "漢", "🙂", " ", "\n", "12"])).map("".join))
def test_without_merges_each_byte_is_a_token(merge_free: Tokenizer, text: str) -> None:
    ids = merge_free.encode(text)
    assert ids.tolist() == list(text.encode())
    assert merge_free.encode_batch([text, ""], threads=2)[0].tolist() == ids.tolist()
    assert merge_free.decode(ids) == text
    # so text read backwards is the bytes read backwards
    assert merge_free.decode_bytes(ids[::-1]) == text.encode()[::-1]


@anything
@given(st.text(), st.sampled_from([r"(?s:.)", r"(?s:.)+", r"\S+|\s+"]))
def test_without_merges_the_pattern_does_not_matter(text: str, pattern: str) -> None:
    assert Tokenizer(bytes_only, SPECIAL_TOKENS, pattern).encode(text).tolist() == list(text.encode())


def test_without_merges_a_tokenizer_is_the_same_for_every_text_and_on_disk(
    merge_free: Tokenizer, tmp_path: Path
) -> None:
    assert merge_free.vocab_size == 264
    assert merge_free.bos == 256
    assert merge_free.digest == train_tokenizer(iter(["other text"]), 264).digest == Tokenizer(bytes_only).digest
    assert merge_free.token_bytes().tolist() == [1] * 256 + [0] * 8
    merge_free.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == merge_free.digest
    assert loaded.encode(SPACES + "é").tolist() == list((SPACES + "é").encode())
    with pytest.raises(UserError, match=r"data\.source: no text"):
        train_tokenizer(iter([]), 264)


def test_digest_covers_ranks_specials_and_pattern_but_not_their_order_in_memory() -> None:
    digest = Tokenizer(bytes_only).digest
    assert Tokenizer(dict(reversed(bytes_only.items()))).digest == digest
    others = [
        Tokenizer({**bytes_only, b"ab": 256}),
        Tokenizer({**bytes_only, b"a": 98, b"b": 97}),
        Tokenizer(bytes_only, [*SPECIAL_TOKENS, "<|tool|>"]),
        Tokenizer(bytes_only, SPECIAL_TOKENS[::-1]),
        Tokenizer(bytes_only, SPECIAL_TOKENS, SPLIT_PATTERN + "|x"),
    ]
    assert len({digest, *(other.digest for other in others)}) == 6


def test_a_vocabulary_that_cannot_encode_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.n-1"):
        Tokenizer({**bytes_only, b"ab": 257})
    with pytest.raises(ValueError, match="single byte"):
        Tokenizer({token: rank for token, rank in bytes_only.items() if rank < 255})
    for specials in (SPECIAL_TOKENS[1:], (*SPECIAL_TOKENS, SPECIAL_TOKENS[0])):
        with pytest.raises(ValueError, match="missing or doubled"):
            Tokenizer(bytes_only, specials)


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
    assert json.loads((folder / "tokenizer.json").read_text())["digest"] == loaded.digest == tokenizer.digest
    np.testing.assert_array_equal(loaded.encode(topics["class"]), tokenizer.encode(topics["class"]))
    assert loaded.specials == tokenizer.specials


def test_ranks_are_tiktokens_own_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe

    tokenizer.save(tmp_path)
    ranks = load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    assert Tokenizer(ranks).digest == tokenizer.digest


def edit_header(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def edit_ranks(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "ranks.tiktoken"
        path.write_bytes(change(path.read_bytes()))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
        (lambda folder: (folder / "ranks.tiktoken").unlink(), r"ranks\.tiktoken: no such file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json: not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), r"tokenizer\.json: not a tokenizer's header"),
        (edit_header(format=2), r"tokenizer\.json: format: 2 is not 1"),
        (edit_header(pattern=None), r"tokenizer\.json: not a tokenizer's header"),
        (edit_header(pattern=r"\s+|\S+"), r"tokenizer\.json: digest"),
        (edit_header(pattern="("), "not a tokenizer .*train it again"),
        (edit_header(digest="0" * 64), r"tokenizer\.json: digest"),
        (edit_header(specials=[*SPECIAL_TOKENS, "<|more|>"]), r"tokenizer\.json: digest"),
        (edit_header(specials=["<|bos|>"]), "special token is missing"),
        (edit_ranks(lambda data: data[:-20]), r"ranks\.tiktoken|digest"),
        (edit_ranks(lambda data: b"\n".join(data.split(b"\n")[:-2]) + b"\n"), r"tokenizer\.json: digest"),
        (edit_ranks(lambda data: b"".join(data.splitlines(keepends=True)[1:])), r"ranks are not 0\.\.n-1"),
        (edit_ranks(lambda data: data + b"zzz\n"), r"ranks\.tiktoken: line 793: not a token"),
        (edit_ranks(lambda data: b"!!! 0\n" + data), r"ranks\.tiktoken: line 1: not a token"),
    ],
)
def test_damage_is_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_two_tokenizers_do_not_mix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    header = (tmp_path / "tokenizer.json").read_bytes()
    train_tokenizer(iter(["abc abc"]), 300).save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(header)
    with pytest.raises(UserError, match="digest"):
        Tokenizer.load(tmp_path)
