"""Weights of a parent: found, verified, and handed to its child.

A link is verified twice, when the child is made and when it begins: the parent has finished, the checkpoint is there,
and its weights have the hash that the link holds.
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
from bwlm.record.checkpoint_name import CheckpointName
from bwlm.record.experiment import ExperimentFolder, open_finished
from bwlm.record.lineage import ParentLink, check_order
from bwlm.record.run_config import RunConfig


def link_to(storage: Path, parent: str, phase: str, child: str) -> ParentLink:
    """Return the link of a run `child` of `phase` to the checkpoint of a finished run that `parent` names.

    Raises `UserError` if there is no such run, if it has not finished, if the phase cannot follow the parent's, if
    the parent descends from the child itself, or if the checkpoint was not kept, is gone or damaged.
    """
    name = CheckpointName.parse(parent)
    folder = open_finished(storage, name.run)
    config = folder.config()
    check_order(phase, folder.id, config.experiment.phase)
    above = folder.link()
    chain = [*(above.chain if above else []), folder.id]
    if child in chain:
        raise UserError(
            f"{child}: would begin from its own descendant ({' > '.join(chain)}): choose another id or another parent"
        )
    try:
        step = _step(name, folder, config)
        digest = weights_digest(folder.checkpoints, step)
    except DamagedCheckpoint as error:
        raise UserError(f"parent: {error}: train {folder.id} again, or choose another parent") from None
    return ParentLink(
        parent=folder.id,
        phase=config.experiment.phase,
        checkpoint=step_folder(folder.checkpoints, step).name,
        step=step,
        sha256=digest,
        chain=chain,
        best=name.is_best,
    )


def _step(name: CheckpointName, folder: ExperimentFolder, config: RunConfig) -> int:
    if name.which:
        return name.step_in(folder)
    if config.steps not in checkpoint_steps(folder.checkpoints):
        raise UserError(
            f"parent: {folder.id}: its last checkpoint, of step {config.steps}, is not in {folder.checkpoints}: "
            "put it back, or choose another parent"
        )
    return config.steps


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
