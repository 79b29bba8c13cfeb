"""The base phase: next-token prediction on packed documents, in one direction."""

from __future__ import annotations

from bwlm.record.experiment import ExperimentFolder
from bwlm.train.loop import PhaseSetup
from bwlm.train.packed_phase import Stream, packed_phase
from bwlm.train.session import Session


def phase(folder: ExperimentFolder, session: Session, stream: Stream) -> PhaseSetup:
    """Return the setup of a base run."""
    return packed_phase(folder, session, stream)
