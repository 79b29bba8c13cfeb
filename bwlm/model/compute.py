"""Precision, kernels and compilation for the hardware: each chosen once, with its reason, and each can be forced.

None of it changes what is computed, only how fast and in which rounding; docs/performance.md has the measurements
behind the constants. Imports torch only where it looks at the machine, so that records are read without it.
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
"""Tokens of one forward pass, where memory allows them."""

_KEPT_BYTES: dict[Precision, int] = {"bfloat16": 47, "float32": 94}
"""That the backward pass needs of each token, channel and layer where nothing is compiled."""
_KEPT_SHARE = 0.5
"""Of a GPU's memory, for what the backward pass needs."""

_LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that the fused loss holds at once, in float32: what stays in a CPU's cache, or keeps a GPU busy."""
_FEWEST_TOKENS = 256

_BLOCKED_BYTES = 2**32
"""Probabilities that 'blocked' attention may keep for the backward pass, over all layers."""

SMALLEST_FLEX_HEAD = 16
"""Head dimension that the tensor cores of 'flex' need at least."""

_COMPILE_SECONDS = {"cpu": 30.0, "cuda": 30.0}
_COMPILE_GAIN = {"cpu": 1.10, "cuda": 2.0}
_EAGER_SHARE = {"cpu": 0.45, "cuda": 0.23}
"""Of the peak, as a run that is not compiled reaches it."""

# dense bf16 FLOP/s from NVIDIA's data sheets; the first whose words the device's name contains counts
_GPU_PEAKS = {
    "B200": 2250e12, "B100": 1800e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "A6000": 155e12, "5090": 209e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Any of these capabilities of a CPU, x86 or ARM."""


@dataclass(frozen=True)
class Hardware:
    """What one worker computes on."""

    device: DeviceType
    name: str
    native_bfloat16: bool
    """Multiplied by the hardware itself, not emulated."""
    compiler: str
    """What `torch.compile` would build with; '' if it is missing."""
    threads: int = 1
    memory: float = math.inf
    """Bytes of a GPU."""


@dataclass(frozen=True)
class ComputeOverrides:
    """What the user forces; None leaves the choice to `choose_compute`."""

    precision: Precision | None = None
    attention: Attention | None = None
    fused_loss: bool | None = None
    compile: bool | None = None
    micro_rows: int | None = None


@dataclass(frozen=True)
class Compute:
    """The choices of a run. They stay with it, so that it resumes as it began."""

    precision: Precision
    attention: Attention
    loss_chunk: int
    """Tokens whose logits exist at once; 0: all of a pass."""
    compile: bool
    micro_rows: int
    """Rows of one forward pass."""
    threads: int
    reasons: dict[str, str] = field(default_factory=dict)
    """A line for a person by choice."""

    def with_threads(self, threads: int) -> Compute:
        return replace(self, threads=threads, reasons=self.reasons | {"threads": f"{threads} a worker"})


def choose_compute(
    wanted: ComputeOverrides, hardware: Hardware, peak: float, shape: GPTConfig, rows: int, steps: int
) -> Compute:
    """`peak` in FLOP/s of one worker, `rows` of one worker and step."""
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
    """A power of two."""
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
    # a block of an eighth of the row reaches half a block beyond the diagonal
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
    estimate = f"about {saved:.0f} s of {seconds:.0f} s saved, at most {cost:.0f} s spent"
    return (True, f"on: {estimate}") if saved > 2 * cost else (False, f"off: {estimate}")


# ---- looking at the machine ----


def look_at_hardware(device: DeviceType, threads: int) -> tuple[Hardware, float]:
    """The machine of this process, and the bf16 FLOP/s of a worker with so many threads (NaN for an unknown GPU)."""
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
    """Those of this machine."""
    import torch

    return torch.cuda.device_count()


def can_use_gpus() -> bool:
    """Whether torch and the driver go together."""
    import torch

    return torch.cuda.is_available()


_COMPILER_SECONDS = 600.0

_COMPILE_SOMETHING = """
import sys, torch
try:
    torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(64, device=sys.argv[1]))
except Exception as error:
    if "out of memory" not in str(error):  # another process fills the GPU: no word on the compiler
        sys.exit((str(error).strip() or type(error).__name__).splitlines()[0])
"""


def why_not_compile(device: DeviceType) -> str:
    """What `torch.compile` fails with on this machine, '' if it works: seconds, and more where its cache is empty.

    In a process of its own, since a compiler leaves helpers behind.
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
    """FLOP/s that MFU is a share of: a GPU's dense bf16 peak from a table (NaN if unknown), a CPU's measured matmul."""
    import torch

    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return measured_matmul(getattr(torch, precision))


def gpu_peak(name: str) -> float:
    """Dense bf16 FLOP/s of a GPU by its name, NaN where the table does not have it."""
    if re.search(r"Laptop|\b(MIG|Ti|D)\b", name):  # a part of the chip that the table has, or another one
        return float("nan")
    return next((peak for words, peak in _GPU_PEAKS.items() if re.search(rf"\b{words}\b", name)), float("nan"))


def measured_matmul(dtype: torch.dtype, size: int = 1024, tries: int = 5) -> float:
    """The best of a few square matmuls on this CPU with the threads that torch has now, in FLOP/s."""
    import torch

    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(tries + 1):  # the first packs its operands and starts the threads
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
