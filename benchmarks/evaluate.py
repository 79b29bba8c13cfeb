"""Questions per second of multiple choice, against nanochat's way and lm-eval's `hf`, side by side in one run.

    python benchmarks/evaluate.py --data DIR [--peer NANOCHAT] [--run STORAGE:ID --lm-eval]

DIR holds `mmlu/` and `ai2_arc/` as on the hub. Depth 4, vocabulary 4096; random weights, equal for all (speed does not
depend on them), or `--run STORAGE:ID` for a trained run. Each variant scores the choices of the same items with the
same examples before them, in rounds in which all take turns; log-probabilities are compared too.

- `bwlm`: `bwlm.evaluate.tasks`, the pass that serves the rules conditional, joint and normalised.
- `nanochat`: the functions of `nanochat/core_eval.py` around the same model: a padded batch for each question.
- `lm-eval`: `HFLM.loglikelihood` on the exported folder, with a batch of 16 requests.

Peak memory is that of a process that runs one variant alone: `--variants bwlm`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.evaluate.tasks.layout import SEPARATOR, Layout
from bwlm.evaluate.tasks.request import sample
from bwlm.evaluate.tasks.scores import Row, score
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.text.tokenizer import Tokenizer, train_tokenizer
from tasks.arc import ARC_EASY
from tasks.items import ChoiceItem
from tasks.mmlu import MMLU

Scores = list[list[float]]
"""Log-probability of each choice of each item."""


def bwlm_way(model: GPT, tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Scores:
    layout = Layout(tokenizer, "forward", model.config.sequence_length)
    laid_out = [layout.lay_out(item, "forward") for item in items]
    rows = [Row(row.trunk, tuple(branch.ids for branch in row.branches)) for row in laid_out]
    return [
        [float(one.log_p[branch.border :].sum()) for one, branch in zip(scored, row.branches, strict=True)]
        for scored, row in zip(score(model, rows), laid_out, strict=True)
    ]


def nanochat_way(core_eval: Any, model: GPT, tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Scores:
    """A padded batch of all choices for each question, with the logits of every position, as `evaluate_example`."""

    def encode(prompts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *tokenizer.encode(prompt).tolist()] for prompt in prompts]

    encode.get_bos_token_id = lambda: tokenizer.bos  # type: ignore[attr-defined]
    scores = []
    for item in items:
        shots = [{"query": shot.stem, "choices": [shot.answer.strip()], "gold": 0} for shot in item.shots]
        question = {"query": item.stems[0], "choices": [choice.strip() for choice in item.choices]}
        prompts = core_eval.render_prompts_mc(question, " ", shots)
        tokens, starts, ends = core_eval.batch_sequences_mc(encode, prompts)
        losses, _ = core_eval.forward_model(model, core_eval.stack_sequences(tokens, tokenizer.bos))
        scores.append(
            [
                -float(losses[n, start - 1 : end - 1].sum())
                for n, (start, end) in enumerate(zip(starts, ends, strict=True))
            ]
        )
    return scores


def lm_eval_way(harness: Any, items: Sequence[ChoiceItem]) -> Scores:
    from lm_eval.api.instance import Instance

    requests = []
    for item in items:
        before = "".join(f"{shot.stem}{shot.answer}{SEPARATOR}" for shot in item.shots)
        for n, choice in enumerate(item.choices):
            arguments = (before + item.stems[n], choice)
            requests.append(Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=n))
    answers = iter(harness.loglikelihood(requests, disable_tqdm=True))
    return [[next(answers)[0] for _ in item.choices] for item in items]


def load(arguments: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    if arguments.run:
        from bwlm.trained.load import load_model

        storage, _, run = arguments.run.rpartition(":")
        loaded = load_model(Path(storage), run)
        return loaded.model, loaded.tokenizer
    texts = (item.stems[0] + "".join(item.choices) for item in MMLU.choice_items("cloze", 0, f"{arguments.data}/mmlu"))
    tokenizer = train_tokenizer(texts, 4096)
    model = GPT(GPTConfig.from_depth(arguments.depth, 4096, arguments.time))
    model.init_weights(0)
    with torch.no_grad():  # the first weights make each block the identity
        for block in model.blocks:
            for weight in block.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    return model.eval(), tokenizer


def export(run: str, folder: str) -> Any:
    """Return lm-eval's `hf` model on the exported weights of a run."""
    from lm_eval.models.huggingface import HFLM

    from bwlm.trained.export_hf import export_hf
    from bwlm.trained.load import load_model

    storage, _, name = run.rpartition(":")
    target = Path(folder) / "hf"
    export_hf(load_model(Path(storage), name), target)
    return HFLM(pretrained=str(target), device="cpu", batch_size=16, add_bos_token=True, dtype="float32")


def measure(arguments: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    model, tokenizer = load(arguments)
    ways: dict[str, Callable[[Sequence[ChoiceItem]], Scores]] = {
        "bwlm": lambda items: bwlm_way(model, tokenizer, items)
    }
    if arguments.peer:
        sys.path.insert(0, arguments.peer)
        from nanochat import core_eval  # type: ignore[import-not-found]

        ways["nanochat"] = lambda items: nanochat_way(core_eval, model, tokenizer, items)
    if arguments.lm_eval:
        harness = export(arguments.run, folder)
        ways["lm-eval"] = lambda items: lm_eval_way(harness, items)
    if arguments.variants:
        ways = {name: ways[name] for name in arguments.variants.split(",")}
    layout = Layout(tokenizer, "forward", model.config.sequence_length)
    rows = []
    for title, every in (
        ("MMLU, 5 shots, lettered", MMLU.choice_items("lettered", 5, f"{arguments.data}/mmlu")),
        ("ARC-Easy, cloze", ARC_EASY.choice_items("cloze", 0, f"{arguments.data}/ai2_arc")),
    ):
        fitted = [layout.fit(item) for item in sample(every, arguments.items)]
        items = [one.item for one in fitted if one]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        scores: dict[str, Scores] = {}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                scores[name] = way(items)
                seconds[name].append(time.perf_counter() - began)
        first = next(iter(ways))
        for name, of in seconds.items():
            apart = [np.abs(np.subtract(a, b)).max() for a, b in zip(scores[name], scores[first], strict=True)]
            ratios = [mine / theirs for mine, theirs in zip(of, seconds[first], strict=True)]
            rows.append(
                {
                    "task": title,
                    "items": len(items),
                    "variant": name,
                    "items_per_second": len(items) / statistics.median(of),
                    "bwlm_is_faster": statistics.median(ratios),
                    "largest_difference": float(max(apart)),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer", help="checkout of karpathy/nanochat")
    parser.add_argument("--lm-eval", action="store_true")
    parser.add_argument("--run", help="STORAGE:ID of a trained run, instead of random weights")
    parser.add_argument("--variants")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.lm_eval and not arguments.run:
        parser.error("--lm-eval: needs --run STORAGE:ID, a run to export")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if arguments.json:
        print(json.dumps({"rows": rows, "peak_gb": peak}))
        return
    print(f"{'task':26} {'variant':10} {'items/s':>9} {'bwlm is':>9} {'apart':>9}")
    for row in rows:
        print(
            f"{row['task']:26} {row['variant']:10} {row['items_per_second']:9.1f} {row['bwlm_is_faster']:8.2f}x"
            f" {row['largest_difference']:9.1e}"
        )
    print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
