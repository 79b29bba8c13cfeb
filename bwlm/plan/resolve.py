"""Resolved experiments: the batch size, and the horizon in steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bwlm.config import Experiment, TaskSettings
from bwlm.errors import UserError
from bwlm.model.shape import batch_tokens_for, count_parameters, flops_per_token
from bwlm.paths import local_path
from bwlm.phases import PHASES
from bwlm.record.run_config import shape_of
from bwlm.settings_file import Document, holds, validate


def resolve_experiment(content: Mapping[str, Any], document: Document) -> Experiment:
    """Return the experiment. Raises `UserError` if a field is not valid, or fields do not fit together."""
    experiment = _with_absolute_files(validate(Experiment, content, document))
    try:
        shape_of(experiment)
    except ValueError as error:
        raise UserError(f"{document.where('model')}: {error}: change head_dim or kv_heads") from None
    if not holds(dict(content), "budget.batch_tokens"):
        experiment = _with_batch(experiment)
    _check_batch(experiment, document)
    return experiment


def _with_absolute_files(experiment: Experiment) -> Experiment:
    """Return the experiment with the files of its tasks as absolute paths: workers have another working folder."""
    found = {name: task.path and local_path(task.path) for name, task in experiment.tasks.items()}
    tasks = {name: TaskSettings(path=str(path.absolute())) for name, path in found.items() if path}
    return experiment.model_copy(update={"tasks": dict(experiment.tasks) | tasks})


def _with_batch(experiment: Experiment) -> Experiment:
    """Return the experiment with nanochat's batch for its depth, in whole rows for every worker."""
    unit = experiment.model.sequence_length * experiment.resources.fewest
    tokens = max(1, round(batch_tokens_for(shape_of(experiment)) / unit)) * unit
    budget = experiment.budget.model_copy(update={"batch_tokens": tokens})
    return experiment.model_copy(update={"budget": budget})


def _check_batch(experiment: Experiment, document: Document) -> None:
    width, tokens = experiment.model.sequence_length, experiment.budget.batch_tokens
    workers = experiment.resources.fewest
    if PHASES[experiment.phase].has_reward:
        _check_prompts(experiment, document)
    if tokens % width:
        near = max(1, round(tokens / width)) * width
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {tokens} is not a multiple of "
            f"model.sequence_length={width}: take {near}"
        )
    rows = tokens // width
    if rows % workers:
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {rows} rows a step cannot be shared by "
            f"resources.workers{_least(experiment)}={workers}: take a multiple of {workers * width}"
        )


def _check_prompts(experiment: Experiment, document: Document) -> None:
    """Raise `UserError` unless the workers can share the prompts of a step evenly.

    The number of prompts in all must not depend on the workers.
    """
    rl, workers, prompts = experiment.rl, experiment.resources.fewest, experiment.prompts_per_step
    written = rl.samples * rl.new_tokens
    if prompts < workers and prompts < rl.prompts:
        raise UserError(
            f"{document.where('budget.batch_tokens')}: {experiment.budget.batch_tokens} tokens are too few for "
            f"{workers} x rl.samples={rl.samples} of rl.new_tokens={rl.new_tokens}: take at least {workers * written}"
        )
    if prompts % workers:
        raise UserError(
            f"{document.where('rl.prompts')}: {prompts} prompts a step cannot be shared by {workers} workers: "
            f"take {max(1, prompts // workers) * workers}"
        )


def _least(experiment: Experiment) -> str:
    return ".min" if experiment.resources.is_elastic else ""


def worker_counts(experiment: Experiment) -> tuple[int, ...]:
    """Return the numbers of workers that may train an experiment, in their order.

    Of a range, those that share the rows of a step evenly, and in RL its prompts: so each trains what one would.
    """
    resources = experiment.resources
    shared = [experiment.budget.batch_tokens // experiment.model.sequence_length]
    if PHASES[experiment.phase].has_reward:
        shared.append(experiment.prompts_per_step)
    counts = range(resources.fewest, resources.most + 1)
    return tuple(count for count in counts if not any(rows % count for rows in shared))


def resolve_steps(experiment: Experiment) -> int:
    """Return the horizon in steps; tokens per parameter count matrices and output head, as in nanochat.

    Raises `UserError` if the learning rate's warmup and warmdown do not fit into it.
    """
    steps, optim = _horizon(experiment), experiment.optim
    down = round(optim.warmdown_ratio * steps)
    if optim.warmup_steps is not None and optim.warmup_steps + down > steps:
        raise UserError(
            f"optim.warmup_steps: {optim.warmup_steps} steps and {down} of warmdown (optim.warmdown_ratio) do not "
            f"fit into a run of {steps} steps: lower one of them"
        )
    return steps


def _horizon(experiment: Experiment) -> int:
    budget, shape = experiment.budget, shape_of(experiment)
    counts = count_parameters(shape)
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        tokens = float(budget.tokens)
    elif budget.flops is not None:
        tokens = budget.flops / flops_per_token(shape)
    else:
        assert budget.tokens_per_parameter is not None
        tokens = budget.tokens_per_parameter * counts.scaling
    return max(1, round(tokens / budget.batch_tokens))
