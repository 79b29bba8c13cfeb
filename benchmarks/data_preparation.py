"""Tokens per second of preparing a corpus with Ray Data, against a plain pyarrow + tiktoken loop, in one run.

    python benchmarks/data_preparation.py [SOURCE] [--rounds 3] [--json]

The plain loop reads, tokenizes and throws away: what anybody would write first, without packing, digests or files. They
take turns, so that a machine that slows down slows both. Ray is started before the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bwlm.cluster.session import cluster
from bwlm.config import DataSettings, Recipe, ResourceSettings
from bwlm.text.corpus import Corpus, read_texts
from bwlm.text.prepare import get_tokenizer
from bwlm.text.stream import pack_corpus
from bwlm.text.tokenizer import Tokenizer


def plain_loop(corpus: Corpus, tokenizer: Tokenizer) -> int:
    """Tokens of the corpus, one process, one thread."""
    return sum(
        len(tokens)
        for shard in (*corpus.train, *corpus.validation)
        for texts in read_texts(shard.uri, corpus.text_column)
        for tokens in tokenizer.encode_batch(texts, threads=1)
    )


def with_ray(corpus: Corpus, tokenizer_folder: Path, width: int) -> int:
    """Tokens packed into rows and written, by Ray Data's tasks."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = pack_corpus(corpus, tokenizer_folder, width, Path(folder))
    return manifest.train.total("tokens") + manifest.validation.total("tokens")


def rate(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    return work() / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="builtin:pydocs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, cluster([ResourceSettings()], None, 2):
        recipe = Recipe(data=DataSettings(source=arguments.source))
        corpus, tokenizer_folder, tokenizer = get_tokenizer(recipe, Path(storage), lambda _: None)
        with_ray(corpus, tokenizer_folder, arguments.width)  # starts the workers
        rounds = [
            (
                rate(lambda: plain_loop(corpus, tokenizer)),
                rate(lambda: with_ray(corpus, tokenizer_folder, arguments.width)),
            )
            for _ in range(arguments.rounds)
        ]
    plain, ray = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(with_ / without for without, with_ in rounds)
    if arguments.json:
        print(json.dumps({"plain": plain, "ray": ray, "ratio": ratio, "rounds": rounds}))
    else:
        print(f"plain loop {plain / 1e6:.2f} Mtok/s, Ray Data {ray / 1e6:.2f} Mtok/s, median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
