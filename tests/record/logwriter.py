"""Writes a research log whose values tell group and step, until it is killed.

    python -m tests.record.logwriter LOG PROGRESS [RESUME_STEP]

PROGRESS holds the last step that is written whole. The next writer goes on after it, or after RESUME_STEP.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bwlm.record.researchlog import ResearchLog

EVERY = {"train": 1, "tokens": 3, "gradients": 7, "representations": 20}
"""Steps between the entries of each group"""
_PROGRESS = struct.Struct("<q")


def entry(group: str, step: int) -> dict[str, Any]:
    rng = np.random.default_rng([sum(group.encode()), step])
    if group == "train":
        extra = {"loss_forward": -step / 3} if step % 2 else {}
        return {"loss": step / 7, "grad_norm": 1 / step, "tokens": 512 * step} | extra
    if group == "tokens":
        ids = rng.integers(0, 400, (3, 8, 64), dtype=np.int16)
        read, target, predicted = ids
        return {"input": read, "target": target, "predicted": predicted, "row": rng.integers(0, 2**40, 8)}
    if group == "gradients":
        return {"norm": rng.random(9, np.float32), "histogram": rng.random((9, 48), np.float32)}
    return {"states": rng.random((1, 3, 200, 64)).astype(np.float16)}


def written(group: str, last: int) -> list[int]:
    """Its steps up to `last`."""
    return list(range(EVERY[group], last + 1, EVERY[group]))


def wrong(file: Any, group: str) -> list[str]:
    """What in a group of a file is not as it was written."""
    datasets = {name: dataset[:] for name, dataset in file[group].items()}
    steps: NDArray[np.int64] = datasets.get("step", np.zeros(0, np.int64))
    found = [
        f"{group}/{name}: {len(d)} of {len(steps)} entries" for name, d in datasets.items() if len(d) != len(steps)
    ]
    if steps.tolist() != written(group, int(steps[-1]) if len(steps) else 0):
        return [*found, f"{group}/step: {steps.tolist()}"]
    for index, step in enumerate(steps.tolist()):
        expected = entry(group, step)
        for name in datasets.keys() - {"step"}:
            if not np.array_equal(datasets[name][index], expected.get(name, np.nan), equal_nan=True):
                found.append(f"{group}/{name} at step {step}")
    return found


def progress(path: Path) -> int:
    """The last step that was written whole."""
    content = path.read_bytes() if path.exists() else b""
    return int(_PROGRESS.unpack(content)[0]) if content else 0


def main(path: Path, note: Path, resume: int | None) -> None:
    step = progress(note) if resume is None else resume
    descriptor = os.open(note, os.O_RDWR | os.O_CREAT)
    with ResearchLog(path, step) as log:
        os.pwrite(descriptor, _PROGRESS.pack(step), 0)
        print("ready", flush=True)
        while True:
            step += 1
            for group, every in EVERY.items():
                if step % every == 0:
                    log.write(group, step, **entry(group, step))
            os.pwrite(descriptor, _PROGRESS.pack(step), 0)
            if step % 10 == 0:
                log.sync()
                log.merge(now=step % 30 == 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
