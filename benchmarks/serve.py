"""Speed of serving: the engine against nanochat's, its share of the memory's bandwidth, and streams through HTTP.

    python benchmarks/serve.py [--peer NANOCHAT] [--compile] [--batches 1,8] [--precision bfloat16] [--json]
    python benchmarks/serve.py --depth 12 --batches 1           # the share of the measured memory bandwidth, MBU
    python benchmarks/serve.py --http --depth 8                 # 32 streams through HTTP, against the engine alone

NANOCHAT is a checkout of karpathy/nanochat: its Engine around its own model of the same depth, width, heads and
vocabulary, with full attention and random weights. With `--compile` our compiled step is measured beside the one of
torch; with `--http` it is the one that serves. Prompts of 32 ids of which `--new` follow, drawn at temperature 1,
in rounds in which all take turns. The names are nanochat's:

- TTFT: seconds from the request to its first token. TPOT: seconds from one token to the next. tok/s: of all rows.
- MBU: bytes that a step must read (matrices, and keys and values of the row) x steps/s / the bandwidth that this
  machine reaches in a product of a 1 GiB matrix with a vector.

`--http` runs the server in a process of its own on one core with one thread, and the clients on another core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.chat.engine import Engine, Request
from bwlm.model.gpt import GPT
from bwlm.model.sampling import Sampling
from bwlm.model.shape import GPTConfig, count_parameters

PROMPT = 32


@dataclass
class Timing:
    """Times of the steps of one batch."""

    first: float
    """Seconds to the first token."""
    all: float
    """Seconds to the last token."""
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens per second over all rows."""
        return self.tokens / self.all


def random_model(config: GPTConfig, precision: str, device: str = "cpu") -> GPT:
    model = GPT(config, getattr(torch, precision))
    model.init_weights(0)
    return model.to(device).eval()


def timed(steps: Iterator[int]) -> Timing:
    """Time steps that each say how many tokens they brought."""
    began = time.perf_counter()
    tokens = next(steps)
    first = time.perf_counter() - began
    tokens += sum(steps)
    return Timing(first, time.perf_counter() - began, tokens)


def ours(model: GPT, rows: int, new: int, compiled: bool = False) -> Callable[[], Timing]:
    engine = Engine(model, slots=rows, compiled=compiled)
    vocab = model.config.vocab_size

    def steps(turn: list[int]) -> Iterator[int]:
        turn[0] += 1  # prompts that no round has had: nothing is reused between rounds
        for row in range(rows):
            ids = torch.randint(vocab, (PROMPT,), generator=torch.Generator().manual_seed(turn[0])).tolist()
            engine.add(Request(f"{row}", ids, new, Sampling(1.0), seed=row))
        while engine.running or engine.queued:
            yield len(engine.step())

    turn = [0]
    return lambda: timed(steps(turn))


def peers(arguments: argparse.Namespace, config: GPTConfig) -> Callable[[int, int], Callable[[], Timing]]:
    """Return a function of rows and new tokens that gives nanochat's Engine, timed."""
    sys.path.insert(0, arguments.peer)
    os.environ["NANOCHAT_DTYPE"] = arguments.precision
    import nanochat.engine as peer_engine  # type: ignore[import-not-found]
    import nanochat.gpt as peer_gpt  # type: ignore[import-not-found]

    shape = {
        "sequence_len": config.sequence_length,
        "vocab_size": config.vocab_size,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_kv_head": config.kv_heads,
        "n_embd": config.width,
        "window_pattern": "L",
    }
    model = peer_gpt.GPT(peer_gpt.GPTConfig(**shape))
    model.init_weights()
    engine = peer_engine.Engine(model.to(arguments.device).eval(), _NoSpecials())

    def of(rows: int, new: int) -> Callable[[], Timing]:
        def steps() -> Iterator[int]:
            for column, _ in engine.generate(list(range(PROMPT)), num_samples=rows, max_tokens=new, temperature=1.0):
                yield len(column)

        return lambda: timed(steps())

    return of


class _NoSpecials:
    """Tokenizer without special tokens: random weights would end rows by chance."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def bandwidth(device: str) -> float:
    """Return the bytes per second of a product of a 1 GiB matrix with a vector, the best of five."""
    matrix, vector = torch.ones(2**15, 2**13, device=device), torch.ones(2**13, device=device)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (matrix @ vector)[0].item()  # a GPU has done it only then
        best = min(best, time.perf_counter() - began)
    return matrix.numel() * 4 / best


def bytes_read(config: GPTConfig, rows: int, arguments: argparse.Namespace) -> float:
    """Return the bytes that a step must read: the matrices, and the keys and values of rows of mean length."""
    number = 4 if arguments.precision == "float32" else 2
    kept = 2 * config.depth * config.kv_heads * config.head_dim * (PROMPT + arguments.new / 2)
    return count_parameters(config).scaling * number + rows * kept * (4 if arguments.device == "cpu" else number)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = GPTConfig.from_depth(arguments.depth, arguments.vocab, arguments.time)
    model = random_model(config, arguments.precision, arguments.device)
    peer = peers(arguments, config) if arguments.peer else None
    ways: dict[tuple[str, int], Callable[[], Timing]] = {}
    for rows in map(int, arguments.batches.split(",")):
        ways["bwlm", rows] = ours(model, rows, arguments.new)
        if arguments.compile:
            ways["bwlm compiled", rows] = ours(model, rows, arguments.new, compiled=True)
        if peer:
            ways["nanochat", rows] = peer(rows, arguments.new)
    timings: dict[tuple[str, int], list[Timing]] = {key: [] for key in ways}
    for number in range(arguments.rounds + 1):
        for key, way in ways.items():
            timing = way()
            if number:  # the first round warms up
                timings[key].append(timing)
    most = bandwidth(arguments.device)
    return [_row(config, key, timings, arguments, most) for key in ways]


def _row(
    config: GPTConfig,
    key: tuple[str, int],
    timings: dict[tuple[str, int], list[Timing]],
    arguments: argparse.Namespace,
    most: float,
) -> dict[str, Any]:
    (engine, rows), of, precision = key, timings[key], arguments.precision
    step = statistics.median((one.all - one.first) / (arguments.new - 1) for one in of)
    row = {
        "engine": engine,
        "precision": precision,
        "threads": arguments.threads,
        "rows": rows,
        "ttft_ms": 1e3 * statistics.median(one.first for one in of),
        "tpot_ms": 1e3 * step,
        "tok_s": statistics.median(one.rate for one in of),
        "mbu": bytes_read(config, rows, arguments) / step / most,
        "bandwidth_gb_s": most / 1e9,
    }
    if engine != "nanochat" and (peer := timings.get(("nanochat", rows))):
        row["times_nanochat"] = statistics.median(a.rate / b.rate for a, b in zip(of, peer, strict=True))
    return row


# ---- HTTP ----


def serve_here(arguments: argparse.Namespace) -> None:
    """Serve a model with random weights on a free port, which is printed; what the server process runs."""
    import pydoc_data.topics

    from bwlm.chat.dialogue import Voice
    from bwlm.chat.served import ServedModel
    from bwlm.chat.server import build_app, run_server
    from bwlm.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(iter(pydoc_data.topics.topics.values()), arguments.vocab)
    config = GPTConfig.from_depth(arguments.depth, tokenizer.vocab_size, arguments.time)
    engine = Engine(random_model(config, "float32"), slots=arguments.streams, compiled=arguments.compile)
    model = ServedModel("random", Voice("forward", "whole", True), tokenizer, engine, {})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        run_server(build_app([model]), listening, 0)


def engine_alone(arguments: argparse.Namespace) -> None:
    """Print the tokens per second of the engine alone; what the other process runs."""
    config = GPTConfig.from_depth(arguments.depth, arguments.vocab, arguments.time)
    run = ours(random_model(config, "float32"), arguments.streams, arguments.new, arguments.compile)
    run()
    began = time.process_time()
    timings = [run() for _ in range(2)]
    seconds = (time.process_time() - began) / sum(one.tokens for one in timings)
    print(json.dumps([max(one.rate for one in timings), seconds]), flush=True)


def on_core(core: int, mode: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("depth", "vocab", "time", "new", "streams")]
    return subprocess.Popen(
        [sys.executable, __file__, f"--mode={mode}", *sizes, *["--compile"] * arguments.compile],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def cpu_seconds(pid: int) -> float:
    """Return the seconds of CPU that a process has used: they vary less beside other work than its speed."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def stream_of(port: int, number: int, new: int) -> tuple[float, float, int]:
    """Return when a stream's first and last token came, and how many came."""
    body = {
        "prompt": f"Stream {number} goes on with other words than all the others",
        "max_tokens": new,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    first = last = 0.0
    count = 0
    async for line in reader:
        if line.startswith(b"data: {"):
            last = time.perf_counter()
            first, count = first or last, count + 1
    writer.close()
    return first, last, count


async def all_streams(port: int, streams: int, new: int) -> dict[str, float]:
    began = time.perf_counter()
    done = await asyncio.gather(*(stream_of(port, number, new) for number in range(streams)))
    seconds = max(last for _, last, _ in done) - began
    return {
        "tok_s": sum(count - 1 for *_, count in done) / seconds,  # the last chunk has no token
        "ttft_ms": 1e3 * statistics.median(first - began for first, *_ in done),
        "ttft_worst_ms": 1e3 * max(first - began for first, *_ in done),
        "tpot_ms": 1e3 * statistics.median((last - first) / max(1, count - 2) for first, last, count in done),
    }


def through_http(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    rows = []
    for number in range(arguments.rounds):
        alone = on_core(cores[0], "engine", arguments)
        engine, engine_seconds = json.loads(alone.communicate()[0])
        server = on_core(cores[0], "server", arguments)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            asyncio.run(all_streams(port, arguments.streams, 8))  # it waits until the server is up, and warms it
            before = cpu_seconds(server.pid)
            found = asyncio.run(all_streams(port, arguments.streams, arguments.new))
            seconds = (cpu_seconds(server.pid) - before) / (arguments.streams * arguments.new)
        finally:
            server.terminate()
            server.wait()
        rows.append({"round": number, "streams": arguments.streams, "engine_tok_s": engine, **found})
        rows[-1]["share_of_engine"] = found["tok_s"] / engine
        rows[-1]["share_by_cpu_time"] = engine_seconds / seconds
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="checkout of karpathy/nanochat")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--mode", choices=["compare", "server", "engine"], default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.mode == "server":
        return serve_here(arguments)
    torch.set_num_threads(1 if arguments.mode == "engine" else arguments.threads)
    if arguments.mode == "engine":
        return engine_alone(arguments)
    rows = through_http(arguments) if arguments.http else measure(arguments)
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        for row in rows:
            print(
                "  ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()
                )
            )
    return None


if __name__ == "__main__":
    main()
