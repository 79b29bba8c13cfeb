"""Delivery of scores on tasks to MLflow outside of a launch, by whoever made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bwlm.credentials import masked
from bwlm.errors import UserError
from bwlm.format import counted, first_of
from bwlm.record.database import database_of, prepare_database
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.mlflow_note import noted_run, noted_store
from bwlm.record.mlflow_store import active_run, open_client, reason, refusal
from bwlm.record.task_metrics import send_scores, unsent


def deliver_scores(storage: Path, folders: Sequence[ExperimentFolder]) -> list[str]:
    """Send the new scores of runs to their MLflow runs, and return sentences on those that could not be sent.

    No error of a store is raised: the scores are in the runs' folders, and the next call, or the next launch of the
    grid, sends them. In a launch `Tracking.deliver` does the same for each run.
    """
    by_store: dict[str, list[ExperimentFolder]] = {}
    alone: list[str] = []
    for folder in folders:
        if not unsent(folder, run := noted_run(folder.path)):
            continue
        if run is None:
            alone.append(folder.id)
        else:
            by_store.setdefault(noted_store(folder.path, storage), []).append(folder)
    sentences = []
    for uri, waiting in by_store.items():
        missing, fault = _deliver(uri, waiting)
        alone += missing
        sentences += [fault] if fault else []
    if alone:
        verb = "has" if len(alone) == 1 else "have"
        sentences.append(f"tracking: {first_of(alone)} {verb} no MLflow run: the scores are in the run's folder only")
    return sentences


def _deliver(uri: str, folders: Sequence[ExperimentFolder]) -> tuple[list[str], str]:
    """Return the runs that the store does not have, and in words why it did not take the scores of others."""
    missing: list[str] = []
    left = len(folders)
    try:
        client = _open(uri)
        for folder in folders:
            run = active_run(client, str(noted_run(folder.path))) if client else None
            if run is None:
                missing.append(folder.id)
            else:
                send_scores(client, folder, run)
            left -= 1
    except UserError as error:
        return missing, str(error)
    except Exception as error:  # a store's driver has errors of its own, and they share no base
        fault = refusal(error, masked(uri)) or f"does not answer ({reason(error)})"
        wait = f"the scores of {counted(left, 'run')} wait in the storage, and the same command delivers them"
        return missing, f"tracking: {masked(uri)} {fault}; {wait}"
    return missing, ""


def _open(uri: str) -> Any:
    """Return a client of a store; None if its file is gone, since none is made here."""
    path = database_of(uri)
    if path is not None and not path.exists():
        return None
    if path is not None:
        prepare_database(path, uri, "")
    return open_client(uri)
