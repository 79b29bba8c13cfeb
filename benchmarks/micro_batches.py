"""Tokens per second of a bare training step by the rows of one pass, on one CPU thread.

    python benchmarks/micro_batches.py
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 python benchmarks/micro_batches.py

The second keeps freed memory in the process, as the workers of a grid do.
"""

from __future__ import annotations

import time

import torch

from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig

ROWS, WIDTH, VOCABULARY, STEPS = 16, 256, 2048, 10


def rate(depth: int, micro_rows: int) -> float:
    model = GPT(GPTConfig.from_depth(depth, VOCABULARY, WIDTH), torch.bfloat16)
    model.init_weights(0)
    optimizer = build_optimizer(model)
    ids = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        for part in ids.split(micro_rows):
            (model.loss(part, part).total / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * ids.numel() / (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    for depth in (1, 2):
        rates = ", ".join(f"{rows} rows {rate(depth, rows) / 1000:.1f} k" for rows in (2, 4, 8, 16))
        print(f"depth {depth}: {rates}")


if __name__ == "__main__":
    main()
