"""A worker without a model, for tests that kill it: saves checkpoints of three steps and pushes each."""

from __future__ import annotations

import sys
from pathlib import Path

from bwlm.storage.folder import SharedFolder

STEPS = (4, 8, 12)
FILES = ("model.safetensors", "optimizer.safetensors", "meta.json")


def write(folder: SharedFolder, path: str, content: str | bytes) -> None:
    target = folder.path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content if isinstance(content, bytes) else content.encode())


def save(folder: SharedFolder, step: int, content: bytes = b"weights") -> None:
    """As a save leaves it: the folder gets its name when it is whole."""
    for name in FILES:
        write(folder, f".step.tmp/{name}", contents(name, step, content))
    target = folder.path / "checkpoints" / f"step_{step:06d}"
    target.parent.mkdir(exist_ok=True)
    (folder.path / ".step.tmp").rename(target)


def contents(name: str, step: int, content: bytes = b"weights") -> bytes:
    return content + f" {name} {step}".encode()


def delete(folder: SharedFolder, step: int) -> None:
    """As a save deletes an old one: its commit mark first."""
    old = folder.path / "checkpoints" / f"step_{step:06d}"
    for name in reversed(FILES):
        (old / name).unlink()
    old.rmdir()


def main(root: str, name: str) -> None:
    folder = SharedFolder(Path(root), name)
    folder.begin(1)
    for step in STEPS:
        save(folder, step)
        write(folder, "metrics.jsonl", "line\n" * step)
        if step > STEPS[1]:
            delete(folder, STEPS[0])
        folder.push(attempt=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
