"""Runs that can be talked to: finished, and no control."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bwlm.chat.dialogue import Voice
from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.record.experiment import ExperimentFolder, list_experiments


@dataclass(frozen=True)
class Talkable:
    """Run, and what its model does."""

    id: str
    phase: str
    direction: str
    depth: int
    created: float
    """Seconds since 1970."""
    does: dict[str, str]
    """Words for what the model does, by reading."""

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON."""
        return asdict(self)


def talkable_runs(storage: Path) -> tuple[list[Talkable], list[str]]:
    """Return the runs of a storage that can be talked to, the newest first, and a line on each that cannot be read."""
    found, left_out = [], []
    for folder in list_experiments(storage):
        try:
            run = _talkable(folder)
        except UserError as error:
            left_out.append(f"{folder.id} is left out: {error}")
            continue
        if run is not None:
            found.append(run)
    return sorted(found, key=lambda run: (-run.created, run.id)), left_out


def _talkable(folder: ExperimentFolder) -> Talkable | None:
    if folder.status().state != "finished":
        return None
    experiment = folder.config().experiment
    try:
        voice = Voice.from_experiment(experiment)
    except UserError:
        return None  # a control
    created = read_json(folder.path / "config.json").get("created") or 0.0
    does = {reading: voice.does(reading) for reading in voice.readings}
    return Talkable(folder.id, experiment.phase, experiment.direction, experiment.depth, created, does)


def newest(runs: list[Talkable], phase: str | None, direction: str | None) -> Talkable:
    """Return the newest run of a phase and direction. Raises `UserError` if there is none."""
    for run in runs:  # the newest comes first
        if phase in (None, run.phase) and direction in (None, run.direction):
            return run
    asked = " ".join(filter(None, (direction, phase)))
    raise UserError(f"no finished {asked} run: bwlm chat lists those that can be talked to")
