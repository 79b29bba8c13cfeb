"""Evaluation of many runs on tasks, each by a Ray worker; the results are saved in the runs' folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from bwlm.cluster.session import open_cluster
from bwlm.config import ResourceSettings
from bwlm.errors import BwlmError, RunError
from bwlm.evaluate.tasks.request import read_tasks, requests_of
from bwlm.evaluate.tasks.results import TaskScore
from bwlm.evaluate.tasks.stored import RunEvaluation
from bwlm.model.compute import count_gpus
from bwlm.paths import storage_root
from bwlm.plan.spec import LaunchSettings, Plan
from bwlm.progress import track
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder
from bwlm.remote import address_of
from bwlm.storage.opened import pull
from bwlm.train.scoring import has_both

_GPU_SHARE = 0.25
"""Share of a GPU for each evaluation: a small model leaves most of it idle."""


def unscored(plan: Plan, storage: Path, faulty: Callable[[BwlmError], object]) -> list[RunEvaluation]:
    """Return what is left to score of the finished cells of a plan: a cell that trains scores itself.

    That is the last checkpoint of each, and of the others that were kept those that are saved at a validation.
    `faulty` is told why a checkpoint cannot be scored.
    """
    left = []
    for cell in plan.cells:
        folder = ExperimentFolder(storage, cell.id)
        if not cell.experiment.evaluation.tasks or not folder.exists() or folder.status().state != "finished":
            continue
        others = [step for step in checkpoint_steps(folder.checkpoints)[:-1] if has_both(step, cell.experiment)]
        for name in (cell.id, *(f"{cell.id}@{step}" for step in others)):
            evaluation = RunEvaluation(storage, name, requests_of(cell.experiment))
            try:
                left += [evaluation] if evaluation.texts() else []
            except BwlmError as error:
                faulty(error)
    return left


def check_tasks(plan: Plan) -> None:
    """Read the tasks of a plan's cells. Raises `UserError` for one that cannot be read, before anything is trained."""
    for request in {request for cell in plan.cells for request in requests_of(cell.experiment)}:
        read_tasks(request)


def evaluate_on_workers(evaluations: Sequence[RunEvaluation]) -> list[TaskScore]:
    """Return the scores of some checkpoints in their order; as many are evaluated at once as there is room for.

    Raises the first error, after the other evaluations have ended: their results are saved, and not made again.
    """
    with open_cluster([_needs()], LaunchSettings(), len(evaluations), "eval"):
        return evaluate_on_cluster(evaluations)


def evaluate_on_cluster(evaluations: Sequence[RunEvaluation]) -> list[TaskScore]:
    """Return the scores of some checkpoints as `evaluate_on_workers`, where Ray runs already."""
    # Ray gives a worker of one CPU one thread
    worker = ray.remote(num_cpus=1, num_gpus=_needs().gpus_per_worker)(_scores)
    places = {
        worker.remote(evaluation, address_of(evaluation.storage)): place for place, evaluation in enumerate(evaluations)
    }
    ended = dict(track(_as_they_end(places), "evaluating", "models", len(places)))
    scores = []
    for _, outcome in sorted(ended.items()):
        if isinstance(outcome, BwlmError):
            raise outcome
        scores += outcome
    return scores


def _scores(evaluation: RunEvaluation, storage: str) -> list[TaskScore]:
    """Return the scores of a checkpoint; a worker on another machine finds its storage there."""
    here = replace(evaluation, storage=storage_root(storage))
    pull(here.storage / CheckpointName.parse(evaluation.checkpoint).run)
    return here.scores()


def _needs() -> ResourceSettings:
    return ResourceSettings(gpus_per_worker=_GPU_SHARE if count_gpus() else 0)


def _as_they_end(places: dict[ray.ObjectRef, int]) -> Iterator[tuple[int, list[TaskScore] | BwlmError]]:
    """Yield the place and the scores of each evaluation, or its error, as it ends."""
    running = list(places)
    while running:
        [first], running = ray.wait(running, num_returns=1)
        try:
            yield places[first], ray.get(first)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            yield places[first], cause if isinstance(cause, BwlmError) else RunError(f"evaluation failed: {error}")
        except ray.exceptions.RayError as error:
            yield places[first], RunError(f"an evaluation's worker died ({error}): run the same command again")
