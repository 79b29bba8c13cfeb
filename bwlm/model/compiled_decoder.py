"""The decode step compiled for a CPU: `decode_step.cpp`, built for the sizes of a model when it is loaded.

What torch needs some hundred operations for is one call here, which reads the weights at the speed of the memory and
does not hold Python's lock. Prompts are still read by torch, from the same matrices: they are kept once.

Not here: a GPU, where a step is a CUDA graph (`step_graphs.py`).

Axes: B rows, C width, V vocabulary, K inputs and N outputs of a matrix.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.decoder import Decoder, Matrix, softcap_
from bwlm.model.gpt import GPT, NORM_EPS
from bwlm.model.shape import GPTConfig

_SOURCE = Path(__file__).parent / "decode_step.cpp"
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
# sums in any order, as vectors need them. Not -ffast-math: a library with it makes torch's tiny numbers zero
_MATHS = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
_WEIGHTS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
_PANEL = 32
"""Columns of a matrix that lie side by side, as in `decode_step.cpp`."""


class CannotCompile(RuntimeError):
    """The decode step cannot be compiled on this machine; the message says what is missing."""


class Panels(Matrix):
    """Weight stored as panels [N / 32, K, 32] of 32 outputs, the last of them filled up with zeros."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs, inputs = weight.shape
        filled = F.pad(weight, (0, 0, 0, -self.outputs % _PANEL))
        self.stored = filled.view(-1, _PANEL, inputs).transpose(1, 2).contiguous()

    def times(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the products [.., outputs] of x [.., inputs], plus what is `added`."""
        rows = x.reshape(-1, x.size(-1))
        products = torch.matmul(rows, self.stored).transpose(0, 1)  # [rows, N / 32, 32]
        y = products.reshape(len(rows), -1)[:, : self.outputs].reshape(*x.shape[:-1], -1)
        return y if added is None else y.add_(added)


class CompiledDecoder(Decoder):
    """Decoder that reads one further id of each row by compiled code.

    Making one takes a second. Raises `CannotCompile`.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__(model, Panels)
        self._step = _compiled(model.config, self.dtype).decode_step
        matrices = [*(matrix for layer in self._layers for matrix in layer), self._head]
        weights = [self._embedding, *(matrix.stored for matrix in matrices)]
        self._weights = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
        self._angles = torch.view_as_real(self._turns).contiguous()
        self._vocabulary = model.config.vocab_size

    def step(self, kept: Tensor, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """Read one further id of each of the first rows; return logits [B, V] for the id after it.

        `kept` has the keys and values of all rows, [L, 2, rows, kv heads, places, D] in float32; `places` are those of
        the new ids.
        """
        rows = len(ids)
        assert 0 <= min(ids) <= max(ids) < self._vocabulary, "ids of the vocabulary"
        assert max(places[:rows]) < kept.size(4), "places of the cache"
        logits = torch.empty(rows, self._vocabulary)
        numbers = ctypes.c_int32 * rows
        self._step(
            torch.get_num_threads(),
            rows,
            numbers(*ids),
            numbers(*places[:rows]),
            self._weights,
            _address(self._angles),
            _address(kept),
            kept.size(2),
            kept.size(4),
            _address(logits),
        )
        return softcap_(logits)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _compiled(config: GPTConfig, dtype: torch.dtype) -> Any:
    """Return the library of `decode_step.cpp` for the sizes of a model. Raises `CannotCompile`."""
    sizes = {
        "DEPTH": config.depth,
        "WIDTH": config.width,
        "HEADS": config.heads,
        "KV_HEADS": config.kv_heads,
        "HEAD_DIM": config.head_dim,
        "HIDDEN": 4 * config.width,
        "VOCABULARY": config.vocab_size,
        "NORM_EPS": f"{NORM_EPS}f",
        "WEIGHT": _WEIGHTS[dtype],
    }
    defined = [f"-D{name}={value}" for name, value in sizes.items()]
    with TemporaryDirectory(prefix="bwlm-") as folder:
        library = Path(folder) / "decode_step.so"
        command = [*_compiler(), *_FLAGS, *_MATHS, *defined, str(_SOURCE), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if run.returncode:
            raise CannotCompile(f"{command[0]} failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
        return ctypes.CDLL(str(library))  # stays when the file is gone


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the system's."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise CannotCompile(f"CXX names {named[0]}, which is not there")
    found = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        raise CannotCompile("it needs a C++ compiler, such as g++")
    return found
