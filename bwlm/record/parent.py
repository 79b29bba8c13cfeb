"""Weights of a parent: found, verified, and handed to its child.

A link is verified twice, when the child is made and when it begins: the parent has finished, its last checkpoint is
there, and its weights have the hash that the link holds.
"""

from __future__ import annotations

from pathlib import Path

from bwlm.errors import UserError
from bwlm.record.checkpoint import (
    MODEL,
    DamagedCheckpoint,
    Tensors,
    check_fits,
    checkpoint_steps,
    load_weights,
    read_meta,
    step_folder,
    weights_digest,
)
from bwlm.record.experiment import ExperimentFolder, open_finished
from bwlm.record.lineage import ParentLink, check_order
from bwlm.record.run_config import RunConfig


def link_to(storage: Path, parent: str, phase: str, child: str) -> ParentLink:
    """Return the link of a run `child` of `phase` to the last checkpoint of a finished parent.

    Raises `UserError` if there is no such run, if it has not finished, if the phase cannot follow the parent's, if
    the parent descends from the child itself, or if the parent's last checkpoint is gone or damaged.
    """
    folder = open_finished(storage, parent)
    config = folder.config()
    check_order(phase, parent, config.experiment.phase)
    above = folder.link()
    chain = [*(above.chain if above else []), parent]
    if child in chain:
        raise UserError(
            f"{child}: would begin from its own descendant ({' > '.join(chain)}): choose another id or another parent"
        )
    steps = checkpoint_steps(folder.checkpoints)
    if config.steps not in steps:
        raise UserError(
            f"parent: {parent}: its last checkpoint, of step {config.steps}, is not in {folder.checkpoints}: "
            "put it back, or choose another parent"
        )
    try:
        digest = weights_digest(folder.checkpoints, config.steps)
    except DamagedCheckpoint as error:
        raise UserError(f"parent: {error}: train {parent} again, or choose another parent") from None
    return ParentLink(
        parent=parent,
        phase=config.experiment.phase,
        checkpoint=step_folder(folder.checkpoints, config.steps).name,
        step=config.steps,
        sha256=digest,
        chain=chain,
    )


def inherited_weights(folder: ExperimentFolder, config: RunConfig) -> Tensors:
    """Return the weights that a run begins with. Raises `UserError` if its link names other weights."""
    link = folder.link()
    if link is None:
        raise UserError(f"{folder.id}: has no parent, but {config.experiment.phase} begins from one: train it again")
    checkpoints = ExperimentFolder(folder.path.parent, link.parent).checkpoints
    try:
        meta = read_meta(checkpoints, link.step)
        check_fits(step_folder(checkpoints, link.step), meta, _expected(config, link))
        if meta["sha256"].get(MODEL) != link.sha256:
            raise UserError(
                f"{step_folder(checkpoints, link.step)}: not the checkpoint that {folder.id} was to begin from "
                f"({MODEL} has another SHA-256): put that one back, or train {folder.id} again"
            )
        return load_weights(checkpoints, link.step)[0]
    except DamagedCheckpoint as error:
        raise UserError(f"{folder.id}: its parent's checkpoint is gone or damaged: {error}: put it back") from None


def _expected(config: RunConfig, link: ParentLink) -> dict[str, object]:
    own = config.checkpoint_meta()
    same = {"direction", "depth", "vocab_size", "tokenizer"} - set(config.experiment.differs)
    return {"id": link.parent, "phase": link.phase} | {name: own[name] for name in sorted(same)}
