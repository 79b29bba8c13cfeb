"""Tokens per second of a training step, against a nanochat checkout or a minimal GPT, side by side in one run.

    python benchmarks/train_step.py [--peer DIR] [--json]           # a CPU: depth 4, T=512, B=8, vocabulary 4096
    python benchmarks/train_step.py --vocab 32768 --variants bwlm,bwlm-plain-loss       # peak memory of the loss
    python benchmarks/train_step.py --depth 12 --time 2048 --rows 16 --variants bwlm,bwlm-eager     # a GPU
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/train_step.py --precision float32     # as on a CPU that has AVX2 alone

Each variant runs in a process of its own, and they take turns in rounds, so that a machine that slows down slows all
of them. A step is forward, backward, update and reading the loss, on random ids. Needs torch alone: neither Ray nor
pydantic. DIR is a checkout of karpathy/nanochat; without it the peer is a GPT-2 of the same shape in torch's modules.

FLOPs are 6 N + 12 L H D T a token (`bwlm.model.shape`) for all; the floor is this machine's matmul, measured in turn.
bwlm and each peer's best compute in `--precision`, by default the one that the hardware multiplies itself: emulated
bfloat16 takes minutes a step. A peer's default is what it chooses by itself.
Every row is one segment, as peers have it, so that shares of the floor and ratios compare like with like; documents of
500 tokens that do not see each other, whose nominal FLOPs are not all computed, are a variant: bwlm-documents.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from bwlm.model.compute import (
    ComputeOverrides,
    DeviceType,
    choose_compute,
    look_at_hardware,
    measured_matmul,
    peak_flops,
)
from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig, flops_per_token
from bwlm.model.train_step import TrainStep

Step = Callable[..., object]

KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
LONG = 10**6  # steps: a run in which compilation pays


@dataclass(frozen=True)
class Shape:
    depth: int
    time: int
    rows: int
    vocab: int
    threads: int
    precision: str = "float32"
    """Precision of bwlm, of a peer's best and of the floor."""

    @property
    def tokens(self) -> int:
        return self.rows * self.time

    @property
    def config(self) -> GPTConfig:
        return GPTConfig.from_depth(self.depth, self.vocab, self.time)


@dataclass(frozen=True)
class Variant:
    build: str
    """'bwlm', 'nanochat' or 'minimal'"""
    compile: bool = False
    sets_precision: bool = False
    """True if a peer computes in the precision of `Shape` and not in its own default."""
    keep_memory: bool = False
    fused_loss: bool | None = None
    attention: str = ""
    window: str = "SSSL"
    documents: int = 0
    """Tokens of a document, inside which attention stays; 0: rows are one segment."""


# nanochat's scripts/base_train.py compiles on every device, in float32 on a CPU, with windows of SSSL
VARIANTS = {
    "bwlm": Variant("bwlm", compile=True, keep_memory=True),
    "bwlm-documents": Variant("bwlm", compile=True, keep_memory=True, documents=500),
    "bwlm-eager": Variant("bwlm", keep_memory=True),
    "bwlm-system-allocator": Variant("bwlm", compile=True),
    "bwlm-plain-loss": Variant("bwlm", compile=True, keep_memory=True, fused_loss=False),
    "bwlm-sdpa": Variant("bwlm", compile=True, keep_memory=True, attention="sdpa"),
    "nanochat-default": Variant("nanochat", compile=True),
    "nanochat-eager": Variant("nanochat"),
    "nanochat-best": Variant("nanochat", compile=True, sets_precision=True, keep_memory=True),
    "nanochat-best-no-windows": Variant("nanochat", compile=True, sets_precision=True, keep_memory=True, window="L"),
    "minimal-default": Variant("minimal"),
    "minimal-best": Variant("minimal", compile=True, sets_precision=True, keep_memory=True),
}


# ---- what takes a step ----


def bwlm_step(variant: Variant, shape: Shape, device: torch.device) -> Step:
    kind: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    hardware, peak = look_at_hardware(kind, shape.threads)
    wanted = ComputeOverrides(
        precision=shape.precision,  # type: ignore[arg-type]
        attention=variant.attention or None,  # type: ignore[arg-type]
        fused_loss=variant.fused_loss,
        compile=variant.compile,
    )
    chosen = choose_compute(wanted, hardware, peak, shape.config, shape.rows, LONG)
    model = GPT(shape.config, getattr(torch, chosen.precision), chosen.attention, chosen.loss_chunk)
    model.init_weights(0)
    if chosen.compile:
        model.compile_training()
    model.to(device)
    return TrainStep(model, build_optimizer(model), chosen.micro_rows, grad_clip=1.0)


def nanochat_step(variant: Variant, shape: Shape, device: torch.device, checkout: str) -> Step:
    sys.path.insert(0, checkout)
    from nanochat.gpt import GPT as Peer
    from nanochat.gpt import GPTConfig as PeerConfig

    ours = shape.config
    config = PeerConfig(shape.time, shape.vocab, ours.depth, ours.heads, ours.kv_heads, ours.width, variant.window)
    with torch.device("meta"):
        model = Peer(config)
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    run = torch.compile(model, dynamic=False) if variant.compile else model

    def step(inputs: Tensor, targets: Tensor) -> object:
        loss = run(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


class MinimalGPT(nn.Module):
    """GPT-2 as torch's own modules give it, in the shape of ours."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.place = nn.Embedding(config.sequence_length, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(config.width), False)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight[: ids.size(1)]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1), ids.device)
        logits = self.head(self.layers(x, mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def minimal_step(variant: Variant, shape: Shape, device: torch.device) -> Step:
    model = MinimalGPT(shape.config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = torch.compile(model, dynamic=False) if variant.compile else model
    half = variant.sets_precision and shape.precision == "bfloat16"

    def step(inputs: Tensor, targets: Tensor) -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = run(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# ---- one process, one variant ----


def segments_of(length: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """[R, T] of documents of `length` tokens that follow each other; each row begins somewhere in one of them."""
    offsets = torch.randint(length, (shape.rows, 1), generator=generator) if length < shape.time else 0
    segments = (torch.arange(shape.time).expand(shape.rows, -1) + offsets) // length
    return segments - segments[:, :1]


def measure(name: str, shape: Shape, steps: int, peer: str | None, profile: bool) -> dict[str, float]:
    torch.set_num_threads(shape.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variant = VARIANTS[name]
    began = time.perf_counter()
    if variant.build == "bwlm":
        step = bwlm_step(variant, shape, device)
    elif variant.build == "nanochat":
        step = nanochat_step(variant, shape, device, str(peer))
    else:
        step = minimal_step(variant, shape, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.time + 1), generator=generator).to(device)
    batch = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
    if variant.documents:
        batch.append(segments_of(variant.documents, shape, generator).to(device))
    for _ in range(3):
        step(*batch)
    ready = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(*batch)  # reads the loss, so that a GPU has ended too
        seconds.append(time.perf_counter() - start)
    if profile:
        with torch.profiler.profile() as profiler:
            step(*batch)
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70), file=sys.stderr)
    if device.type == "cuda":
        floor, peak = peak_flops(device, "bfloat16"), torch.cuda.max_memory_allocated()
    else:
        floor = measured_matmul(getattr(torch, shape.precision))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": shape.tokens / statistics.median(seconds),
        "best": shape.tokens / min(seconds),
        "ready_seconds": ready,
        "peak_bytes": peak,
        "floor": floor,
    }


def run_apart(name: str, shape: Shape, arguments: argparse.Namespace, cache: str) -> dict[str, float]:
    variant = VARIANTS[name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(shape.threads)}
    environment |= KEEP_MEMORY if variant.keep_memory else {}
    if variant.build == "nanochat" and variant.sets_precision:
        environment["NANOCHAT_DTYPE"] = shape.precision
    command = [sys.executable, __file__, "--one", name, "--shape", json.dumps(asdict(shape))]
    command += ["--steps", str(arguments.steps)] + (["--peer", arguments.peer] if arguments.peer else [])
    done = subprocess.run(
        command + (["--profile"] if arguments.profile else []), env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name}: failed, see above")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def native_precision(threads: int) -> str:
    """The precision that the GPU or the CPU multiplies itself."""
    hardware, _ = look_at_hardware("cuda" if torch.cuda.is_available() else "cpu", threads)
    return "bfloat16" if hardware.native_bfloat16 else "float32"


# ---- all of them in turn ----


def table(rounds: list[dict[str, dict[str, float]]], shape: Shape) -> list[dict[str, float | str]]:
    flops = flops_per_token(shape.config)
    # the machine's best: a matmul that was disturbed is no floor
    floor = max(found["floor"] for one in rounds for found in one.values())
    rows: list[dict[str, float | str]] = []
    for name in rounds[0]:
        speeds = [one[name]["tokens_per_second"] for one in rounds]
        rows.append(
            {
                "variant": name,
                "tokens_per_second": statistics.median(speeds),
                "best": max(one[name]["best"] for one in rounds),
                "floor_share": statistics.median(speeds) * flops / floor,
                "peak_bytes": max(one[name]["peak_bytes"] for one in rounds),
                "first_ready_seconds": rounds[0][name]["ready_seconds"],
                "later_ready_seconds": rounds[-1][name]["ready_seconds"],
            }
        )
    return rows


def ratio(rounds: list[dict[str, dict[str, float]]], one: str, other: str) -> float:
    """The median over rounds of paired ratios."""
    return statistics.median(r[one]["tokens_per_second"] / r[other]["tokens_per_second"] for r in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of karpathy/nanochat")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: what the hardware multiplies")
    parser.add_argument("--profile", action="store_true", help="what a step spends its time on, to stderr")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape = Shape(**json.loads(arguments.shape))
        found = measure(arguments.one, shape, arguments.steps, arguments.peer, arguments.profile)
        return print(json.dumps(found))
    precision = arguments.precision or native_precision(arguments.threads)
    shape = Shape(arguments.depth, arguments.time, arguments.rows, arguments.vocab, arguments.threads, precision)
    peer = "nanochat" if arguments.peer else "minimal"
    names = (arguments.variants or f"bwlm,bwlm-documents,bwlm-eager,{peer}-default,{peer}-best").split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants: unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="bwlm-inductor-") as cache:
        rounds = []
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            rounds.append({name: run_apart(name, shape, arguments, cache) for name in names})
    rows = table(rounds, shape)
    summary: dict[str, object] = {"rows": rows, "shape": asdict(shape), "floor_share": rows[0]["floor_share"]}
    for key, other in (("default", f"{peer}-default"), ("best", f"{peer}-best")):
        if other in names:
            summary[f"ratio_to_peer_{key}"] = ratio(rounds, names[0], other)
    if arguments.json:
        return print(json.dumps(summary, indent=2))
    print(f"{'variant':24} {'tokens/s':>9} {'best':>9} {'floor':>6} {'peak GB':>8} {'ready s, first / later':>23}")
    for row in rows:
        print(
            f"{row['variant']:24} {row['tokens_per_second']:9,.0f} {row['best']:9,.0f} {row['floor_share']:6.0%} "
            f"{float(row['peak_bytes']) / 1e9:8.2f} "
            f"{row['first_ready_seconds']:13.0f} / {row['later_ready_seconds']:.0f}"
        )
    for key in ("default", "best"):
        if f"ratio_to_peer_{key}" in summary:
            print(f"{summary[f'ratio_to_peer_{key}']:.2f}x {peer}-{key} (median of paired rounds)")
    return None


if __name__ == "__main__":
    main()
