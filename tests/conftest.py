"""What several rooms' tests share: a small corpus, its tokenizer and packed rows, and one Ray for the session."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bwlm.config import Recipe
from bwlm.text.packing import run_here
from bwlm.text.prepare import Pack, Prepared, prepare
from bwlm.text.stream import pack_corpus
from bwlm.text.tokenizer import Tokenizer

pytest_plugins = ["tests.runs", "tests.shell", "tests.grids"]

VOCAB_SIZE = 400
SEQUENCE_LENGTH = 64

_FAULTS = Path(__file__).parent / "faults"
_ALONE = ("test_job", "test_pty")
"""Modules with a Ray head, or a terminal, of their own."""
_WITH_PROCESSES = ("test_benchmarks", "test_tracking_store", "test_database")
"""Modules that start processes besides Ray's: benchmarks, MLflow servers and clients."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what `make test` runs beside the rest, and what only `make test-faults` runs."""
    if "ray_cluster" in item.fixturenames or item.path.stem in _WITH_PROCESSES:
        item.add_marker(pytest.mark.processes)
    if item.path.is_relative_to(_FAULTS) or item.path.stem in _ALONE:
        item.add_marker(pytest.mark.faults)


_WORDS = """
    the of and a to in it was that he she they with as for had her his on at by which not from but this were are
    river stone window letter morning captain garden answer shadow winter village honest silver quiet remember carry
    naïve café Überfahrt Ελλάδα москва 東京 🙂 don't 1984 x=3.14
"""


def english(rng: random.Random, words: int) -> str:
    """Sentences of a few to twenty words, frequent ones first, as in a language."""
    known = _WORDS.split()
    chosen = [known[min(int(rng.expovariate(0.08)), len(known) - 1)] for _ in range(words)]
    for start in range(0, words, rng.randint(5, 20)):
        chosen[start] = chosen[start].capitalize()
        chosen[start - 1] += "."
    return " ".join(chosen)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small matrices wait longer for a second core than it saves, and sums that are compared need one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WriteShards = Callable[..., Path]


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """Writes lists of texts to `shard_00000.parquet`.. in a folder, and returns the folder."""

    def write(folder: Path, *shards: list[str | None], column: str = "text", **options: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for index, texts in enumerate(shards):
            columns = {"number": pa.array(range(len(texts)), pa.int64()), column: pa.array(texts, pa.string())}
            pq.write_table(pa.table(columns), folder / f"shard_{index:05d}.parquet", **options)
        return folder

    return write


@pytest.fixture(scope="session")
def corpus(write_shards: WriteShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, 300 documents: empty ones, single words, and some of many rows. Read only."""
    rng = random.Random(0)
    lengths = (
        [0, 0, 1, 1, 2, 3] * 10 + [rng.randint(4, 60) for _ in range(200)] + [rng.randint(60, 700) for _ in range(40)]
    )
    rng.shuffle(lengths)
    texts = [english(rng, length) if length else "" for length in lengths]
    return write_shards(tmp_path_factory.mktemp("text") / "corpus", *(texts[start::4] for start in range(4)))


@pytest.fixture(scope="session")
def pack_in_process() -> Pack:
    """What `prepare` packs with in tests: the same work as with Ray, in this process."""
    return partial(pack_corpus, run=run_here)


@pytest.fixture(scope="session")
def recipe_for() -> Callable[..., Recipe]:
    """A recipe for a source, with the tests' vocabulary and sequence length unless told otherwise."""

    def recipe(source: str | Path, **data: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "data": {"source": str(source), **data},
                "tokenizer": {"vocab_size": VOCAB_SIZE},
                "model": {"sequence_length": SEQUENCE_LENGTH},
            }
        )

    return recipe


@pytest.fixture(scope="session")
def prepared(
    corpus: Path, recipe_for: Callable[..., Recipe], pack_in_process: Pack, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    """The corpus, tokenized and packed. Read only."""
    return prepare(recipe_for(corpus), tmp_path_factory.mktemp("storage"), pack_in_process, lambda _: None)


@pytest.fixture(scope="session")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return prepared.tokenizer


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One private Ray for the session, started by the first test that asks for it; gives its address."""
    from bwlm.cluster.environment import prepare_environment

    prepare_environment()
    import ray

    folder = Path(tempfile.mkdtemp(prefix="bw-", dir="/tmp"))  # short: paths of Ray's sockets end at 107 bytes
    try:
        context = ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=True,
            object_store_memory=512 * 2**20,
            logging_level="error",
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        yield context.address_info["address"]
    finally:
        started = _processes_of(folder)
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Processes below this one that were started with a path in `folder`, and those that they started."""
    ours = [p for p in psutil.Process().children(recursive=True) if any(str(folder) in word for word in _command(p))]
    return list({below for process in ours for below in [process, *process.children(recursive=True)]})


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
