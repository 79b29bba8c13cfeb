"""Mid-training: next-token prediction on packed conversations, every token a target, from a base run's weights."""

from __future__ import annotations

from bwlm.record.experiment import ExperimentFolder
from bwlm.train.loop import PhaseSetup
from bwlm.train.packed_phase import Stream, packed_phase, turn_layout
from bwlm.train.session import Session


def phase(folder: ExperimentFolder, session: Session, stream: Stream) -> PhaseSetup:
    """Return the setup of a mid-training run."""
    return packed_phase(folder, session, stream, turn_layout(folder.config(), supervised=False))
