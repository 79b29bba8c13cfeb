#!/bin/sh
# torch 2.13.0: on a CPU rms_norm takes longer than layer_norm, though it computes less: it is no kernel of its own.
#
# Behaviour seen (Linux, Python 3.11, one thread, Intel Xeon with AVX-512; a row of 256 float32, as in decoding):
#   layer_norm: 7 operations, 2.4 us: native_layer_norm
#   rms_norm: 23 operations, 6.6 us: pow, mean, sum, rsqrt, mul, ...
# A model with RMSNorm that decodes one row spends more on its norms than one with LayerNorm. A product with a column of
# 1/C in place of the mean, x * rsqrt(x^2 @ c + eps), takes 3.6 us. Exits 0 while that is so, 1 once it changes; the
# times are shown and not judged.
#
# Usage: sh findings/torch_rms_norm_on_a_cpu.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/norms.py" <<'PYTHON'
import sys
import time

import torch
import torch.nn.functional as F
from torch.profiler import profile

torch.set_num_threads(1)
row = torch.randn(1, 256)
norms = {"layer_norm": lambda: F.layer_norm(row, (256,)), "rms_norm": lambda: F.rms_norm(row, (256,))}
operations = {}
with torch.inference_mode():
    for name, norm in norms.items():
        norm()
        with profile() as profiled:
            norm()
        operations[name] = [event.name for event in profiled.events() if event.name.startswith("aten::")]
        best = float("inf")
        for _ in range(50):
            began = time.perf_counter()
            for _ in range(200):
                norm()
            best = min(best, (time.perf_counter() - began) / 200)
        print(f"{name}: {len(operations[name])} operations, {best * 1e6:.1f} us")
as_seen = "aten::native_layer_norm" in operations["layer_norm"] and {"aten::pow", "aten::rsqrt", "aten::mul"} <= set(
    operations["rms_norm"]
)
sys.exit(0 if as_seen and len(operations["rms_norm"]) > len(operations["layer_norm"]) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/norms.py" 2>/dev/null
