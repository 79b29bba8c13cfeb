"""Packing makes no gap of its own: a text that is the same read from either end, cut into consecutive documents.

The text is one long reversible chain, so no direction of it is easier; its documents are pieces of the chain that
follow each other, as chapters of a book do, and keep their order. `pytest -m slow -s` on this file prints the figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import bwlm.text.conversation
from bwlm.config import Recipe
from bwlm.stats.gaps import Gap, gap
from bwlm.text.controls import ReversibleChain
from bwlm.text.plan import counter_hash
from bwlm.text.prepare import Pack, Prepared, prepare
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process, make_run

SYMBOLS = 16
SHARDS, SHARD_SYMBOLS = 5, 160_000
SHORTEST, LONGEST = 10, 39
"""Symbols of a document."""
SEEDS = range(5)
TINY: dict[str, Any] = {
    "model__sequence_length": 256,
    "model__head_dim": 64,
    "data": {"shuffle": False},
    "budget": {"steps": 300, "batch_tokens": 4096},
    "evaluation": {"every": 300, "tokens": 65_536},
    "checkpoint": {"every": 0},
    "research_log": {"scalars": 0, "tokens": 0, "gradients": 0, "activations": 0, "validation": False}
    | {"attention": False, "representations": 0},
}


def chain() -> ReversibleChain:
    """Few strong ties between symbols, many weak ones; H(pi) = 2.47 and h = 1.35 nats."""
    one, other = np.indices((SYMBOLS, SYMBOLS))
    pairs = counter_hash(0, np.minimum(one, other), np.maximum(one, other))
    powers = sum((pairs % np.uint64(2**bits) == 0).astype(np.int64) for bits in range(1, 5))
    return ReversibleChain(4 ** np.asarray(powers))


def consecutive_documents(symbols: np.ndarray, rng: random.Random) -> list[str]:
    text = bytes((symbols + ord("a")).astype(np.uint8)).decode()
    documents, start = [], 0
    while start < len(text):
        length = rng.randint(SHORTEST, LONGEST)
        documents.append(text[start : start + length])
        start += length
    return documents


@pytest.fixture(scope="module")
def chapters(
    write_shards: Callable[..., Path], pack_in_process: Pack, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    rng = random.Random(0)
    sampled = chain().sample(np.arange(SHARDS), SHARD_SYMBOLS, seed=0)
    folder = write_shards(
        tmp_path_factory.mktemp("chapters"), *(consecutive_documents(symbols, rng) for symbols in sampled)
    )
    recipe = {
        "data": {"source": str(folder), "shuffle": False},
        "tokenizer": {"vocab_size": 264},
        "model": {"sequence_length": 256},
    }
    storage = tmp_path_factory.mktemp("storage")
    return prepare(Recipe.model_validate(recipe), storage, pack_in_process, lambda _: None)


Train = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def train(chapters: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(direction, seed, masked, kept) -> what each validation document costs a model that was trained so, in nats.

    `kept`: a backward row keeps the order of its segments, as before rows were mirrored. Each run is trained once.
    """
    storage = tmp_path_factory.mktemp("runs")

    @cache
    def run(direction: str, seed: int, masked: bool, kept: bool = False) -> pd.DataFrame:
        name = f"{direction}-{seed}-{masked}-{kept}"
        folder = make_run(chapters, storage, name, direction=direction, seed=seed, **TINY, model__document_mask=masked)
        with pytest.MonkeyPatch.context() as patch:
            if kept:
                patch.setattr(bwlm.text.conversation, "is_mirrored", lambda *_: False)
            assert run_phase(folder, LocalSession(), in_process).state == "finished"
        table = pq.read_table(folder.evaluation("base", direction) / "validation.parquet").to_pandas()
        return table.assign(run=name, direction=direction, seed=seed, size=1)

    return run


def gap_between(forward: list[pd.DataFrame], backward: list[pd.DataFrame]) -> Gap:
    found = gap(pd.concat([*forward, *backward]), "forward", "backward", 1)
    print(
        f"\ngap {found.gap_nats:+.4f} nats a token, per seed {np.round(found.per_seed, 4).tolist()}, p = {found.p:.5f}"
    )
    return found


def loss_of(tables: list[pd.DataFrame]) -> float:
    return float(sum(table["nll"].sum() for table in tables) / sum(table["tokens"].sum() for table in tables))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_a_reversible_text_costs_the_same_both_ways(train: Train, masked: bool) -> None:
    found = gap_between(*([train(name, seed, masked) for seed in SEEDS] for name in ("forward", "backward")))
    assert abs(found.gap_nats) < 0.002
    assert found.p is not None
    assert found.p > 0.001, "the 99.9 % interval over the seeds leaves out zero"


@pytest.mark.slow
def test_segments_that_keep_their_order_in_backward_rows_would_make_a_gap(train: Train) -> None:
    """The text can show the fault: its documents say something of their neighbours, and models make use of it."""
    forward, alone = ([train("forward", seed, masked) for seed in SEEDS] for masked in (False, True))
    assert loss_of(forward) < loss_of(alone) - 0.02
    found = gap_between(forward, [train("backward", seed, False, True) for seed in SEEDS])
    assert found.gap_nats > 0.01
    assert found.p is not None
    assert found.p < 0.001
