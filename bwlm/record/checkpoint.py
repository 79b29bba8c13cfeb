"""Checkpoints: safetensors and JSON, written whole, verified by hash. Nothing of a checkpoint is ever unpickled.

step_000400/  model.safetensors  optimizer.safetensors  meta.json (what it is, the SHA-256 of each file, a checksum)
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bwlm.errors import RunError, UserError
from bwlm.paths import read_json, whole_folder, write_json

log = logging.getLogger(__name__)
_OURS = re.compile(r"step_[0-9]{6,}|\.step_[0-9]{6,}\.[0-9a-f]{8}\.tmp")
"""Folders of checkpoints, and what a save that was killed leaves."""

Tensors = dict[str, torch.Tensor]
FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    model: Tensors
    optimizer: Tensors
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, model: Tensors, optimizer: Tensors, meta: dict[str, Any], keep: int
) -> None:
    """Saves a step. Afterwards only the newest `keep` checkpoints up to this step stay.

    Later steps are of a run that was cut off and taken up before them: this run does not know them.
    """
    target = step_folder(folder, step)
    if target.exists():
        shutil.rmtree(target)
    with whole_folder(target) as temporary:
        for name, tensors in zip(FILES, (model, optimizer), strict=True):
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary / name)
        content = meta | {"step": step, "sha256": {name: _sha256(temporary / name) for name in FILES}}
        write_json(temporary / "meta.json", content | {"checksum": _checksum(content)})
    newest = [known for known in checkpoint_steps(folder) if known <= step][-keep:]
    kept = [step_folder(folder, known) for known in newest]
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path not in kept:
            shutil.rmtree(path)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    found = [path.parent.name for path in folder.glob("step_*/meta.json")]
    return sorted(int(name.removeprefix("step_")) for name in found if _OURS.fullmatch(name))


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Raises `RunError` naming the file that is not what was saved."""
    path = step_folder(folder, step)
    meta = _load_meta(path / "meta.json")
    model, optimizer = (_load_tensors(path / name, meta["sha256"].get(name)) for name in FILES)
    return Checkpoint(step, model, optimizer, meta)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; says so loudly when it must take an older one."""
    for step in reversed(checkpoint_steps(folder)):
        try:
            return load_checkpoint(folder, step)
        except RunError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def _load_meta(path: Path) -> dict[str, Any]:
    try:
        meta = read_json(path)
    except UserError as error:
        raise RunError(str(error)) from None
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _checksum(meta):
        raise RunError(f"{path}: damaged (its checksum is not that of its content)")
    return meta


def _load_tensors(path: Path, expected: str | None) -> Tensors:
    try:
        if _sha256(path) != expected:
            raise RunError(f"{path}: damaged (its SHA-256 is not the one in meta.json)")
        tensors: Tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    return tensors


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
