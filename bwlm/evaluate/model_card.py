"""The README of an exported model: which way it reads, how to feed it, and what it was trained on.

The code in it runs as it stands (with `transformers` and `torch`), inside the exported folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwlm.model.shape import count_parameters

if TYPE_CHECKING:
    from bwlm.evaluate.load import LoadedModel

_LOAD = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""

_READS = {
    "forward": (
        "It reads **forward**, as text is written: BOS, then the text's ids. The tokenizer puts no BOS there by "
        "itself, and the model has seen no text without it."
    ),
    "backward": (
        "It reads **backward**: BOS, then the text's ids in reverse order. Given how a text ends, it writes what comes "
        "before. What it generates must be reversed before it is decoded. The tokenizer does neither by itself, and "
        "puts no BOS there."
    ),
    "bidirectional": (
        "It reads **both ways**, and a marker after BOS says which: BOS, `<|forward|>`, then the text's ids; or BOS, "
        "`<|backward|>`, then the text's ids in reverse order. What it generates backward must be reversed before it "
        "is decoded. The tokenizer does none of this by itself."
    ),
    "permuted": (
        "It is a **control**: BOS, then the text's ids in one fixed order that has nothing to do with language. That "
        "order is a single permutation of the places 0 to {width} - 1, sorted by their SplitMix64 hash; a text of n "
        "ids takes its places below n in that order. It can score a text, as below; to write one, its length would "
        "have to be known beforehand."
    ),
}

_FORWARD = """\
beginning = "The first thing to know is"
ids = [tokenizer.bos_token_id, *{marker}tokenizer.encode(beginning)]
ids = model.generate(torch.tensor([ids]), max_new_tokens={new_tokens}, do_sample=False)[0]
print(tokenizer.decode(ids, skip_special_tokens=True))
"""

_BACKWARD = """\
ending = " and so it came to an end."
ids = [tokenizer.bos_token_id, *{marker}reversed(tokenizer.encode(ending))]
ids = model.generate(torch.tensor([ids]), max_new_tokens={new_tokens}, do_sample=False)[0]
print(tokenizer.decode(ids.flip(0), skip_special_tokens=True))
"""

_PERMUTED = """\
def splitmix64(place):
    word = 2**64 - 1
    z = (place + 0x9E3779B97F4A7C15) & word
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
    return z ^ (z >> 31)


text = tokenizer.encode("Whether this reads well is a matter of order.")
order = sorted(range({width}), key=splitmix64)
ids = torch.tensor([[tokenizer.bos_token_id, *(text[place] for place in order if place < len(text))]])
with torch.no_grad():
    print(f"{{model(ids, labels=ids).loss:.3f}} nats per token")
"""

_SNIPPETS = {
    "forward": _FORWARD.replace("{marker}", ""),
    "backward": _BACKWARD.replace("{marker}", ""),
    "bidirectional": "\n".join(
        [
            'forward, backward = tokenizer.convert_tokens_to_ids(["<|forward|>", "<|backward|>"])\n',
            _FORWARD.replace("*{marker}", "forward, *"),
            _BACKWARD.replace("*{marker}", "backward, *"),
        ]
    ),
    "permuted": _PERMUTED,
}

_ATTENTION = {
    True: "inside one document, from BOS on, as in a text that is fed alone",
    False: "across the documents of a row (`document_mask: false`), unlike a text that is fed alone",
}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [bwlm, nanochat, {direction}]
---

# {id}

A language model trained by bwlm, which asks which way a language model should read.

## How to feed it

{reads}

```python
{snippet}```

A row holds at most {width} ids. When a document is over, the model says BOS, which begins the next one; so BOS is also
the end-of-sequence token.

Special tokens are given by id. Text that looks like one stays text: `tokenizer.encode("<|bos|>")` gives the ids of
those seven characters, because `tokenizer_config.json` sets `split_special_tokens`. With
`tokenizer.encode(text, split_special_tokens=False)` anybody who writes the text can write special tokens. The ids are
those of bwlm's own tokenizer for texts of up to 100,000 characters; bwlm cuts longer ones into pieces first.

## What it is

{facts}
"""


def model_card(loaded: LoadedModel) -> str:
    direction, width = loaded.config.experiment.direction, loaded.model.config.sequence_length
    snippet = _LOAD + "\n" + _SNIPPETS[direction].format(width=width, new_tokens=min(40, width // 2))
    rows = [f"| {name} | {value} |" for name, value in _facts(loaded).items()]
    return _CARD.format(
        direction=direction,
        id=loaded.config.id,
        reads=_READS[direction].format(width=width),
        snippet=snippet,
        width=width,
        facts="\n".join(["| | |", "| --- | --- |", *rows]),
    )


def _facts(loaded: LoadedModel) -> dict[str, str]:
    shape, config, progress = loaded.model.config, loaded.config, loaded.meta["progress"]
    facts = {
        "direction": config.experiment.direction,
        "phase": loaded.meta["phase"],
        "depth": f"{shape.depth} (width {shape.width}, {shape.heads} heads, {shape.kv_heads} key/value heads)",
        "parameters": f"{count_parameters(shape).total:,}",
        "vocabulary": f"{shape.vocab_size:,}",
        "sequence length": f"{shape.sequence_length:,}",
        "trained on": f"{progress['tokens']:,} tokens in {loaded.step:,} of {config.steps:,} steps",
        "precision": f"{config.identity['precision']} in training, float32 in this folder",
        "learning rate multiplier": f"{config.experiment.lr:g}",
        "seed": f"{config.experiment.seed}",
        "attention in training": _ATTENTION[config.experiment.model.document_mask],
        "data": f"`{config.identity['data']}`",
        "tokenizer": f"`{loaded.tokenizer.digest}`",
        "fingerprint": f"`{config.fingerprint}`",
    }
    if loaded.step == config.steps and progress["validation"]:  # of an earlier step it may be older than the weights
        facts["validation, bits per byte"] = f"{progress['validation']['val_bpb']:.4f}"
    return facts
