"""Each choice follows from hardware and run, can be forced, and gives its reason."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bwlm.model.compute import (
    Compute,
    ComputeOverrides,
    Hardware,
    choose_compute,
    gpu_peak,
    look_at_hardware,
    measured_matmul,
    peak_flops,
)
from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig, flops_per_token
from bwlm.model.train_step import TrainStep

CPU = Hardware("cpu", "this CPU", native_bfloat16=True, compiler="/usr/bin/g++", threads=2)
GPU = Hardware("cuda", "NVIDIA H200", native_bfloat16=True, compiler="triton")
PEAK = {"cpu": 4e11, "cuda": 989e12}


def choose(
    wanted: ComputeOverrides | None = None, hardware: Hardware = CPU, depth: int = 4, steps: int = 100, **shape: int
) -> Compute:
    sizes = {"vocab_size": 4096, "sequence_length": 512} | shape
    config = GPTConfig.from_depth(depth, **sizes)
    return choose_compute(wanted or ComputeOverrides(), hardware, PEAK[hardware.device], config, rows=64, steps=steps)


def test_precision_is_what_the_hardware_multiplies() -> None:
    assert choose().precision == "bfloat16"
    plain = choose(hardware=replace(CPU, native_bfloat16=False))
    assert plain.precision == "float32"
    assert "emulate" in plain.reasons["precision"]


def test_attention_is_blocked_on_a_cpu_until_it_would_keep_too_much() -> None:
    assert choose().attention == "blocked"
    long = choose(depth=12, sequence_length=16384)
    assert long.attention == "sdpa"
    assert "GB" in long.reasons["attention"]


def test_a_gpu_skips_blocks_where_they_are_compiled() -> None:
    assert choose(ComputeOverrides(compile=True), GPU).attention == "flex"
    assert choose(ComputeOverrides(compile=False), GPU).attention == "sdpa"
    assert choose(ComputeOverrides(compile=True, attention="sdpa"), GPU).attention == "sdpa"
    narrow = GPTConfig.from_depth(4, 4096, 512, head_dim=8)  # no tensor core multiplies 8 at a time
    assert (
        choose_compute(ComputeOverrides(compile=True), GPU, PEAK["cuda"], narrow, rows=64, steps=100).attention
        == "sdpa"
    )


@pytest.mark.parametrize(("vocab", "chunk"), [(1024, 2048), (4096, 512), (32768, 256), (131072, 256)])
def test_the_fused_loss_holds_about_two_million_logits(vocab: int, chunk: int) -> None:
    assert choose(vocab_size=vocab).loss_chunk == chunk


@pytest.mark.parametrize(("time", "rows"), [(256, 16), (512, 8), (4096, 1), (8192, 1), (32, 64)])
def test_a_pass_holds_some_thousand_tokens_and_never_more_rows_than_there_are(time: int, rows: int) -> None:
    assert choose(sequence_length=time).micro_rows == rows


@pytest.mark.parametrize(
    ("gigabytes", "depth", "rows"), [(141, 12, 16), (141, 20, 16), (80, 20, 16), (24, 20, 4), (24, 12, 8), (8, 20, 1)]
)
def test_a_pass_fits_a_gpus_memory(gigabytes: int, depth: int, rows: int) -> None:
    """47 bytes a token, channel and layer in half of it: at depth 20, 1.2 MB a token, so 2^15 tokens take 39.4 GB."""
    hardware = replace(GPU, memory=gigabytes * 1e9)
    assert choose(hardware=hardware, depth=depth, sequence_length=2048).micro_rows == rows
    assert choose(ComputeOverrides(micro_rows=7), hardware, depth, sequence_length=2048).micro_rows == 7
    in_float32 = choose(
        ComputeOverrides(precision="float32"), replace(hardware, memory=2e9 * gigabytes), depth, sequence_length=2048
    )
    assert in_float32.micro_rows == rows


def test_it_compiles_where_that_saves_twice_its_cost() -> None:
    """At 0.45 of 4e11 FLOP/s a run of s seconds saves s/11 by a gain of 1.1; 30 s are spent: from 660 s on."""
    config = GPTConfig.from_depth(4, 4096, 512)
    step = flops_per_token(config) * 512 * 64 / (0.45 * 4e11)
    assert not choose(steps=math.floor(659 / step)).compile
    assert choose(steps=math.ceil(661 / step)).compile
    short = choose(steps=1)
    assert "would save" in short.reasons["compile"]
    assert "takes up to 30 s itself" in short.reasons["compile"]


def test_it_does_not_compile_without_a_compiler() -> None:
    alone = choose(hardware=replace(CPU, compiler=""), steps=10**6)
    assert not alone.compile
    assert "compiler" in alone.reasons["compile"]
    assert "triton" in choose(hardware=replace(GPU, compiler=""), steps=10**6).reasons["compile"]


@pytest.mark.parametrize(
    ("wanted", "field", "value", "reason"),
    [
        ({"precision": "float32"}, "precision", "float32", "precision"),
        ({"attention": "sdpa"}, "attention", "sdpa", "attention"),
        ({"fused_loss": False}, "loss_chunk", 0, "loss"),
        ({"fused_loss": True}, "loss_chunk", 512, "loss"),
        ({"compile": True}, "compile", True, "compile"),
        ({"compile": False}, "compile", False, "compile"),
        ({"micro_rows": 3}, "micro_rows", 3, "device batch"),
    ],
)
def test_each_choice_can_be_forced(wanted: dict[str, Any], field: str, value: object, reason: str) -> None:
    chosen = choose(ComputeOverrides(**wanted), steps=10**6 if wanted.get("compile") is False else 1)
    assert getattr(chosen, field) == value
    assert chosen.reasons[reason].endswith("as set")


def test_a_gpu_of_unknown_peak_does_not_break_the_choice() -> None:
    config = GPTConfig.from_depth(4, 4096, 512)
    chosen = choose_compute(ComputeOverrides(), GPU, math.nan, config, rows=64, steps=10**6)
    assert chosen.compile
    assert "unknown" in chosen.reasons["compile"]


def test_this_machine_is_looked_at() -> None:
    before = torch.get_num_threads()
    hardware, peak = look_at_hardware("cpu", 1)
    assert (hardware.device, hardware.threads) == ("cpu", 1)
    assert 1e9 < peak < 1e14
    assert torch.get_num_threads() == before


def test_the_peak_of_a_cpu_is_measured_once() -> None:
    first = peak_flops(torch.device("cpu"), "float32")
    assert first == peak_flops(torch.device("cpu"), "float32") > 1e9
    assert measured_matmul(torch.float32, size=64, tries=1) > 0


@pytest.mark.skipif(not look_at_hardware("cpu", 1)[0].compiler, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training() -> None:
    """Also when rows do not fill the last pass and tokens not the last chunk; evaluation stays as it was.

    No step after the first compiles anything, whatever its segments are.
    """
    ids = torch.randint(64, (5, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    lengths = (11, 7, 1, 32)

    def losses(compiled: bool) -> list[float]:
        model = GPT(GPTConfig(64, 2, 32, 2, 1, 32), attention="blocked", loss_chunk=24)
        model.init_weights(0)
        if compiled:
            model.compile_training()
        step = TrainStep(model, build_optimizer(model), micro_rows=3, grad_clip=1.0)
        trained = []
        for number, length in enumerate(lengths):
            segments = (torch.arange(32) + torch.arange(5)[:, None] * (length % 32)) // length
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                trained.append(step(inputs, targets, segments).loss)
        model.eval()
        with torch.no_grad():
            return [*trained, float(model.loss(inputs, targets, segments)[0])]

    assert losses(compiled=True) == pytest.approx(losses(compiled=False), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float) -> None:
    assert gpu_peak(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA A10G",
        "RTX 4090 Laptop GPU",
        "Tesla V100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GB200",
    ],
)
def test_a_gpu_with_nearly_the_name_of_another_is_unknown(name: str) -> None:
    assert math.isnan(gpu_peak(name))


@pytest.mark.parametrize(("compiler", "works"), [("g++", True), ("false", False)])
def test_a_compiler_is_tried_before_a_run_relies_on_it(compiler: str, works: bool, tmp_path: Path) -> None:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"{compiler} is not installed")
    code = "from bwlm.model.compute import why_not_compile; print(repr(why_not_compile('cpu')))"
    environment = os.environ | {"CXX": found, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (shown.stdout.strip() == "''") == works, shown.stdout
    assert shown.stdout.count("\n") == 1
