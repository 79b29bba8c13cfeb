"""Supervised fine-tuning on whole conversations: only what the model's direction writes is a target."""

from __future__ import annotations

from bwlm.record.experiment import ExperimentFolder
from bwlm.train.loop import PhaseSetup
from bwlm.train.packed_phase import Stream, packed_phase, turn_layout
from bwlm.train.session import Session


def phase(folder: ExperimentFolder, session: Session, stream: Stream) -> PhaseSetup:
    """Return the setup of an SFT run."""
    return packed_phase(folder, session, stream, turn_layout(folder.config(), supervised=True))
