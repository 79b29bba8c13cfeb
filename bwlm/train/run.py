"""Runs one experiment of any phase to its end, and records how it ended."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from bwlm.errors import Interrupted, RunError, TrainingDiverged, UserError
from bwlm.record.checkpoint import refuse_foreign
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.train.loop import PhaseSetup, train
from bwlm.train.packed_phase import Stream
from bwlm.train.records import cannot_write
from bwlm.train.session import Session, raise_on_all_ranks


def run_phase(folder: ExperimentFolder, session: Session, stream: Stream) -> Status:
    """Train, evaluate and record a run; return how it ended. A finished run is left alone.

    A failure of the run itself, or a fault in its folder, is returned as state `failed`; every other error is raised.
    A run that was asked to end is `stopped`, without a reason: it can resume. If another process holds the run's
    lease now, that process records its end: `LeaseLost` is raised, on rank 0.
    """
    done = folder.status()
    if done.ended:
        return done
    try:
        metrics = train(raise_on_all_ranks(session, lambda: _phase(folder, session, stream)), folder, session)
    except Interrupted:
        return Status("stopped", "", folder.status().step)
    except (RunError, UserError) as error:
        at, diverged = folder.status(), error.step if isinstance(error, TrainingDiverged) else None
        status = Status("failed", str(error), at.step, at.metrics, diverged)
    else:
        status = Status("finished", "", folder.config().steps, metrics)
    if session.rank == 0:
        try:
            (folder.finish if status.state == "finished" else folder.write_status)(status)
        except OSError as error:  # a full disk, say; report the run's own failure first
            return Status("failed", status.reason or str(cannot_write(folder.path, error)), status.step)
    return status


def _phase(folder: ExperimentFolder, session: Session, stream: Stream) -> PhaseSetup:
    config = folder.config()
    expected = {name: value for name, value in config.checkpoint_meta().items() if name != "id"}
    refuse_foreign(folder.checkpoints, expected)
    # imported by name, so that the code fingerprint of a phase does not cover what other phases import
    module = importlib.import_module(f"bwlm.train.{config.experiment.phase}")
    build: Callable[[ExperimentFolder, Session, Stream], PhaseSetup] = module.phase
    return build(folder, session, stream)
