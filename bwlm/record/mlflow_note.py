"""mlflow.json: what a run's folder notes of its run in MLflow, and how far that store is.

It is written before and after each request, so that a later launch knows what may have arrived.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bwlm.paths import FileState, file_state, read_json, write_json
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.journal import NAME
from bwlm.record.metrics import STEP_METRICS
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.task_metrics import forget_scores, is_score
from bwlm.record.task_results import results_digest

log = logging.getLogger(__name__)

NAMES = 3
"""Version of the metrics' names; a run that has others gets its whole journal again under these."""


def read_note(folder: Path) -> dict[str, Any]:
    """Return the content of mlflow.json: what the store has, as far as we know."""
    path = folder / "mlflow.json"
    return dict(read_json(path)) if path.exists() else {}


def is_closed(folder: ExperimentFolder, status: Status) -> bool:
    """Return whether the run was closed in MLflow with this end and these scores, its artifacts attached."""
    found = read_note(folder.path)
    return bool(found.get("closed") == asdict(status) and found.get("results", "") == scores_digest(folder))


def scores_digest(folder: ExperimentFolder) -> str:
    """Return the digest of the scores that a run has now."""
    return results_digest(folder.path / "evaluations" / folder.config().experiment.phase)


def noted_run(folder: Path) -> str | None:
    """Return the id of the MLflow run of an experiment, which may be gone by now; None if it got none."""
    found = read_note(folder).get("run_id")
    return str(found) if found else None


def noted_store(folder: Path, storage: Path) -> str:
    """Return the address of the store that has the run of an experiment."""
    return tracking_uri(storage, read_note(folder).get("store"))


def write_note(folder: Path, **changes: Any) -> None:
    """Change fields of mlflow.json."""
    write_json(folder / "mlflow.json", read_note(folder) | changes)


def catch_up(folder: Path, run: Any) -> None:
    """Note how far the store is, if that is not as noted.

    If it has less, a backup was restored, or the names are old: its run then gets the rest again, and its end. If it
    has more, another machine has delivered it, whose notes were lost with it.
    """
    found = read_note(folder)
    delivered = found.get("delivered_step", 0)
    last = max((metric.step for metric in run.data.to_proto().metrics if not is_score(metric.key)), default=0)
    if forget_scores(folder, run):
        write_note(folder, closed=None)
    if found.get("names") != NAMES:
        write_note(folder, delivered_step=0, pending=None, closed=None, names=NAMES)
    elif last < delivered:
        log.warning("tracking: the store was set back to step %d of %s: the rest is delivered again", last, folder)
        write_note(folder, delivered_step=last, pending=None, closed=None)
    elif (there := last_step(run)) > delivered:
        write_note(folder, delivered_step=there, pending=None)


def last_step(run: Any) -> int:
    """Return the last step whose metrics a run of MLflow has; others may have written metrics of their own there."""
    return max((metric.step for metric in run.data.to_proto().metrics if metric.key in STEP_METRICS), default=0)


def delivered_states(folder: Path) -> tuple[FileState, ...]:
    """Return the states of what is delivered of a run: its journal, and the folders of its results."""
    states = []
    for path in (folder / NAME, *sorted(folder.glob("evaluations/*/*"))):
        with contextlib.suppress(OSError):
            states.append(file_state(path))
    return tuple(states)


def is_enlisted(folder: Path) -> bool:
    """Return whether the run has all that it gets before training; an earlier version noted a run only when it had."""
    return bool(read_note(folder).get("enlisted", True))
