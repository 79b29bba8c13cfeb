"""MLflow: a parent run per grid, a child run per cell, fed from the journals by one process.

Training never waits for a tracking server: it writes its journal, and `Tracking.deliver` carries new entries over when
it can. An entry is delivered once: `mlflow.json` remembers by step what was sent, and what was sent without an answer,
so that the store is asked before anything is sent again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import read_json, write_json
from bwlm.record.journal import Entry, last_entry, read_journal
from bwlm.record.lineage import ExperimentFolder, State, Status

log = logging.getLogger(__name__)

EXPERIMENT = "bwlm"
_METRICS_PER_CALL = 1000  # MLflow's own limit
_LONGEST_DIGEST = 36  # of a dataset, in MLflow's database
_STATES: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def tracking_uri(storage: Path, chosen: str | None) -> str:
    """The grid's setting, else the environment's as for any MLflow client, else SQLite below the storage."""
    return chosen or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage / 'mlflow.db'}"


def ui_command(uri: str, bin_folder: Path) -> str:
    """What a person types, or opens, to see the runs."""
    if uri.startswith(("http://", "https://")):
        return uri
    return shlex.join([str(bin_folder / "mlflow"), "ui", "--backend-store-uri", uri])


class Tracking:
    """One MLflow store. Raises `UserError` on construction if the store cannot be reached at all."""

    def __init__(self, uri: str, storage: Path) -> None:
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "10")):
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.uri = uri
        self._failures: tuple[type[Exception], ...] = (MlflowException, OSError)
        try:
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            artifacts = (storage / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            self._experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, artifacts)
        except Exception as error:  # a store's driver has errors of its own, and they share no base
            raise UserError(self._no_answer(error)) from None

    def parent_run(self, grid_folder: Path, name: str, text: str) -> str:
        """The run of a grid: the one of earlier launches, or a new one with the grid file as its artifact."""
        known = self._known_run(grid_folder)
        if known is None:
            run = self._create(name, {"bwlm.grid": name})
            self._client.log_text(run, text, "grid.yaml")
            self._remember(grid_folder, run, -1)
            return run
        run = str(known.info.run_id)
        self._client.update_run(run, status="RUNNING")
        return run

    def child_run(self, folder: ExperimentFolder, parent: str, dataset: Mapping[str, str]) -> str:
        """The run of a cell below its grid's, with its parameters, tags, data and config."""
        known = self._known_run(folder.path)
        if known is not None:
            if known.data.tags.get("mlflow.parentRunId") != parent:
                self._client.set_tag(known.info.run_id, "mlflow.parentRunId", parent)
            return str(known.info.run_id)
        config = folder.config()
        tags = {
            "mlflow.parentRunId": parent,
            "bwlm.experiment_id": config.id,
            "bwlm.parent_experiment": folder.parent() or "",
            "bwlm.fingerprint": config.fingerprint,
            "bwlm.grid": config.grid or "",
        }
        run = self._create(config.id, tags)
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        params = [Param(name, str(value)) for name, value in sorted(config.identity.items())]
        self._client.log_batch(run, params=params, tags=[RunTag("bwlm.state", "waiting")])
        source = json.dumps({"uri": dataset["source"]})
        entity = Dataset(dataset["name"], dataset["digest"][:_LONGEST_DIGEST], "local", source)
        self._client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])
        self._client.log_artifact(run, str(folder.path / "config.json"))
        self._remember(folder.path, run, 0)
        return run

    def deliver(self, folder: ExperimentFolder) -> int:
        """Carries the journal's new entries over; returns how many metrics. Nothing is lost if the server is away."""
        run, delivered = self._settle(folder.path)
        new = [entry for entry in read_journal(folder.path) if entry.step > delivered and entry.metrics]
        count = 0
        for entries in _batches(new):
            points = _points(entries)
            step, name = entries[-1].step, next(iter(entries[-1].metrics))
            self._remember(folder.path, run, delivered, {"step": step, "metric": name})
            self._client.log_batch(run, metrics=points)
            self._remember(folder.path, run, step)
            delivered = step
            count += len(points)
        return count

    def try_deliver(self, folder: ExperimentFolder) -> bool:
        """`deliver`, but a server that is away is a warning: the next call sends what this one could not."""
        return self._attempt(lambda: self.deliver(folder), folder.path)

    def close_child(self, folder: ExperimentFolder, status: Status, artifacts: list[Path]) -> bool:
        """Delivers the rest, attaches artifacts and sets the run's final state; a warning if the server is away."""
        return self._attempt(lambda: self._close_child(folder, status, artifacts), folder.path)

    def _close_child(self, folder: ExperimentFolder, status: Status, artifacts: list[Path]) -> None:
        self.deliver(folder)
        run = read_json(folder.path / "mlflow.json")["run_id"]
        if last := last_entry(folder.path):
            # with the entry's time stamp, so that MLflow drops them where they were sent before
            final = Entry(last.step, last.time, {f"final_{name}": value for name, value in status.metrics.items()})
            self._client.log_batch(run, metrics=_points([final]))
        self._client.set_tag(run, "bwlm.state", status.state)
        self._client.set_tag(run, "bwlm.reason", status.reason)
        self._close(run, artifacts, _STATES.get(status.state, "KILLED"))

    def close_parent(self, run: str, artifacts: list[Path], complete: bool) -> bool:
        """Attaches the report and sets the grid's final state; a warning if the server is away."""
        state = "FINISHED" if complete else "KILLED"
        return self._attempt(lambda: self._close(run, artifacts, state), artifacts[0].parent)

    def monitor_system(self, run: str) -> Any:
        """CPU, memory, disk, network and GPU of this machine as system metrics of a run; the caller calls `finish`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run, tracking_uri=self.uri, sampling_interval=10)
        monitor.start()
        return monitor

    def _create(self, name: str, tags: dict[str, str]) -> str:
        return str(self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id)

    def _close(self, run: str, artifacts: list[Path], state: str) -> None:
        for path in artifacts:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, state)

    def _attempt(self, action: Callable[[], object], folder: Path) -> bool:
        try:
            action()
        except self._failures as error:
            log.warning("%s; the record waits in %s", self._no_answer(error), folder)
            return False
        return True

    def _no_answer(self, error: Exception) -> str:
        shown = re.sub(r"://([^:/@]*):[^/@]*@", r"://\1:***@", self.uri)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"tracking: {shown} does not answer ({reason})"

    def _known_run(self, folder: Path) -> Any:
        """The run that an earlier launch made for this folder, unless this store does not have it (any more)."""
        from mlflow.exceptions import MlflowException

        if not (folder / "mlflow.json").exists():
            return None
        try:
            run = self._client.get_run(read_json(folder / "mlflow.json")["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise UserError(self._no_answer(error)) from None
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _settle(self, folder: Path) -> tuple[str, int]:
        """The run and the last step that it has; what was sent without an answer may have arrived or not."""
        state = read_json(folder / "mlflow.json")
        run, delivered, pending = str(state["run_id"]), int(state["delivered_step"]), state["pending"]
        if pending is not None:
            arrived = self._client.get_metric_history(run, pending["metric"])
            if any(point.step == pending["step"] for point in arrived):
                delivered = pending["step"]
            self._remember(folder, run, delivered)
        return run, delivered

    def _remember(self, folder: Path, run: str, step: int, pending: dict[str, Any] | None = None) -> None:
        write_json(folder / "mlflow.json", {"run_id": run, "delivered_step": step, "pending": pending})


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Whole entries, as many as one call takes."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and sum(len(e.metrics) for e in batch) + len(entry.metrics) > _METRICS_PER_CALL:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _points(entries: list[Entry]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, value, e.time, e.step) for e in entries for name, value in e.metrics.items()]
