"""Precision, kernels and compilation for the hardware: each chosen once, with its reason, and each can be forced.

The choices change how fast a run is and how it rounds, not what it computes. docs/performance.md has the measurements
behind the constants. The module imports torch only where it looks at the machine, so that records can be read without
torch.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from bwlm.model.shape import GPTConfig, flops_per_token

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "blocked", "flex"]
DeviceType = Literal["cpu", "cuda"]

_MICRO_TOKENS = {"cpu": 2**12, "cuda": 2**15}
"""Tokens of one forward pass, if memory allows them."""

_KEPT_BYTES: dict[Precision, int] = {"bfloat16": 47, "float32": 94}
"""Bytes that the backward pass needs per token, channel and layer, without compilation."""
_KEPT_SHARE = 0.5
"""Share of a GPU's memory for what the backward pass needs."""

_LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Float32 logits that the fused loss holds at once: as many as fit a CPU's cache, or as keep a GPU busy."""
_FEWEST_TOKENS = 256
"""Fewest tokens of a chunk of the fused loss."""

_BLOCKED_BYTES = 2**32
"""Most bytes of probabilities that 'blocked' attention may keep for the backward pass, over all layers."""

SMALLEST_FLEX_HEAD = 16
"""Smallest head dimension that the tensor cores of 'flex' accept."""

_COMPILE_SECONDS = {"cpu": 30.0, "cuda": 30.0}
"""Seconds that torch.compile takes at most, by device."""
_COMPILE_GAIN = {"cpu": 1.10, "cuda": 2.0}
"""Speed of a compiled run, as a multiple of the uncompiled one."""
_EAGER_SHARE = {"cpu": 0.45, "cuda": 0.23}
"""Share of the peak FLOP/s that an uncompiled run reaches."""

# Dense bf16 FLOP/s from NVIDIA's data sheets. The first entry whose words occur in the device's name counts.
_GPU_PEAKS = {
    "B200": 2250e12, "B100": 1800e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "A6000": 155e12, "5090": 209e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""CPU capabilities, x86 and ARM, any of which means native bfloat16."""


@dataclass(frozen=True)
class Hardware:
    """Hardware of one worker."""

    device: DeviceType
    name: str
    native_bfloat16: bool
    """True if the hardware itself multiplies bfloat16, instead of emulating it."""
    compiler: str
    """Compiler that `torch.compile` would use; '' if it is missing."""
    threads: int = 1
    memory: float = math.inf
    """Bytes of a GPU's memory."""


@dataclass(frozen=True)
class ComputeOverrides:
    """Settings that the user forces; None leaves the choice to `choose_compute`."""

    precision: Precision | None = None
    attention: Attention | None = None
    fused_loss: bool | None = None
    compile: bool | None = None
    micro_rows: int | None = None


@dataclass(frozen=True)
class Compute:
    """Choices of a run. They are saved with the run, so that it resumes as it began."""

    precision: Precision
    attention: Attention
    loss_chunk: int
    """Tokens whose logits exist at once; 0: all tokens of a pass."""
    compile: bool
    micro_rows: int
    """Rows of one forward pass."""
    threads: int
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason for each choice, one line for a person."""

    def with_threads(self, threads: int) -> Compute:
        """Return the same choices with another number of threads for each worker."""
        return replace(self, threads=threads, reasons=self.reasons | {"threads": f"{threads} a worker"})


def choose_compute(
    wanted: ComputeOverrides, hardware: Hardware, peak: float, shape: GPTConfig, rows: int, steps: int
) -> Compute:
    """Return the choices for a run: the forced ones as they are, the others by the hardware and the size of the run.

    `peak` is the FLOP/s of one worker (NaN if unknown), `rows` the rows of one worker in a step.
    """
    device, why = hardware.device, {"device": hardware.name}
    precision, why["precision"] = _precision(wanted.precision, hardware)
    micro_rows = wanted.micro_rows or max(1, _micro_tokens(hardware, precision, shape) // shape.sequence_length)
    micro_rows = min(micro_rows, rows)
    why["device batch"] = f"{micro_rows} of {rows} rows in a pass" + _forced(wanted.micro_rows)
    chunk = max(_FEWEST_TOKENS, _LOGITS[device] // shape.vocab_size) if wanted.fused_loss is not False else 0
    why["loss"] = f"fused with the head, {chunk} tokens at a time" if chunk else "of all logits of a pass"
    why["loss"] += _forced(wanted.fused_loss)
    flops = float(flops_per_token(shape)) * shape.sequence_length * rows * steps
    compiled, why["compile"] = _compile(wanted.compile, hardware, flops / (peak * _EAGER_SHARE[device]))
    attention, why["attention"] = _attention(wanted.attention, device, compiled, precision, shape, micro_rows)
    return Compute(precision, attention, chunk, compiled, micro_rows, 0, why).with_threads(hardware.threads)


def _micro_tokens(hardware: Hardware, precision: Precision, shape: GPTConfig) -> int:
    """Return the tokens of one forward pass, reduced to a power of two where memory is short."""
    fit = _KEPT_SHARE * hardware.memory / (_KEPT_BYTES[precision] * shape.width * shape.depth)
    most = _MICRO_TOKENS[hardware.device]
    return most if fit >= most else 2 ** max(0, math.floor(math.log2(fit)))


def _forced(value: object) -> str:
    return "" if value is None else ", as set"


def _precision(wanted: Precision | None, hardware: Hardware) -> tuple[Precision, str]:
    if wanted is not None:
        return wanted, f"{wanted}, as set"
    if hardware.native_bfloat16:
        return "bfloat16", f"bfloat16: {hardware.name} multiplies it natively"
    return "float32", f"float32: {hardware.name} would only emulate bfloat16"


def _attention(
    wanted: Attention | None, device: DeviceType, compiled: bool, precision: Precision, shape: GPTConfig, rows: int
) -> tuple[Attention, str]:
    if wanted is not None:
        return wanted, f"{wanted}, as set"
    if device == "cuda":
        if compiled and shape.head_dim >= SMALLEST_FLEX_HEAD:
            return "flex", "flex: skips what other segments hold; sdpa, torch's fused kernel, where nothing is masked"
        return "sdpa", "sdpa: torch's fused kernel"
    item = 2 if precision == "bfloat16" else 4
    # blocks of an eighth of the row also hold half of each diagonal block: (1/2 + 1/16) T^2 = 9/16 T^2 pairs
    kept = shape.depth * rows * shape.heads * shape.sequence_length**2 * 9 // 16 * item
    if kept > _BLOCKED_BYTES:
        return "sdpa", f"sdpa: blocked would keep {kept / 1e9:.1f} GB for the backward pass"
    return "blocked", f"blocked: faster on a CPU, keeps {kept / 1e6:.0f} MB for the backward pass"


def _compile(wanted: bool | None, hardware: Hardware, seconds: float) -> tuple[bool, str]:
    if wanted is not None:
        return wanted, "on, as set" if wanted else "off, as set"
    if not hardware.compiler:
        missing = "a C++ compiler" if hardware.device == "cpu" else "triton"
        return False, f"off: torch.compile needs {missing}"
    if math.isnan(seconds):
        return True, f"on: the speed of {hardware.name} is unknown, and it seldom costs more than it saves"
    saved, cost = seconds * (1 - 1 / _COMPILE_GAIN[hardware.device]), _COMPILE_SECONDS[hardware.device]
    estimate = f"about {saved:.0f} of the {seconds:.0f} s that the steps take, and takes up to {cost:.0f} s itself"
    return (True, f"on: it saves {estimate}") if saved > 2 * cost else (False, f"off: it would save {estimate}")


# ---- looking at the machine ----


def look_at_hardware(device: DeviceType, threads: int) -> tuple[Hardware, float]:
    """Return this process's hardware, and the peak FLOP/s of a worker with that many threads.

    A GPU's peak is in bfloat16, NaN if the GPU is unknown. A CPU's is measured, in bfloat16 where the CPU multiplies
    it natively, else in float32.
    """
    import torch

    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
        memory = float(torch.cuda.get_device_properties().total_memory)
        gpu = Hardware(device, torch.cuda.get_device_name(), native, _find_triton(), threads, memory)
        return gpu, peak_flops(torch.device(device, 0), "bfloat16")
    known = torch.cpu.get_capabilities()
    native = any(known.get(name) for name in _NATIVE_BFLOAT16)
    compiler = shutil.which("g++") or shutil.which("clang++") or ""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = measured_matmul(torch.bfloat16 if native else torch.float32)
    finally:
        torch.set_num_threads(before)
    return Hardware(device, "this CPU", native, compiler, threads), peak


def count_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def gpu_memory() -> int:
    """Return the bytes of memory of this machine's first GPU."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def can_use_gpus() -> bool:
    """Return true if torch and the GPU driver work together."""
    import torch

    return torch.cuda.is_available()


_COMPILER_SECONDS = 600.0
"""Longest wait of `why_not_compile`."""

_COMPILE_SOMETHING = """
import sys, torch
try:
    torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(64, device=sys.argv[1]))
except Exception as error:
    if "out of memory" not in str(error):  # another process fills the GPU: no word on the compiler
        sys.exit((str(error).strip() or type(error).__name__).splitlines()[0])
"""
"""Program that compiles and runs a tiny function on the device in its argument."""


def why_not_compile(device: DeviceType) -> str:
    """Return the error of `torch.compile` on this machine, '' if it works. Takes seconds, longer with an empty cache.

    Runs in a separate process, since a compiler leaves helper processes behind.
    """
    command = [sys.executable, "-c", _COMPILE_SOMETHING, device]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=_COMPILER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {_COMPILER_SECONDS:.0f} s"
    return (done.stderr.strip().splitlines() or ["it died"])[-1] if done.returncode else ""


def _find_triton() -> str:
    from importlib.util import find_spec

    return "triton" if find_spec("triton") else ""


@lru_cache
def peak_flops(device: torch.device, precision: Precision) -> float:
    """Return the FLOP/s that MFU divides by.

    For a GPU the dense bf16 peak from a table (NaN if unknown), for a CPU a matmul measured in `precision`.
    """
    import torch

    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return measured_matmul(getattr(torch, precision))


def gpu_peak(name: str) -> float:
    """Return the dense bf16 FLOP/s of a GPU by its name, NaN if the table does not list it."""
    if re.search(r"Laptop|\b(MIG|Ti|D)\b", name):  # part of a chip in the table, or a different chip
        return float("nan")
    return next((peak for words, peak in _GPU_PEAKS.items() if re.search(rf"\b{words}\b", name)), float("nan"))


def measured_matmul(dtype: torch.dtype, size: int = 1024, tries: int = 5) -> float:
    """Return the FLOP/s of the best of a few square matmuls on this CPU, with torch's current number of threads."""
    import torch

    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(tries + 1):  # the first try packs its operands and starts the threads
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
