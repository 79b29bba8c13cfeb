"""Names of checkpoints: `ID` is the last one of a run, `ID@400` the one of a step, `ID@best` the best by validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bwlm.errors import UserError
from bwlm.phases import PHASES
from bwlm.record.checkpoint import checkpoint_steps, read_meta
from bwlm.record.journal import entries_holding

if TYPE_CHECKING:
    from bwlm.record.experiment import ExperimentFolder

BEST = "best"
FIGURE = "val_bpb_tuning"
"""Validation figure of the best checkpoint, lower is better: the one by which `checkpoint.keep_best` keeps it."""


@dataclass(frozen=True)
class CheckpointName:
    """Name of a checkpoint, as people write it."""

    run: str
    which: str = ""
    """A step, `best`, or empty for the last checkpoint."""

    @classmethod
    def parse(cls, text: str) -> CheckpointName:
        """Return the name that a text holds. Raises `UserError` if there is no step or `best` after its @."""
        run, at, which = text.partition("@")
        if at and which != BEST and not (which.isascii() and which.isdecimal()):
            raise UserError(f"{text}: after @ comes a step or {BEST}, as in {run}@400 or {run}@{BEST}")
        return cls(run, which)

    @property
    def is_best(self) -> bool:
        """True if it names the best checkpoint."""
        return self.which == BEST

    def step_in(self, folder: ExperimentFolder) -> int:
        """Return the step of the checkpoint in its run's folder.

        Raises `UserError` if it was not kept; the message lists the steps that were.
        """
        kept = checkpoint_steps(folder.checkpoints)
        if not kept:
            raise UserError(f"{self.run}: no checkpoint in {folder.checkpoints} yet: train the run until it saves one")
        if not self.which:
            return kept[-1]
        if self.is_best:
            return _best_step(folder, kept)
        if (step := int(self.which)) not in kept:
            raise UserError(f"{self.run}: no checkpoint of step {step}: {_choose(kept)}")
        return step


def run_of(name: str | None) -> str | None:
    """Return the id of the run whose checkpoint is named; None where none is."""
    return None if name is None else CheckpointName.parse(name).run


def _best_step(folder: ExperimentFolder, kept: list[int]) -> int:
    """Return the step of the best checkpoint. Raises `UserError` if a better one was deleted, or none was measured."""
    experiment = folder.config().experiment
    if PHASES[experiment.phase].has_reward:
        raise UserError(
            f"{folder.id}: {BEST} is by validation loss, and a run of {experiment.phase} is judged by its reward: "
            f"name a step: {_choose(kept)}"
        )
    figures = {step: read_meta(folder.checkpoints, step)["metric"] for step in kept}
    measured = [(figure, step) for step, figure in figures.items() if figure is not None]
    if not measured:
        raise UserError(f"{folder.id}: no checkpoint was validated at its step, so none is the best: {_choose(kept)}")
    best, step = min(measured)
    every = experiment.checkpoint.every
    for entry in entries_holding(folder.path, FIGURE):
        if entry.metrics[FIGURE] < best and every and entry.step % every == 0:
            raise UserError(
                f"{folder.id}: a better checkpoint, of step {entry.step} ({FIGURE} {entry.metrics[FIGURE]:.4f}), was "
                f"not kept: {_choose(kept)}, or train with checkpoint.keep_best=true"
            )
    return step


def _choose(kept: list[int]) -> str:
    return f"choose from {', '.join(map(str, kept))}"
