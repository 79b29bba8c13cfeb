"""The base phase: next-token prediction on packed documents, in one direction."""

from __future__ import annotations

from bwlm.record.lineage import ExperimentFolder
from bwlm.train.loop import Phase
from bwlm.train.packed import Stream, packed_phase
from bwlm.train.session import Session


def phase(folder: ExperimentFolder, session: Session, stream: Stream) -> Phase:
    return packed_phase(folder, session, stream)
