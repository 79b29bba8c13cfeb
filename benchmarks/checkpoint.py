"""How long a checkpoint holds up training, how long it takes, and what training beside it costs. Milliseconds.

    python benchmarks/checkpoint.py [--folder DIR] [--depth 6] [--rounds 9] [--json]

`held_up` is the copy to host memory and handing it over; `synchronous` what it would be without a thread: the copy, the
files, their hashes and syncs. A step is timed alone, and while a save runs. The medians of rounds in which all take
turns, on `--folder`'s disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig
from bwlm.model.train_step import TrainStep
from bwlm.record.checkpoint import KeepPolicy, Snapshot, copy_to_host, load_newest, write_checkpoint
from bwlm.record.saver import CheckpointSaver

VOCABULARY, WIDTH, ROWS = 10240, 256, 2
KEEP = KeepPolicy(last=2)


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


class Run:
    """A model that trains, and saves itself to a folder in either way."""

    def __init__(self, depth: int, folder: Path) -> None:
        self.model = GPT(GPTConfig.from_depth(depth, VOCABULARY, WIDTH))
        self.model.init_weights(0)
        self.optimizer = build_optimizer(self.model)
        self.folder = folder
        self.saver = CheckpointSaver(folder, KEEP)
        self._step = TrainStep(self.model, self.optimizer, ROWS, grad_clip=1.0)
        self._ids = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
        self._numbers = count(1)

    def step(self) -> None:
        self._step(self._ids, self._ids)

    def copy(self) -> Snapshot:
        model, state = copy_to_host(self.model.state_dict()), copy_to_host(self.optimizer.state_tensors())
        return Snapshot(next(self._numbers), model, state, {"rank0/cpu": torch.get_rng_state()}, {"progress": {}})

    def save_now(self) -> None:
        write_checkpoint(self.folder, self.copy(), KEEP)

    def save_beside(self) -> None:
        self.saver.save(self.copy())

    def round(self) -> dict[str, float]:
        self.saver.wait()
        times = {"synchronous": milliseconds(self.save_now), "step": milliseconds(self.step)}
        times["held_up"] = milliseconds(self.save_beside)
        times["in_background"] = milliseconds(self.saver.wait)
        self.save_beside()
        times["step_beside_a_save"] = milliseconds(self.step)
        self.saver.wait()
        times["load"] = milliseconds(lambda: load_newest(self.folder))
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a temporary folder")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = Run(arguments.depth, Path(folder))
        run.round()  # warms up
        rounds = [run.round() for _ in range(arguments.rounds)]
        files = {path.name: path.stat().st_size for path in Path(folder).glob("step_*/*.safetensors")}
        run.saver.close()
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    if arguments.json:
        print(json.dumps({"bytes": files, "milliseconds": medians, "rounds": rounds}))
        return
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in files.items()))
    for name, median in medians.items():
        print(f"{name.replace('_', ' '):20} {median:7.0f} ms")


if __name__ == "__main__":
    main()
