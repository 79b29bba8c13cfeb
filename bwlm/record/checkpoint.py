"""Checkpoints: safetensors and JSON, written whole, verified by hash. Nothing of a checkpoint is ever unpickled.

step_000400/  model.safetensors  optimizer.safetensors  meta.json (what it is, and the SHA-256 of each file)
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bwlm.errors import RunError
from bwlm.paths import read_json, whole_folder, write_json

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    step: int
    model: Tensors
    optimizer: Tensors
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, model: Tensors, optimizer: Tensors, meta: dict[str, Any], keep: int
) -> None:
    """Saves a step; afterwards only the newest `keep` checkpoints stay."""
    target = step_folder(folder, step)
    if target.exists():
        shutil.rmtree(target)
    with whole_folder(target) as temporary:
        files = {"model.safetensors": model, "optimizer.safetensors": optimizer}
        for name, tensors in files.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary / name)
        hashes = {name: _sha256(temporary / name) for name in files}
        write_json(temporary / "meta.json", meta | {"step": step, "sha256": hashes})
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(step_folder(folder, old))


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in folder.glob("step_*/meta.json"))


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Raises `RunError` naming the file whose hash is not what meta.json says."""
    path = step_folder(folder, step)
    meta = read_json(path / "meta.json")
    for name, expected in meta["sha256"].items():
        if not (path / name).exists() or _sha256(path / name) != expected:
            raise RunError(f"{path / name}: damaged (its SHA-256 is not the one in meta.json)")
    return Checkpoint(step, load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), meta)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; says so loudly when it must take an older one."""
    for step in reversed(checkpoint_steps(folder)):
        try:
            return load_checkpoint(folder, step)
        except RunError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
