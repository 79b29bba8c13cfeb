"""Reinforcement learning: on-policy policy gradient on samples that their tasks reward, as nanochat's.

With samples i of a prompt's group g(i), rewards r_i, and the N generated tokens t of all samples of a step, each step
minimizes

    loss = 1/N  sum_i A_i  sum_t -log p(token_it given the prompt and the tokens before)
    A_i  = r_i - mean of r over g(i)

- Rewards and advantages: `Rollouts.batch` (`rollouts.py`). A_i is not divided by the group's deviation (Dr. GRPO,
  arXiv:2503.20783).
- A_i for each generated token, 0 elsewhere: `importance` of a batch (`Rollouts._rows`).
- -log p weighted by it: `GPT.loss` (`model/gpt.py`).
- 1/N over all ranks and passes, a mean over all tokens of a step (DAPO, arXiv:2503.14476): `TrainStep`
  (`model/train_step.py`).

There is one update for each batch of samples, so there is no ratio and no clip; there is no KL term. The training
workers themselves write the samples, with the current weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bwlm.directions import TEXT_READINGS, is_marked, own_readings
from bwlm.model.gpt import GPT
from bwlm.paths import write_json
from bwlm.record.experiment import SAMPLES, ExperimentFolder
from bwlm.record.run_config import RunConfig
from bwlm.text.batches import Batch, open_rows
from bwlm.text.conversation import TurnIds, restore_conversation
from bwlm.text.plan import permute
from bwlm.text.tokenizer import Tokenizer
from bwlm.train.loop import Evaluated, PhaseSetup
from bwlm.train.packed_phase import Stream, packed_phase, turn_layout
from bwlm.train.records import cannot_write
from bwlm.train.rollouts import Problem, Rollouts, Sample, load_problems
from bwlm.train.session import Session, raise_on_all_ranks

_SHOWN = 20
"""Samples of a validation that are saved for a person to read."""


def phase(folder: ExperimentFolder, session: Session, stream: Stream) -> PhaseSetup:
    """Return the setup of an RL run: SFT's, with samples as batches, and rewards among the metrics."""
    config = folder.config()
    experiment, settings = config.experiment, config.experiment.rl
    base = packed_phase(folder, session, stream, turn_layout(config, supervised=True))
    rollouts = rollouts_of(config)
    held_out = _validation_problems(config, rollouts.generator.tokenizer)

    def batches(first: int, last: int) -> Iterator[Batch]:
        return (rollouts.batch(base.model, step, session.rank, session.world) for step in range(first, last))

    def evaluate(model: GPT, step: int) -> Evaluated:
        validation = base.evaluate(model, step)
        metrics, shown = _validate(model, rollouts, held_out, session)
        raise_on_all_ranks(session, lambda: _save_samples(folder, step, shown) if session.rank == 0 else None)
        return replace(validation, metrics=validation.metrics | metrics)

    def rows_at(step: int) -> NDArray[np.int64]:
        return np.concatenate([rollouts.chosen(step, rank, session.world) for rank in range(session.world)])

    # the passes were sized for rows of sequence_length; rows are shorter here, so more of them fit
    rows = config.compute.micro_rows * experiment.model.sequence_length // rollouts.width
    return replace(
        base,
        batches=batches,
        measure=lambda batch, losses: measure(batch, losses, surprise=settings.temperature == 1 and not settings.top_k),
        evaluate=evaluate,
        rows_at=rows_at,
        compute=replace(config.compute, micro_rows=max(1, rows)),
    )


def rollouts_of(config: RunConfig) -> Rollouts:
    """Return the writer of a run's samples, over its training problems."""
    experiment = config.experiment
    weights = [source.weight for source in open_rows(config.corpus, "train").sources]
    return Rollouts.from_corpus(
        config.corpus,
        experiment.rl,
        experiment.direction,
        experiment.data.reversal,
        Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"]),
        experiment.prompts_per_step,
        weights,
        experiment.seed,
    )


def measure(batch: Batch, losses: Tensor, surprise: bool) -> dict[str, Tensor]:
    """Return [sum, count] of each metric of a rank's samples; losses are [R, T].

    `surprise` says that samples are drawn from the model's own distribution (temperature 1, no `top_k`): then the
    mean surprise at them estimates its entropy.
    """
    figures = {name: batch[name] for name in ("reward", "sample_tokens", "finished", "rollout_seconds")}
    for number, reading in enumerate(TEXT_READINGS):
        figures[f"reward_{reading}"] = batch["reward"][batch["reading"] == number]
    sums = {
        name: torch.tensor([values.sum(), len(values)], dtype=torch.float32, device=losses.device)
        for name, values in figures.items()
    }
    if surprise:
        targets = int((batch["targets"] >= 0).sum())
        sums["entropy"] = torch.stack([losses.sum(), torch.tensor(float(targets), device=losses.device)])
    return sums


def _validation_problems(config: RunConfig, tokenizer: Tokenizer) -> list[Problem]:
    """Return validation problems, a fixed draw over all sources."""
    known = list(itertools.chain(*load_problems(config.corpus, "validation", tokenizer)))
    count = min(config.experiment.rl.validation, len(known))
    return [known[place] for place in np.sort(permute(np.arange(count), len(known), 0))]


def _validate(
    model: GPT, rollouts: Rollouts, problems: list[Problem], session: Session
) -> tuple[dict[str, float], list[tuple[str, Sample]]]:
    """Return the mean reward of greedy messages, by the model's own readings and over them; a collective.

    Also returns this rank's first samples of each reading.
    """
    metrics, shown = {}, []
    mine = problems[session.rank :: session.world]
    for reading in own_readings(rollouts.generator.direction):
        samples = rollouts.write(model, mine, reading, [0] * len(mine), 0.0) if mine else []
        sums = [sum(sample.reward for sample in samples), len(samples)]
        earned = torch.tensor(sums, dtype=torch.float64, device=session.device)  # zeros on a rank without problems
        if session.world > 1:
            dist.all_reduce(earned)
        metrics[f"val_reward_{reading}"] = float(earned[0] / earned[1])
        shown += [(reading, sample) for sample in samples[:_SHOWN]]
    metrics["val_reward"] = sum(metrics.values()) / len(metrics)
    return metrics, shown


def _save_samples(folder: ExperimentFolder, step: int, shown: list[tuple[str, Sample]]) -> None:
    """Save rank 0's first samples of a validation for a person to read, all of it in reading order."""
    config = folder.config()
    tokenizer, reversal = (
        Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"]),
        config.experiment.data.reversal,
    )
    head = 1 + is_marked(config.experiment.direction)

    def given(sample: Sample, reading: str) -> str:
        read = np.array(sample.message.prompt.ids[head:])
        return tokenizer.decode(restore_conversation(read, reading, reversal, TurnIds.from_tokenizer(tokenizer)))

    target = folder.path / SAMPLES / f"step_{step:06d}.json"
    content = [
        {
            "reading": reading,
            "given": given(sample, reading),
            "written": sample.message.text,
            "finished": sample.message.finished,
            "reward": sample.reward,
        }
        for reading, sample in shown
    ]
    try:
        target.parent.mkdir(exist_ok=True)
        write_json(target, content, folder.check_lease)
    except OSError as error:
        raise cannot_write(target, error) from None
