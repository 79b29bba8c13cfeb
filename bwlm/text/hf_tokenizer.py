"""The tokenizer in the format of Hugging Face's `tokenizers`, so that `AutoTokenizer` gives the same ids.

tiktoken stores ranks of byte strings and joins any two neighbours whose bytes are a token; `tokenizers` stores merges
of pairs. So each token becomes a merge for every way to cut it into two tokens, and the merges stand in the order of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bwlm.text.tokenizer import SPECIAL_TOKENS, Tokenizer

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


def tokenizer_json(tokenizer: Tokenizer, mark: str = "") -> dict[str, Any]:
    """Return the content of `tokenizer.json`: a byte-level BPE with our split pattern; it puts no BOS before a text.

    `mark` stands before the name of each special token.
    """
    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in tokenizer.tokens}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(mark + name, index) for name, index in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token becomes that token, whatever its merges, as in tiktoken
            "vocab": {name: rank for rank, name in enumerate(names.values())},
            "merges": list(_merges(names)),
        },
    }


def tokenizer_config(sequence_length: int, end: str = "<|bos|>", mark: str = "") -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`; text that looks like a special token stays text, as with ours.

    Special tokens with a `mark` are read wherever they stand, which is where a template wrote them; without it they
    are given by id alone. `end` is the special token that ends what the model writes.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": f"{mark}<|bos|>",
        "eos_token": f"{mark}{end}",
        "pad_token": f"{mark}<|pad|>",
        "extra_special_tokens": {f"{name.strip('<|>')}_token": f"{mark}{name}" for name in SPECIAL_TOKENS[2:]},
        "split_special_tokens": not mark,
        "padding_side": "left",  # a model continues at the end of a row
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }


def byte_alphabet() -> list[str]:
    """Return [256], the character for each byte: itself where it is printable (Radford et al. 2019, GPT-2)."""
    alphabet = {byte: chr(byte) for byte in _PRINTABLE}
    others = [byte for byte in range(256) if byte not in alphabet]
    alphabet |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]


def _merges(names: Mapping[bytes, str]) -> Iterator[list[str]]:
    """Yield pairs of names to join, the most urgent first; `names` is in the order of ranks."""
    for token in names:
        for cut in range(1, len(token)):
            left, right = names.get(token[:cut]), names.get(token[cut:])
            if left is not None and right is not None:
                yield [left, right]


def _special(name: str, index: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **plain, "special": True}
