"""The exported tokenizer, loaded by transformers alone, against ours: the same ids, the same text, no smuggled ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bwlm.text.hf_tokenizer import tokenizer_config, tokenizer_json
from bwlm.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "corpus"
WIDTH = 128

anything = settings(derandomize=True, deadline=None, max_examples=300)
Pair = tuple[Tokenizer, Any]


@pytest.fixture(scope="module")
def hf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tokenizer], Any]:
    """What `AutoTokenizer` makes of a tokenizer's files."""

    def load(tokenizer: Tokenizer) -> Any:
        folder = tmp_path_factory.mktemp("hf")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(WIDTH)))
        return AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def pair(hf_of: Callable[[Tokenizer], Any]) -> Pair:
    ours = train_tokenizer(iter(topics.values()), 1500)
    return ours, hf_of(ours)


def differing(pair: Pair, texts: list[str]) -> list[str]:
    ours, theirs = pair
    encoded = theirs(texts, verbose=False)["input_ids"]
    return [text for text, ids in zip(texts, encoded, strict=True) if ours.encode(text).tolist() != ids]


@anything
@given(st.lists(st.text(), min_size=1))
def test_any_text_has_the_same_ids_and_comes_back(pair: Pair, texts: list[str]) -> None:
    assert differing(pair, texts) == []
    for text in texts:
        assert pair[1].decode(pair[1].encode(text, verbose=False)) == text


PARTS = [
    *(
        "the",
        " The",
        "don't",
        "I'LL",
        "'ſ",
        "1",
        "23",
        "456",
        "٣",
        "½",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u3000",
    ),
    *("é", "e\u0301", "東京", "🙂", "x=3.14", "---", "!!", "_", "\x00", "\ufeff", "\u200d", "İ", "ß", "<|", "|>"),
    *SPECIAL_TOKENS,
]


@anything
@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_words_digits_spaces_and_markers_have_the_same_ids(pair: Pair, text: str) -> None:
    assert differing(pair, [text]) == []


@pytest.mark.parametrize("alphabet", ["ab", "- =", "\n ", "aestin ", "0a'"])
def test_few_letters_which_merge_in_many_ways_have_the_same_ids(pair: Pair, alphabet: str) -> None:
    rng = random.Random(alphabet)
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    runs = ["".join(rng.choice(alphabet) * rng.randint(1, 30) for _ in range(5)) for _ in range(2000)]
    assert differing(pair, texts + runs) == []


def test_every_character_has_the_same_ids(pair: Pair) -> None:
    """Both regex engines know the same letters, numbers and spaces."""
    points = [*range(0x3000), *range(0x3000, 0x110000, 7)]
    letters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    assert differing(pair, [f"{c}a1{c}2 {c}'{c}l  {c}\n{c}" for c in letters]) == []


def test_ranks_that_no_bpe_training_made_are_kept(hf_of: Callable[[Tokenizer], Any]) -> None:
    """tiktoken joins any two neighbours whose bytes are a token, also a pair that training would not have joined."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"bc", b"ab", b"abc", b"cd", b"abcd", b"never"]
    ours = Tokenizer({token: rank for rank, token in enumerate(tokens)})
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(3000)] + ["never", " never", "xnever"]
    assert differing((ours, hf_of(ours)), texts) == []


def test_documents_have_the_same_ids(hf_of: Callable[[Tokenizer], Any], tokenizer: Tokenizer, corpus: Path) -> None:
    texts = [text for shard in sorted(corpus.glob("*.parquet")) for text in shard_texts(shard)]
    assert len(texts) == 300
    assert differing((tokenizer, hf_of(tokenizer)), texts) == []


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason=f"no text in {REAL_TEXT}")
@pytest.mark.parametrize("vocab_size", [600, 4096])
def test_real_documents_have_the_same_ids(hf_of: Callable[[Tokenizer], Any], vocab_size: int) -> None:
    first, last = (sorted(REAL_TEXT.glob("*.parquet"))[index] for index in (0, -1))
    ours = train_tokenizer(shard_texts(first), vocab_size)
    texts = list(shard_texts(last))
    assert len(texts) > 100
    assert differing((ours, hf_of(ours)), texts) == []


@pytest.fixture(scope="module")
def merge_free_pair(hf_of: Callable[[Tokenizer], Any]) -> Pair:
    ours = train_tokenizer(iter(["any text"]), 264)
    return ours, hf_of(ours)


@anything
@given(st.text() | st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_without_merges_each_byte_is_a_token_there_too(merge_free_pair: Pair, text: str) -> None:
    ours, theirs = merge_free_pair
    assert tokenizer_json(ours)["model"]["merges"] == []
    assert len(theirs) == 264
    assert theirs.encode(text) == ours.encode(text).tolist() == list(text.encode())
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.convert_tokens_to_ids("<|bos|>") == ours.bos


def shard_texts(shard: Path) -> Iterator[str]:
    return iter(pq.read_table(shard).column("text").to_pylist())


@anything
@given(st.data())
def test_any_ids_decode_to_the_same_text(pair: Pair, data: st.DataObject) -> None:
    """Halves of characters and special tokens too."""
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1)))
    assert theirs.decode(ids) == ours.decode(ids)


def test_special_tokens_have_the_same_ids_and_text_never_gives_them(pair: Pair) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    for name in SPECIAL_TOKENS:
        assert theirs.convert_tokens_to_ids(name) == ours.specials[name]
        for text in (name, f"a {name} b", f"{name}{name}"):
            assert theirs(text)["input_ids"] == ours.encode(text).tolist()
            assert theirs.encode(text) == ours.encode(text).tolist()
            assert theirs.tokenize(text) == theirs.convert_ids_to_tokens(ours.encode(text).tolist())
    # transformers counts the ids itself, other readers of the file take them from there
    assert {token["content"]: token["id"] for token in tokenizer_json(ours)["added_tokens"]} == ours.specials
    assert theirs.encode("a<|bos|>", split_special_tokens=False)[-1] == ours.bos
    assert theirs.decode([ours.bos, *ours.encode("hi"), ours.pad], skip_special_tokens=True) == "hi"


def test_roles_of_the_special_tokens(pair: Pair) -> None:
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.bos, ours.pad)
    assert theirs.model_max_length == WIDTH
    batch = theirs(["a", "a b c d"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert (batch["input_ids"][0] == ours.pad).tolist() == (batch["attention_mask"][0] == 0).tolist()
    assert batch["attention_mask"][0].tolist().count(0) > 0


def test_no_special_token_is_added_by_itself(pair: Pair) -> None:
    ours, theirs = pair
    assert theirs.encode("hello") == theirs.encode("hello", add_special_tokens=False) == ours.encode("hello").tolist()
    assert theirs("")["input_ids"] == []
