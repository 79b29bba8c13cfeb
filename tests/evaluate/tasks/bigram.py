"""A GPT of known probabilities: each id depends on the one before it alone, so scores can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.text.tokenizer import Tokenizer

LETTERS = Tokenizer({bytes([byte]): byte for byte in range(256)})
"""Tokenizer without merges: each byte is a token."""
_SOFTCAP = 15.0


def bigram_model(table: Mapping[str, Mapping[str, float]], length: int = 64) -> GPT:
    """A GPT with p(next | previous) as given, by characters; `^` is BOS.

    After a character that is not in the table all ids are equally likely. What a row of the table leaves of 1 is
    shared by all other ids. The blocks write nothing, so the state of an id is its embedding, a multiple of a unit
    vector.
    """
    vocabulary = LETTERS.vocab_size
    config = GPTConfig(vocabulary, depth=1, width=vocabulary, heads=2, kv_heads=2, sequence_length=length)
    model = GPT(config)
    model.init_weights(0)
    logits = torch.zeros(vocabulary, vocabulary, dtype=torch.double)
    for previous, following in table.items():
        rest = (1 - sum(following.values())) / (vocabulary - len(following))
        probabilities = torch.full((vocabulary,), rest, dtype=torch.double)
        for character, probability in following.items():
            probabilities[_id(character)] = probability
        row = probabilities.log()
        logits[_id(previous)] = row - row.mean()
    assert logits.abs().max() < _SOFTCAP, "the softcap cannot give such a probability"
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(vocabulary))
        model.lm_head.weight.copy_((torch.atanh(logits / _SOFTCAP) * _SOFTCAP / math.sqrt(vocabulary)).T)
    return model.eval()


def log_p(table: Mapping[str, Mapping[str, float]], text: str) -> float:
    """Log-probability of `text` without its first character, which is read and not scored."""
    return sum(_log(table, text[n], text[n + 1]) for n in range(len(text) - 1))


def _log(table: Mapping[str, Mapping[str, float]], previous: str, following: str) -> float:
    row = table.get(previous)
    if row is None:
        return -math.log(LETTERS.vocab_size)
    return math.log(row.get(following, (1 - sum(row.values())) / (LETTERS.vocab_size - len(row))))


def _id(character: str) -> int:
    """Id of a character, of `^` for BOS, or of a special token by its name."""
    return {**LETTERS.specials, "^": LETTERS.bos}.get(character, character.encode()[0])
