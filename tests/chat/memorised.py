"""Small models that know a text by heart, so that a test knows what they will write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bwlm.chat.dialogue import Dialogue, Turn, Voice, from_talk
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.text.direction import arrange
from bwlm.text.tokenizer import Tokenizer

SEQUENCE_LENGTH = 384
_LEARNT = 0.5
"""A loss under log 2: the right id has over half of the probability, so that greedy decoding takes it."""


def memorise(voice: Voice, tokenizer: Tokenizer, talks: Sequence[Sequence[Turn]]) -> GPT:
    """Return a model that, after the turns of each talk but the last, writes the text of the last."""
    rows = [_row(voice, tokenizer, talk) for talk in talks]
    model = GPT(GPTConfig.from_depth(2, tokenizer.vocab_size, SEQUENCE_LENGTH))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(400):
        losses = [_losses(model, ids, prompt) for ids, prompt in rows]
        if max(loss.detach().max() for loss in losses) < _LEARNT:
            return model.eval()
        optimizer.zero_grad()
        torch.stack([loss.mean() + loss.max() for loss in losses]).sum().backward()
        optimizer.step()
    raise AssertionError("the model did not learn its text")


def _row(voice: Voice, tokenizer: Tokenizer, talk: Sequence[Turn]) -> tuple[list[int], int]:
    """Return the ids of a talk as the model reads and writes them, and the length of the prompt."""
    dialogue: Dialogue = from_talk(voice, tokenizer, talk[:-1])
    prompt = dialogue.prompt(SEQUENCE_LENGTH).prompt
    text = tokenizer.encode(talk[-1].text)
    written = arrange(text, talk[-1].reading, len(text)).tolist()
    return [*prompt.ids, *written, prompt.stop], len(prompt.ids)


def _losses(model: GPT, ids: list[int], prompt: int) -> torch.Tensor:
    """Return the loss of each token that is to be written."""
    logits = model(torch.tensor([ids[:-1]]))[0, prompt - 1 :]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="none")
