"""What the research log costs at its defaults: each part timed by itself, as a share of the steps between its entries.

    python benchmarks/log_overhead.py --depth 4 --time 512 --rows 8 --vocab 4096 --threads 2

A step's own noise is larger than 1 %, so the parts are timed and not the difference of two runs; `--paired N` adds
N rounds of both, for the doubtful. Without Ray.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bwlm.config import ResearchLogSettings
from bwlm.evaluate.states import ATTENTION_WINDOWS, MAP_POSITIONS, STATE_WINDOWS
from bwlm.model.gpt import GPT
from bwlm.model.observe import attention_statistics, evaluating
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig
from bwlm.model.train_step import TrainStep
from bwlm.record.researchlog import ResearchLog
from bwlm.text.plan import RowPlan
from bwlm.train.session import LocalSession
from bwlm.train.step_log import Observer

ALL = ResearchLogSettings(scalars=1, tokens=1, gradients=1, activations=1)
NONE = ResearchLogSettings(scalars=0, tokens=0, gradients=0, activations=0)


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        shape = GPTConfig.from_depth(arguments.depth, arguments.vocab, arguments.time)
        self.model = GPT(shape, torch.bfloat16, "blocked", 512)
        self.model.init_weights(0)
        if arguments.compile:
            self.model.compile_training()
        self.train_step = TrainStep(self.model, build_optimizer(self.model, 1.0, 0.0, "muon"), arguments.rows, 1.0)
        ids = torch.randint(0, arguments.vocab, (arguments.rows, arguments.time + 1))
        self.tensors = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "segments": torch.zeros_like(ids[:, 1:])}
        self.plan = RowPlan(10**6, arguments.rows, seed=0)
        observer = self.observer(ALL)
        self.log = ResearchLog(folder / "base.h5", fixed=observer.fixed())
        self.number = 0

    def observer(self, settings: ResearchLogSettings) -> Observer:
        return Observer(self.model, settings, LocalSession(), False, lambda step: self.plan.at(step)[0])

    def step(self, settings: ResearchLogSettings) -> dict[str, float]:
        """One step, and the seconds of its parts."""
        self.number += 1
        view, spent = self.observer(settings).step(self.number, self.tensors), {}

        def see(_: torch.Tensor) -> None:
            spent["gradients and activations"] = seconds(view.see_gradients)

        began = time.perf_counter()
        result = self.train_step(self.tensors["inputs"], self.tensors["targets"], None, False, view.predict, see)
        spent["step"] = time.perf_counter() - began
        metrics = {"train_loss": result.loss, "grad_norm": result.grad_norm, "tokens": 1.0, "lr_multiplier": 1.0}
        spent["gather"] = seconds(lambda: view.entries(result, metrics))
        for group, columns in view.seen.items():
            spent[f"write {group}"] = seconds(lambda g=group, c=columns: self.log.write(g, self.number, **c))
        return spent


def shares(bench: Bench, repeats: int) -> dict[str, float]:
    """Milliseconds of each part, its medians over the repeats, and their sum as a share of a plain step."""
    plain = statistics.median(bench.step(NONE)["step"] for _ in range(repeats))
    with_all = [bench.step(ALL) for _ in range(repeats)]
    part = {name: statistics.median(one[name] for one in with_all) for name in with_all[0]}
    chunk = torch.randn(512, bench.model.config.vocab_size, dtype=torch.bfloat16)
    chunks = bench.tensors["inputs"].numel() / len(chunk)
    part["predictions"] = chunks * statistics.median(seconds(lambda: chunk.max(-1)) for _ in range(repeats))
    usual = ResearchLogSettings()
    every = {
        "gradients and activations": usual.gradients, "predictions": usual.tokens, "gather": usual.tokens,
        "write train": usual.scalars, "write tokens": usual.tokens,
        "write gradients": usual.gradients, "write activations": usual.activations,
    }  # fmt: skip
    total = sum(part[name] / steps for name, steps in every.items())
    figures = {f"{name} [ms]": 1000 * part[name] for name in every}
    merge = seconds(lambda: bench.log.merge())
    evaluation = {name: 1000 * spent for name, spent in at_an_evaluation(bench, repeats).items()}
    rest = {"merge [ms]": 1000 * merge, **evaluation, "share of a step": total / plain}
    return {"plain step [ms]": 1000 * plain, **figures, **rest}


def at_an_evaluation(bench: Bench, repeats: int) -> dict[str, float]:
    """Seconds of looking inside the model, in one reading, besides the validation itself."""
    ids = bench.tensors["inputs"]
    look: dict[str, Callable[[], Any]] = {
        "attention at an evaluation [ms]": lambda: attention_statistics(
            bench.model, ids[:ATTENTION_WINDOWS], None, ids[:ATTENTION_WINDOWS] >= 0, MAP_POSITIONS
        ),
        "states at an evaluation [ms]": lambda: list(bench.model.states(ids[:STATE_WINDOWS], None)),
    }
    with torch.no_grad(), evaluating(bench.model):
        return {name: statistics.median(seconds(one) for _ in range(repeats)) for name, one in look.items()}


def paired(bench: Bench, rounds: int, steps: int = 50) -> list[float]:
    """Ratios of so many steps with the default log to as many without."""
    usual, ratios = ResearchLogSettings(), []
    for _ in range(rounds):
        bench.number = -(-bench.number // 100) * 100  # entries fall due at the same steps in each round
        with_log = seconds(lambda: [bench.step(usual) for _ in range(steps)])
        ratios.append(with_log / seconds(lambda: [bench.step(NONE) for _ in range(steps)]))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("depth", 4), ("time", 512), ("rows", 8), ("vocab", 4096), ("threads", 2), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--paired", type=int, default=0, metavar="ROUNDS")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for _ in range(3):
            bench.step(NONE)
        figures: dict[str, Any] = shares(bench, arguments.repeats)
        if arguments.paired:
            figures["paired ratios"] = [round(ratio, 4) for ratio in paired(bench, arguments.paired)]
        bench.log.close()
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
