"""Scores of a run's checkpoints on tasks while it trains: at validations, and when it has finished.

What `bwlm eval ID@STEP --tasks ..` does, done by the process that holds the run's lease. Scores change nothing that
is trained: the weights are read from the checkpoint, and random states are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bwlm.errors import BwlmError, Interrupted, first_line
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.lease import LeaseLost
from bwlm.train.meter import CLOCK

if TYPE_CHECKING:
    from bwlm.config import Experiment
    from bwlm.evaluate.tasks.request import TaskRequest

log = logging.getLogger(__name__)

Announce = Callable[[bool], object]
"""Is told True before a scoring begins, and False after it has ended."""

_LONGEST_SCORING = timedelta(days=7)
"""Time that the other ranks wait while rank 0 scores; torch's own limit is half an hour."""


def _silently(begins: bool) -> None:
    return


class CheckpointScorer:
    """Scores the checkpoints of a run that this process trains, on the tasks of its `evaluation.tasks`."""

    def __init__(self, folder: ExperimentFolder, stopping: Callable[[], bool] = lambda: False) -> None:
        """`stopping` is asked after each batch; a scoring that it ends is made when the run resumes."""
        config = folder.config()
        self._folder = folder
        self._stopping = stopping
        self._requests = _requests_of(config.experiment)
        self._steps = config.steps
        self._experiment = config.experiment
        self._waiting: int | None = None
        several = bool(self._requests) and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._ranks = dist.new_group(timeout=_LONGEST_SCORING, backend="gloo") if several else None

    def step_over(self, step: int, announce: Announce = _silently) -> None:
        """Score the checkpoint of the last validation once it is saved; every rank calls this after every step."""
        if self._waiting is not None and self._agreed(self._waiting in checkpoint_steps(self._folder.checkpoints)):
            announce(True)
            self._score(self._waiting)
            announce(False)
            self._agreed(True)  # the other ranks wait here
            self._waiting = None
        if self._is_due(step):
            self._waiting = step

    def resumed(self) -> None:
        """Score what the run was cut off from; every rank calls this before the first step. What is scored stays."""
        for step in checkpoint_steps(self._folder.checkpoints):
            if self._is_due(step):
                self._score(step)
        self._agreed(True)  # the other ranks wait here

    def finished(self, announce: Announce = _silently) -> None:
        """Score the last checkpoint of a run that has finished; only rank 0 calls this."""
        if self._requests:
            announce(True)
            self._score(self._steps)

    def _is_due(self, step: int) -> bool:
        """Return whether a step that is not the last is to be scored."""
        return bool(self._requests) and step < self._steps and has_both(step, self._experiment)

    def _agreed(self, answer: bool) -> bool:
        """Return rank 0's answer on every rank."""
        if self._ranks is None:
            return answer
        told = torch.tensor(int(answer))
        dist.broadcast(told, src=0, group=self._ranks)
        return bool(told)

    def _score(self, step: int) -> None:
        """Score a checkpoint, on rank 0. A fault becomes a warning: scores can be made later, and training goes on."""
        if self._folder.held is None:  # another rank
            return
        from bwlm.evaluate.tasks.stored import RunEvaluation

        name = f"{self._folder.id}@{step}"
        evaluation = RunEvaluation(self._folder.path.parent, name, self._requests, held=self._folder)
        try:
            with CLOCK.pause(), _random_states_kept():
                evaluation.scores(self._go_on)
        except (Interrupted, LeaseLost):
            return  # the loop asks the same at its next step, and ends the run
        except (BwlmError, OSError, torch.OutOfMemoryError) as error:  # the model that is trained holds memory too
            log.warning("step %d is not scored (%s): bwlm eval %s --tasks ..", step, first_line(error), name)

    def _go_on(self, items: int) -> None:
        if self._stopping():
            raise Interrupted("stopped on request while a checkpoint was scored")


def has_both(step: int, experiment: Experiment) -> bool:
    """Return whether a step that is not the last has a validation and a checkpoint."""
    return all(every and step % every == 0 for every in (experiment.evaluation.every, experiment.checkpoint.every))


def _requests_of(experiment: Experiment) -> tuple[TaskRequest, ...]:
    if not experiment.evaluation.tasks:
        return ()
    from bwlm.evaluate.tasks.request import requests_of  # it takes half a second, which most runs save

    return requests_of(experiment)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
