"""The README of an exported model: which way it reads, how to feed it or talk to it, and what it was trained on.

The code in it runs as it stands (with `transformers` and `torch`), inside the exported folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bwlm.directions import TEXT_READINGS, is_marked, own_readings
from bwlm.model.shape import count_parameters
from bwlm.text.conversation import predicts_user_turn
from bwlm.trained.chat_template import chat_template, chats

if TYPE_CHECKING:
    from bwlm.config import Experiment
    from bwlm.record.lineage import ParentLink
    from bwlm.trained.load import LoadedModel

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

# ---- models that were trained on conversations ----

_CHAT_READS = {
    "answers, forward": (
        "It reads **forward** and answers the user. The chat template gives the ids that it was trained on{marker}."
    ),
    "asks, backward": (
        "It reads **backward**{alone}: BOS{marker}, then the whole conversation from its end, markers too. Given an "
        "answer and what follows it, it writes the user's message before it, from its end. {no_template}"
    ),
    "answers, backward": (
        "It reads each message **backward**{alone}: BOS{marker}, then the turns in order, the ids of each text "
        "reversed. It answers the user, and writes its answer from the end. {no_template}"
    ),
}

_NO_TEMPLATE = (
    "A chat template makes a text and cannot reverse its tokens, so there is none for this reading: lay the ids out as "
    "below."
)

_ANSWER_FORWARD = """\
chats = [
    [{{"role": "user", "content": "What is 7 and 12?"}}],
    [
        {{"role": "user", "content": "7+12="}},
        {{"role": "assistant", "content": "19"}},
        {{"role": "user", "content": "3*4="}},
    ],
]
inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)[:, inputs["input_ids"].shape[1] :]
for answer in tokenizer.batch_decode(written, skip_special_tokens=True):
    print("assistant:", answer)
"""

_ASK_BACKWARD = """\
def rendered(messages):
    ids = []
    for message in messages:
        start, end = (getattr(tokenizer, f"{{message['role']}}_{{edge}}_token_id") for edge in ("start", "end"))
        ids += [start, *tokenizer.encode(message["content"]), end]
    return ids


ending = rendered([{{"role": "assistant", "content": "19"}}])
ids = [tokenizer.bos_token_id, {marker}*reversed([tokenizer.user_end_token_id, *ending])]
written = model.generate(torch.tensor([ids]), max_new_tokens={new_tokens}, do_sample=False)[0, len(ids) :]
print("user:", tokenizer.decode(written.flip(0), skip_special_tokens=True))
"""

_ANSWER_BACKWARD = """\
def rendered(messages):
    ids = []
    for message in messages:
        start, end = (getattr(tokenizer, f"{{message['role']}}_{{edge}}_token_id") for edge in ("start", "end"))
        ids += [start, *reversed(tokenizer.encode(message["content"])), end]
    return ids


turns = rendered([{{"role": "user", "content": "7+12="}}])
ids = [tokenizer.bos_token_id, {marker}*turns, tokenizer.assistant_start_token_id]
written = model.generate(torch.tensor([ids]), max_new_tokens={new_tokens}, do_sample=False)[0, len(ids) :]
print("assistant:", tokenizer.decode(written.flip(0), skip_special_tokens=True))
"""

_CHAT_SNIPPETS = {
    "answers, forward": _ANSWER_FORWARD,
    "asks, backward": _ASK_BACKWARD,
    "answers, backward": _ANSWER_BACKWARD,
}

_ENDS = (
    "A row holds at most {width} ids. When a document is over, the model says BOS, which begins the next one; so BOS "
    "is also the end-of-sequence token."
)
_CHAT_ENDS = (
    "A row holds at most {width} ids, prompt and answer together. The model ends a message with its closing marker, "
    "{end}; `generation_config.json` stops there, and at BOS. Prompts are padded on the left."
)

_SPECIAL_BY_ID = (
    'Special tokens are given by id. Text that looks like one stays text: `tokenizer.encode("<|bos|>")` gives the ids '
    "of those seven characters, because `tokenizer_config.json` sets `split_special_tokens`. With "
    "`tokenizer.encode(text, split_special_tokens=False)` anybody who writes the text can write special tokens."
)
_SPECIAL_BY_MARK = (
    "Text that looks like a special token stays text, in a message too: `<|user_end|>` is twelve characters. The names "
    "of special tokens begin with U+FDD0, a character that Unicode keeps for use inside programs; the template writes "
    "them, and refuses a message that holds that character. Their ids are `tokenizer.user_end_token_id` and so on."
)

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

## How to {use} it

{reads}

```python
{snippet}```

{ends}

{special} The ids are
those of bwlm's own tokenizer for texts of up to 100,000 characters; bwlm cuts longer ones into pieces first. All files
of this folder belong together: `tokenizer.json` alone does not say which tokens begin, end and pad.

## What it is

{facts}
"""


def model_card(loaded: LoadedModel) -> str:
    """Return the text of the README, in Markdown."""
    experiment, width = loaded.config.experiment, loaded.model.config.sequence_length
    feeding = _talking(experiment, width) if chats(experiment) else _documents(experiment, width)
    rows = [f"| {name} | {value} |" for name, value in _facts(loaded).items()]
    return _CARD.format(
        direction=experiment.direction,
        id=loaded.config.id,
        facts="\n".join(["| | |", "| --- | --- |", *rows]),
        **feeding,
    )


def _documents(experiment: Experiment, width: int) -> dict[str, str]:
    snippet = _SNIPPETS[experiment.direction].format(width=width, new_tokens=_new_tokens(width))
    return {
        "use": "feed",
        "reads": _READS[experiment.direction].format(width=width),
        "snippet": f"{_LOAD}\n{snippet}",
        "ends": _ENDS.format(width=width),
        "special": _SPECIAL_BY_ID,
    }


def _talking(experiment: Experiment, width: int) -> dict[str, str]:
    """Return the sections on how to talk to the model, with a conversation in each of its readings."""
    reads, snippets, closing = [], [_LOAD], []
    marked, readings = is_marked(experiment.direction), own_readings(experiment.direction)
    for reading in readings:
        asking = predicts_user_turn(reading, experiment.data.reversal)
        kind = f"{'asks' if asking else 'answers'}, {reading}"
        closing.append("`<|user_start|>` when it asks" if asking else "`<|assistant_end|>` when it answers")
        alone = " too" if len(readings) > 1 else ""
        named = f", with the marker `<|{reading}|>` after BOS" if reading == TEXT_READINGS[0] else f", `<|{reading}|>`"
        reads.append(_CHAT_READS[kind].format(marker=named if marked else "", alone=alone, no_template=_NO_TEMPLATE))
        marker = f"tokenizer.{reading}_token_id, " if marked else ""
        snippets.append(_CHAT_SNIPPETS[kind].format(marker=marker, new_tokens=_new_tokens(width)))
    return {
        "use": "talk to",
        "reads": "\n\n".join(reads),
        "snippet": "\n".join(snippets),
        "ends": _CHAT_ENDS.format(width=width, end=", ".join(dict.fromkeys(closing))),
        "special": _SPECIAL_BY_MARK if chat_template(experiment) else _SPECIAL_BY_ID,
    }


def _new_tokens(width: int) -> int:
    return min(40, width // 2)


def _parent(link: ParentLink | None) -> dict[str, str]:
    best = ", its best by validation" if link and link.best else ""
    return {"began from": f"`{link.parent}` ({link.phase}), step {link.step:,}{best}"} if link else {}


def _facts(loaded: LoadedModel) -> dict[str, str]:
    shape, config, progress = loaded.model.config, loaded.config, loaded.meta["progress"]
    facts = {
        "direction": config.experiment.direction,
        "phase": loaded.meta["phase"],
        **({"reversal of conversations": config.experiment.data.reversal} if chats(config.experiment) else {}),
        **_parent(loaded.link),
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
    if loaded.step == config.steps and progress["validation"]:  # else it may be older than the weights
        facts["validation, bits per byte"] = f"{progress['validation']['val_bpb']:.4f}"
    return facts
