"""Tokens per second of decoding with a cache, against reading the whole row again for every id.

    python benchmarks/decoding.py [--threads 1] [--json]     # depth 4, T=512, vocabulary 4096, until the row is full
    python benchmarks/decoding.py --new 64 --rows 1,64 --rounds 1       # in seconds

Rows have prompts of their own and draw at temperature 1, as rollouts do. The median and best of rounds in which all
take turns; rereading, which nobody would do in batches, is timed with one row, in the first round alone. Needs torch
alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.model.generate import generate
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig

PROMPT = 32


def prompts(rows: int, vocab: int) -> list[list[int]]:
    found: list[list[int]] = torch.randint(vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    return found


@torch.inference_mode()
def reread(model: GPT, row: list[int], new_tokens: int) -> None:
    row, device = list(row), model.embedding.weight.device
    for _ in range(new_tokens):
        probabilities = torch.softmax(model(torch.tensor([row], device=device))[0, -1], -1)
        row.append(int(torch.multinomial(probabilities, 1)))


def rate(decode: Callable[[], object], tokens: int) -> float:
    """It ends with ids on the host, so that a GPU has nothing left to do."""
    began = time.perf_counter()
    decode()
    return tokens / (time.perf_counter() - began)


def measure(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    config = GPTConfig.from_depth(arguments.depth, arguments.vocab, arguments.time)
    new = arguments.new or arguments.time - PROMPT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(arguments.rounds):
        for precision in arguments.precisions.split(","):
            model = GPT(config, getattr(torch, precision), arguments.attention)
            model.init_weights(0)
            model.to(device).eval()
            generate(model, prompts(2, arguments.vocab), 8, temperature=1.0)  # warms up
            if number == 0:
                row = prompts(1, arguments.vocab)[0]
                rates[precision, 0] = [rate(lambda: reread(model, row, new), new)]  # noqa: B023
            for rows in map(int, arguments.rows.split(",")):
                given = prompts(rows, arguments.vocab)
                found = rate(lambda: generate(model, given, new, temperature=1.0), rows * new)  # noqa: B023
                rates.setdefault((precision, rows), []).append(found)
    return [
        {
            "precision": precision,
            "rows": rows,
            "tokens_per_second": statistics.median(found),
            "best": max(found),
            "ratio_to_rereading": statistics.median(found) / rates[precision, 0][0],
        }
        for (precision, rows), found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument(
        "--new", type=int, help=f"ids of each row; default: until it is full, after {PROMPT} of a prompt"
    )
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--attention", default="blocked", choices=["sdpa", "blocked"], help="of rereading and prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    for one in found:
        rows = f"{one['rows']} rows" if one["rows"] else "1 row, reread"
        speed = f"{one['tokens_per_second']:9,.0f} tokens/s (best {one['best']:,.0f})"
        print(f"{one['precision']:9} {rows:14} {speed}, {one['ratio_to_rereading']:.1f} times rereading")


if __name__ == "__main__":
    main()
