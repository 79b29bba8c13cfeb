"""Small checkpoints whose content tells which save they are of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from bwlm.record.checkpoint import FILES, META, Snapshot, Tensors

ALL = [*FILES, META]


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, generator=generator).bfloat16(),
        "steps": torch.tensor(seed),
        "empty": torch.zeros(0),
    }


def snapshot(step: int, metric: float | None = None, generation: int = 0, **meta: Any) -> Snapshot:
    """What a run's state may be at a step; another `generation` is another state of the same step."""
    seed = 10 * step + generation
    rng = {f"rank{rank}/cpu": torch.Generator().manual_seed(seed + rank).get_state() for rank in range(2)}
    progress = {"step": step, "smooth_loss": 0.1 + seed}
    return Snapshot(
        step, tensors(seed), {"exp_avg": tensors(seed + 1)["a"]}, rng, meta | {"progress": progress}, metric
    )


def same_bits(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (value.dtype, value.shape) == (other[name].dtype, other[name].shape)
        and value.flatten().view(torch.uint8).equal(other[name].flatten().view(torch.uint8))
        for name, value in one.items()
    )


def is_of(loaded: Snapshot, saved: Snapshot) -> bool:
    """Whether every bit of `saved` came back."""
    return (
        (loaded.step, loaded.metric) == (saved.step, saved.metric)
        and saved.meta.items() <= loaded.meta.items()
        and same_bits(loaded.model, saved.model)
        and same_bits(loaded.optimizer, saved.optimizer)
        and same_bits(loaded.rng, saved.rng)
    )


def names(folder: Path) -> list[str]:
    """All that lies there, hidden or not; nothing where there is no folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def flip(path: Path, place: float) -> None:
    """Flips one bit, at a place from 0, the file's first byte, to 1, its last."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def rewrite_meta(path: Path, **fields: Any) -> None:
    """Changes meta.json and makes its checksum fit, as anybody can who may write there."""
    meta = json.loads(path.read_text()) | fields
    meta.pop("checksum")
    meta["checksum"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(meta))
