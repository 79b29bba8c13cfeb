"""MLflow: a parent run per grid, a child run per cell, fed from the journals by one process.

Training never waits for a tracking server: it writes its journal, and `Tracking.deliver` carries new entries over when
it can. An entry is delivered once: what was sent is remembered by step in `mlflow.json`, and MLflow itself drops a
metric sent again with the same time stamp.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import read_json, write_json
from bwlm.record.journal import Entry, read_journal
from bwlm.record.lineage import ExperimentFolder, State, Status

log = logging.getLogger(__name__)

EXPERIMENT = "bwlm"
_METRICS_PER_CALL = 1000  # MLflow's own limit
_STATES: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def tracking_uri(storage: Path, chosen: str | None) -> str:
    """The grid's setting, else the environment's as for any MLflow client, else SQLite below the storage."""
    return chosen or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage / 'mlflow.db'}"


def ui_command(uri: str, bin_folder: Path) -> str:
    """What a person types, or opens, to see the runs."""
    if uri.startswith(("http://", "https://")):
        return uri
    return f"{bin_folder / 'mlflow'} ui --backend-store-uri {uri}"


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
        self._client = MlflowClient(uri)
        try:
            found = self._client.get_experiment_by_name(EXPERIMENT)
            local = uri.startswith("sqlite:")
            artifacts = (storage / "mlartifacts").as_uri() if local else None
            self._experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, artifacts)
        except self._failures as error:
            raise UserError(f"tracking: {uri} does not answer ({str(error).splitlines()[0]})") from None

    def parent_run(self, grid_folder: Path, name: str, text: str) -> str:
        """The run of a grid: the one of earlier launches, or a new one with the grid file as its artifact."""
        known = self._known_run(grid_folder)
        if known is None:
            known = self._create(name, {"bwlm.grid": name})
            self._client.log_text(known, text, "grid.yaml")
            self._remember(grid_folder, known, -1)
        self._client.update_run(known, status="RUNNING")
        return known

    def child_run(self, folder: ExperimentFolder, parent: str, dataset: Mapping[str, str]) -> str:
        """The run of a cell below its grid's, with its parameters, tags, data and config."""
        known = self._known_run(folder.path)
        if known is not None:
            return known
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
        entity = Dataset(dataset["name"], dataset["digest"][:36], "local", dataset["source"])
        self._client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])
        self._client.log_artifact(run, str(folder.path / "config.json"))
        self._remember(folder.path, run, 0)
        return run

    def deliver(self, folder: ExperimentFolder) -> int:
        """Carries the journal's new entries over; returns how many metrics. Nothing is lost if the server is away."""
        from mlflow.entities import Metric

        state = read_json(folder.path / "mlflow.json")
        new = [entry for entry in read_journal(folder.path) if entry.step > state["delivered_step"]]
        points = [Metric(name, value, e.time, e.step) for e in new for name, value in e.metrics.items()]
        for start in range(0, len(points), _METRICS_PER_CALL):
            self._client.log_batch(state["run_id"], metrics=points[start : start + _METRICS_PER_CALL])
        if new:
            self._remember(folder.path, state["run_id"], new[-1].step)
        return len(points)

    def try_deliver(self, folder: ExperimentFolder) -> bool:
        """`deliver`, but a server that is away is a warning: the next call sends what this one could not."""
        try:
            self.deliver(folder)
        except self._failures as error:
            log.warning(
                "MLflow at %s does not answer (%s); metrics wait in %s", self.uri, type(error).__name__, folder.path
            )
            return False
        return True

    def close_child(self, folder: ExperimentFolder, status: Status, artifacts: list[Path]) -> None:
        """Delivers the rest, attaches artifacts and sets the run's final state."""
        from mlflow.entities import Metric

        self.deliver(folder)
        run = read_json(folder.path / "mlflow.json")["run_id"]
        last: list[Entry] = list(read_journal(folder.path))[-1:]
        final = [Metric(f"final_{n}", v, e.time, e.step) for e in last for n, v in status.metrics.items()]
        self._client.log_batch(run, metrics=final)
        self._client.set_tag(run, "bwlm.state", status.state)
        if status.reason:
            self._client.set_tag(run, "bwlm.reason", status.reason)
        self._close(run, artifacts, _STATES.get(status.state, "KILLED"))

    def close_parent(self, run: str, artifacts: list[Path], complete: bool) -> None:
        self._close(run, artifacts, "FINISHED" if complete else "KILLED")

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

    def _known_run(self, folder: Path) -> str | None:
        """A run remembered for this store that still exists in it."""
        path = folder / "mlflow.json"
        if not path.exists():
            return None
        state = read_json(path)
        if state["uri"] != self.uri:
            return None
        try:
            self._client.get_run(state["run_id"])
        except self._failures:
            return None
        return str(state["run_id"])

    def _remember(self, folder: Path, run: str, step: int) -> None:
        write_json(folder / "mlflow.json", {"uri": self.uri, "run_id": run, "delivered_step": step})
