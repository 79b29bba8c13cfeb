"""Answers per second to GSM8K's questions, against nanochat's `chat_eval` loop, side by side in one run.

    python benchmarks/generate_answers.py --data DIR [--peer NANOCHAT] [--json]

DIR holds `gsm8k/` as on the hub; NANOCHAT is a checkout of karpathy/nanochat, for the variants after the first.
Depth 4, vocabulary 4096, one greedy answer for each question. In rounds in which all take turns:

- `bwlm`: `evaluate_generated`, questions of about the same length in one batch.
- `loop`: nanochat's Engine around the same model, weights and KV cache, a question at a time as in `chat_eval`; the
  answers are compared.
- `nanochat`: its Engine around its own model of the same depth, width, heads and vocabulary, with full attention.
  Its architecture of today has parts that ours has not (value embeddings, smear), so its weights are others.

Random weights hardly ever end an answer: each is as long as `--new` allows. `--run STORAGE:ID` takes a trained run of a
later phase, whose answers end where they end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.config import Experiment
from bwlm.evaluate.tasks.answers import Attempt, Generated, evaluate_generated
from bwlm.evaluate.tasks.request import sample
from bwlm.model.compute import Compute
from bwlm.model.gpt import GPT
from bwlm.model.kv_cache import KVCache
from bwlm.model.shape import GPTConfig
from bwlm.record.run_config import RunConfig
from bwlm.text.tokenizer import Tokenizer, train_tokenizer
from bwlm.trained.load import LoadedModel, load_model
from tasks import find_evaluated
from tasks.items import GeneratedItem
from tasks.verifiable import AnsweredTask

Answers = dict[str, str]
"""Answer to each item, by its id."""


class CachedModel:
    """Our model with the methods that nanochat's Engine calls; it keeps its own KV cache, of one row."""

    def __init__(self, model: GPT, new_tokens: int) -> None:
        config = model.config
        self.reader, self.new_tokens = KVCache(model), new_tokens
        self.config = SimpleNamespace(
            n_layer=config.depth,
            n_head=config.heads,
            n_kv_head=config.kv_heads,
            n_embd=config.width,
            sequence_len=config.sequence_length,
        )

    def get_device(self) -> torch.device:
        return self.reader.device

    def forward(self, ids: Tensor, kv_cache: Any) -> Tensor:
        rows = ids.tolist()
        if ids.size(1) == 1:
            return self.reader.follow([row[0] for row in rows])[:, None]
        return self.reader.read(rows, ids.size(1) + self.new_tokens)[:, None]


class Specials:
    """Special tokens as the Engine asks for them; those of its calculator do not exist here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_special(self, name: str) -> int:
        return self.tokenizer.specials.get(name, -1)

    def get_bos_token_id(self) -> int:
        return self.tokenizer.bos


def in_a_loop(engine: Any, task: AnsweredTask, tokenizer: Tokenizer, attempts: Sequence[Attempt], new: int) -> Answers:
    """Answer a question at a time, as `run_generative_eval` does."""
    answers = {}
    for one in attempts:
        prompt = list(one.ids)
        [written], _ = engine.generate_batch(prompt, num_samples=1, max_tokens=new, temperature=0.0)
        answers[one.item.id] = tokenizer.decode(written[len(prompt) :])
        task.correct(answers[one.item.id], one.item)
    return answers


def peer_engines(loaded: LoadedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return nanochat's Engine around our model, and around nanochat's own."""
    sys.path.insert(0, arguments.peer)
    from nanochat.engine import Engine  # type: ignore[import-not-found]

    specials = Specials(loaded.tokenizer)
    return {
        "loop": Engine(CachedModel(loaded.model, arguments.new), specials),
        "nanochat": Engine(peer_model(loaded.model.config), specials),
    }


def peer_model(config: GPTConfig) -> Any:
    """Return nanochat's model of the same size."""
    from nanochat.gpt import GPT as Peer  # type: ignore[import-not-found]
    from nanochat.gpt import GPTConfig as PeerConfig

    model = Peer(
        PeerConfig(
            sequence_len=config.sequence_length,
            vocab_size=config.vocab_size,
            n_layer=config.depth,
            n_head=config.heads,
            n_kv_head=config.kv_heads,
            n_embd=config.width,
            window_pattern="L",
        )
    )
    model.init_weights()
    return model.eval()


def load(arguments: argparse.Namespace, items: Sequence[GeneratedItem]) -> LoadedModel:
    """Return the trained run that is asked for, or random weights as if they were a model of the sft phase."""
    if arguments.run:
        storage, _, run = arguments.run.rpartition(":")
        return load_model(Path(storage), run)
    texts = (message["content"] for item in items for message in item.conversation)
    tokenizer = train_tokenizer(texts, arguments.vocab)
    model = GPT(GPTConfig.from_depth(arguments.depth, tokenizer.vocab_size, arguments.time))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the first weights make each block the identity
        for block in model.blocks:
            for weight in block.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    content = {"phase": "sft", "direction": "forward", "depth": arguments.depth, "lr": 1.0, "seed": 0}
    data = {"data": {"mixture": {"gsm8k": 1.0}}, "budget": {"steps": 1}}
    experiment = Experiment.model_validate(content | data)
    config = RunConfig("random", experiment, {}, 1, Compute("float32", "sdpa", 0, False, 8, 1), "", "")
    return LoadedModel(model.eval(), tokenizer, config, {}, 1, None)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    task, _ = find_evaluated("gsm8k")
    assert isinstance(task, AnsweredTask)
    task = replace(task, new_tokens=arguments.new)
    every = task.generated_items(0, f"{arguments.data}/gsm8k")
    loaded = load(arguments, every)
    items = sample(every, arguments.items)

    def batched() -> Generated:
        found = evaluate_generated(loaded, task, items, "forward")
        assert isinstance(found, Generated)
        return found

    attempts = batched().attempts  # the items that fit, with their prompts
    engines = peer_engines(loaded, arguments) if arguments.peer else {}
    ways: dict[str, Callable[[], Answers]] = {
        "bwlm": lambda: {one.item.id: one.output for one in batched().attempts},
        **{
            name: lambda engine=engine: in_a_loop(engine, task, loaded.tokenizer, attempts, arguments.new)  # type: ignore[misc]
            for name, engine in engines.items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - began)
    return [
        {
            "variant": name,
            "answers": len(attempts),
            "answers_per_second": len(attempts) / statistics.median(of),
            "bwlm_is_faster": statistics.median(a / b for a, b in zip(of, seconds["bwlm"], strict=True)),
            "equal_answers": sum(answers[name][key] == text for key, text in answers["bwlm"].items()) / len(attempts),
        }
        for name, of in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer", help="checkout of karpathy/nanochat")
    parser.add_argument("--run", help="STORAGE:ID of a trained run, instead of random weights")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="most ids of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"{'variant':10} {'answers':>8} {'answers/s':>10} {'bwlm is':>9} {'equal':>7}")
    for row in rows:
        print(
            f"{row['variant']:10} {row['answers']:8} {row['answers_per_second']:10.2f} {row['bwlm_is_faster']:8.2f}x"
            f" {row['equal_answers']:7.0%}"
        )


if __name__ == "__main__":
    main()
