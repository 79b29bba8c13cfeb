"""Families of runs that nobody trained: a child as a launch would make it, with what its end left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bwlm.config import Experiment
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.fingerprint import inherited
from bwlm.record.health import sealed
from bwlm.record.journal import Journal
from bwlm.record.lineage import LINK, ParentLink

MIXTURE = {"builtin:arithmetic": 1.0}
WEIGHTS = "ab" * 32
"""The SHA-256 of the weights from which a child begins, which it has not."""


def untrained_child(
    parent: ExperimentFolder,
    name: str,
    phase: str,
    grid: str | None = None,
    step: int | None = None,
    best: bool = False,
    **settings: Any,
) -> ExperimentFolder:
    """Makes `name` beside its parent, from its last checkpoint or that of `step`, with the parent's settings but for
    those given."""
    above, link = parent.config(), parent.link()
    step = step or above.steps
    begins = ParentLink(
        parent=parent.id,
        phase=above.experiment.phase,
        checkpoint=f"step_{step:06d}",
        step=step,
        sha256=WEIGHTS,
        chain=[*(link.chain if link else []), parent.id],
        best=best,
    )
    content = above.experiment.model_dump() | {"phase": phase, "parent": parent.id} | settings
    content["data"] = content["data"] | {"mixture": MIXTURE}
    folder = ExperimentFolder(parent.path.parent, name)
    folder.create(
        replace(
            above,
            id=name,
            grid=grid,
            experiment=Experiment.model_validate(content),
            identity=above.identity | settings | inherited(above.identity, begins),
        ),
        begins,
    )
    return folder


def validated(folder: ExperimentFolder, **figures: dict[int, float]) -> ExperimentFolder:
    """Notes in its journal, and in its end, what was measured by metric and step; it has finished then."""
    last: dict[str, float] = {}
    journal = Journal(folder.path)
    for step in range(1, max(step for by_step in figures.values() for step in by_step) + 1):
        now = {name: by_step[step] for name, by_step in figures.items() if step in by_step}
        journal.append(step, {"train_loss": 3.0, **now})
        last |= now
    journal.close()
    folder.write_status(Status("finished", "", folder.config().steps, last))
    return folder


def rewrite_config(folder: ExperimentFolder, **fields: Any) -> ExperimentFolder:
    """Rewrites fields of config.json, and its digest, as another launch would have made them."""
    path = folder.path / "config.json"
    write_json(path, sealed(read_json(path) | fields))
    return folder


def in_grid(folder: ExperimentFolder, grid: str) -> ExperimentFolder:
    return rewrite_config(folder, grid=grid)


def link_anew(storage: Path, run: str, parent: str) -> None:
    """As no launch would: damage, or a slip of whoever edits it."""
    content = read_json(storage / run / LINK)
    write_json(storage / run / LINK, content | {"parent": parent})
