"""MLflow: a parent run per grid, a child run per cell, fed from the journals by one process.

Training never waits for a tracking server: it writes its journal, and `Tracking.deliver` sends new entries when it
can. An entry is delivered once: `mlflow.json` notes the step up to which entries were sent, and what was sent without
an answer, so that the store is asked before anything is sent again. A run is made once in the same way: its mark is
noted before it is made, and a launch that finds a mark without a run asks the store for the run with that mark.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bwlm.credentials import masked
from bwlm.errors import UserError
from bwlm.paths import FileState, read_json, write_json
from bwlm.record.database import database_of, prepare_database
from bwlm.record.experiment import ExperimentFolder, State, Status
from bwlm.record.journal import Entry, entries_after, last_entry
from bwlm.record.metrics import final_for_mlflow, for_mlflow
from bwlm.record.mlflow_note import (
    NAMES,
    catch_up,
    delivered_states,
    is_closed,
    is_enlisted,
    last_step,
    read_note,
    scores_digest,
    write_note,
)
from bwlm.record.mlflow_store import follow_storage, open_client, reason, refusal, sent_once, sqlite_uri
from bwlm.record.mlflow_view import (
    GridResult,
    GridSettings,
    began,
    checkpoint_tag,
    ended,
    points,
    run_name,
    run_tags,
    shortened,
    start_tags,
)
from bwlm.record.provenance import provenance
from bwlm.record.task_metrics import send_scores
from bwlm.remote import address_of
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import exclusive, push

log = logging.getLogger(__name__)

EXPERIMENT = "bwlm"
_METRICS_PER_CALL = 1000  # MLflow's own limit
_LONGEST_DIGEST = 36  # of a dataset, in MLflow's database
_MARK = "bwlm.mark"
_LOCK = ".mlflow.lock"
_NOTE = "mlflow.note.content"
_DIVERGED = "bwlm.diverged"
_STATES: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Tracking:
    """Client of one MLflow store. Raises `UserError` on construction if the store cannot be reached at all."""

    def __init__(self, uri: str, storage: Path, experiment: str | None = None) -> None:
        from mlflow.exceptions import MlflowException

        self.uri = uri
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self._storage = storage
        self._expected: dict[str, tuple[str | None, Mapping[str, str]]] = {}
        self._delivered: dict[str, tuple[FileState, ...]] = {}
        """States of each run's files that were delivered: a run that has ended is not read again and again."""
        self._away = False  # an end could not be delivered: the others are not tried, each would wait as long
        self._store = None if uri == sqlite_uri(storage / "mlflow.db") else uri  # None: the storage's, which may move
        self._failures: tuple[type[Exception], ...] = (MlflowException, OSError, BucketAway)
        try:
            artifacts = (storage / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            if artifacts is not None and (path := database_of(uri)) is not None:
                prepare_database(path, uri, artifacts)
            self._client = open_client(uri)
            self._experiment = self._find_experiment() or self._make_experiment(artifacts)
        except UserError:
            raise
        except Exception as error:  # a store's driver has errors of its own, and they share no base
            raise self._user_error(error) from None

    def _find_experiment(self) -> str | None:
        """Return the id of the experiment in MLflow; None if there is none. Raises `UserError` if it is deleted."""
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            return None
        if found.lifecycle_stage != "active":
            restore = f"MLFLOW_TRACKING_URI='{masked(self.uri)}' mlflow experiments restore -x {found.experiment_id}"
            raise UserError(
                f"tracking: the experiment {self.experiment} of {masked(self.uri)} is deleted: run: {restore}"
            )
        database = self._storage / "mlflow.db"
        if self.uri == sqlite_uri(database):
            follow_storage(database, found.artifact_location, (self._storage / "mlartifacts").as_uri())
        return str(found.experiment_id)

    def _make_experiment(self, artifacts: str | None) -> str:
        """Make the experiment and return its id, or the id of what another launch made at the same moment."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(self.experiment, artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or (made := self._find_experiment()) is None:
                raise
            return made

    def parent_run(self, grid_folder: Path, name: str, text: str, settings: GridSettings) -> str:
        """Return the run of a grid: the run of earlier launches, or a new run with the grid file as its artifact."""
        known = self._known_run(grid_folder)
        tags = {"bwlm.grid": name, "bwlm.storage": address_of(self._storage)}
        with self._answering():
            run = known or self._make_run(grid_folder, name, tags | provenance())
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._enlist_grid(run, settings)
            if not is_enlisted(grid_folder):
                self._client.log_text(run.info.run_id, text, "grid.yaml")
        write_note(grid_folder, enlisted=True)
        return str(run.info.run_id)

    def _enlist_grid(self, run: Any, settings: GridSettings) -> None:
        """Write the settings of all cells as parameters, which MLflow never changes, and the axes, as tags."""
        from mlflow.entities import Param, RunTag

        known = run.data.params
        params = [Param(name, value) for name, value in settings.common.items() if name not in known]
        tags = [RunTag(f"bwlm.axis.{name}", values) for name, values in settings.axes.items()]
        self._client.log_batch(run.info.run_id, params=params, tags=[*tags, RunTag("bwlm.cells", str(settings.cells))])

    def child_run(self, folder: ExperimentFolder, parent: str | None, dataset: Mapping[str, str]) -> str:
        """Return an experiment's run, with parameters, tags, data and config; below its grid's run if it is a cell."""
        seen = read_note(folder.path).get("run_id")
        known = self._known_run(folder.path)
        self._delivered.pop(folder.id, None)  # the store may have been set back
        if known is not None:
            catch_up(folder.path, known)
            if read_note(folder.path).get("store") != self._store:
                write_note(folder.path, store=self._store)
        with self._answering():
            return self._child_run(folder, parent, dataset, known, seen)

    def expect(self, folder: ExperimentFolder, parent: str, dataset: Mapping[str, str]) -> None:
        """Bring the run of a cell up to date, or make it once the cell has trained a step.

        MLflow takes the start of a run when it is made and never changes it: a cell that waits for others would seem
        to train meanwhile.
        """
        self._expected[folder.id] = (parent, dataset)
        if read_note(folder.path).get("run_id") is not None:
            self.child_run(folder, parent, dataset)

    def _child_run(
        self, folder: ExperimentFolder, parent: str | None, dataset: Mapping[str, str], known: Any, seen: str | None
    ) -> str:
        tags = run_tags(folder, parent, read_note(folder.path).get("resumed", []))
        for name, value in tags.items() if known is not None else ():
            if known.data.tags.get(name) != value:  # another grid's run above, or other code that goes on
                self._client.set_tag(known.info.run_id, name, value)
        run = known or self._make_child(folder, parent, tags, seen)
        if not is_enlisted(folder.path):
            self._describe(run, folder, dataset)
            write_note(folder.path, enlisted=True)
        return str(run.info.run_id)

    def _make_child(self, folder: ExperimentFolder, parent: str | None, tags: dict[str, str], seen: str | None) -> Any:
        """Return a new run, or the one that another launch made since this one saw the run's id as `seen`."""
        experiment = self._client.get_run(parent).info.experiment_id if parent else self._experiment
        new = {_NOTE: f"`{folder.id}`: `bwlm runs show {folder.id}` prints all that is known of it."}
        name = run_name(folder.config())
        with exclusive(folder.path / _LOCK):  # two launches of a grid deliver the same cells
            made = read_note(folder.path).get("run_id")
            if made is not None and made != seen:
                return self._client.get_run(made)
            return self._make_run(folder.path, name, tags | new | provenance(), experiment, began(folder.path))

    def resumed(self, folder: ExperimentFolder, step: int) -> None:
        """Note that a run which had begun resumes from the checkpoint of a step; 0 if it begins again."""
        write_note(folder.path, resumed=[*read_note(folder.path).get("resumed", []), step])

    def run_of(self, folder: ExperimentFolder) -> str | None:
        """Return the run of an experiment; makes it if it is expected. None if this store does not have it."""
        if (expected := self._expected.get(folder.id)) is not None:
            return self.child_run(folder, *expected)
        known = self._known_run(folder.path)
        return str(known.info.run_id) if known else None

    def _describe(self, run: Any, folder: ExperimentFolder, dataset: Mapping[str, str]) -> None:
        """Write what a new run needs before its first metrics. A launch that is cut off here leaves it to the next."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run_id = run.info.run_id
        params = [Param(name, str(value)) for name, value in sorted(folder.config().identity.items())]
        source = json.dumps({"uri": dataset["source"]})
        entity = Dataset(dataset["name"], dataset["digest"][:_LONGEST_DIGEST], "local", source)
        self._client.update_run(run_id, status="SCHEDULED")
        self._client.log_batch(run_id, params=params, tags=[RunTag("bwlm.state", "waiting")])
        if not (run.inputs and run.inputs.dataset_inputs):
            self._client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])
        self._client.log_artifact(run_id, str(folder.path / "config.json"))

    def deliver(self, folder: ExperimentFolder) -> int:
        """Send the journal's new entries and the new scores on tasks, and return how many metrics.

        Nothing is lost if the server is away.
        """
        states = delivered_states(folder.path)
        if self._delivered.get(folder.id) == states or not self._has_run(folder):
            return 0
        sent = self._deliver(folder)
        self._delivered[folder.id] = states
        return sent

    def _deliver(self, folder: ExperimentFolder) -> int:
        run, delivered = self._settle(folder.path)
        new = [entry for entry in entries_after(folder.path, delivered) if entry.metrics]
        if new and read_note(folder.path).get("status") != "RUNNING":
            self._client.update_run(run, status="RUNNING")
            self._tag_divergence(folder.path, run, None)
            write_note(folder.path, status="RUNNING", closed=None)
        count = 0
        for entries in _batches(new):
            sent = points(entries, for_mlflow)
            step, name = entries[-1].step, next(iter(for_mlflow(entries[-1].metrics)))
            write_note(folder.path, pending={"step": step, "metric": name})
            self._client.log_batch(run, metrics=sent)
            write_note(folder.path, delivered_step=step, pending=None)
            count += len(sent)
        return count + send_scores(self._client, folder, run)

    def _has_run(self, folder: ExperimentFolder, ended: bool = False) -> bool:
        """Return whether a run has its MLflow run; makes it if it is expected and has trained a step or ended."""
        run, expected = read_note(folder.path).get("run_id"), self._expected.get(folder.id)
        if run is not None and (expected is None or is_enlisted(folder.path)):
            return True
        if expected is None or not (ended or last_entry(folder.path)):
            return False
        self._child_run(folder, *expected, known=self._client.get_run(run) if run else None, seen=run)
        return True

    def try_deliver(self, folder: ExperimentFolder) -> bool:
        """Call `deliver`; a server that is away is a warning, and the next call sends what this one could not.

        Returns whether it was delivered.
        """
        return self._attempt(lambda: self.deliver(folder), folder.path)

    def close_child(self, folder: ExperimentFolder, status: Status, artifacts: list[Path]) -> bool:
        """Deliver the rest, attach artifacts, set the run's final state. Warns and returns False if the server is away.

        The first failure is this launch's last attempt: the next launch makes up for all of them.
        """
        if is_closed(folder, status):
            return True
        return self._attempt_end(lambda: self._close_child(folder, status, artifacts))

    def _close_child(self, folder: ExperimentFolder, status: Status, artifacts: list[Path]) -> None:
        if not self._has_run(folder, ended=True):
            return
        self.deliver(folder)
        run, last = read_note(folder.path)["run_id"], last_entry(folder.path)
        if last and status.diverged is None:
            # with the entry's time stamp, so that MLflow drops them where they were sent before
            final = Entry(last.step, last.time, status.metrics)
            self._client.log_batch(run, metrics=points([final], final_for_mlflow))
        ending = {"bwlm.state": status.state, "bwlm.reason": status.reason}
        self._set_tags(run, ending | checkpoint_tag(folder) | start_tags(folder))
        self._tag_divergence(folder.path, run, status.diverged)
        shown = _STATES.get(status.state, "KILLED")
        self._close(run, artifacts, shown, last.time if last else None)
        write_note(folder.path, status=shown, closed=asdict(status), results=scores_digest(folder))

    def _set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags; an empty value removes the tag of an earlier end."""
        present = self._client.get_run(run).data.tags
        for name, value in tags.items():
            if value:
                self._client.set_tag(run, name, value)
            elif name in present:
                self._client.delete_tag(run, name)

    def _tag_divergence(self, folder: Path, run: str, step: int | None) -> None:
        """Mark a diverged run, so that a search finds it; remove the mark when the run is tried again."""
        if step is not None:
            self._client.set_tag(run, _DIVERGED, f"step {step}")
        elif read_note(folder).get("diverged") is not None:
            self._client.delete_tag(run, _DIVERGED)
        write_note(folder, diverged=step)

    def close_parent(self, grid_folder: Path, artifacts: list[Path], complete: bool, result: GridResult) -> bool:
        """Attach report and verdict, set the grid's final state. Warns and returns False if the server is away."""
        return self._attempt_end(lambda: self._close_parent(grid_folder, artifacts, complete, result))

    def _close_parent(self, grid_folder: Path, artifacts: list[Path], complete: bool, result: GridResult) -> None:
        run = self._client.get_run(read_note(grid_folder)["run_id"])
        run_id, before = run.info.run_id, run.data.metrics
        changed = {name: value for name, value in result.metrics.items() if before.get(name) != value}
        now = Entry(0, time.time_ns() // 1_000_000, changed)
        self._client.log_batch(run_id, metrics=points([now], dict))
        self._client.set_tag(run_id, "bwlm.verdict", shortened(result.verdict))
        text, written = shortened(result.text), read_note(grid_folder).get("description")
        if run.data.tags.get(_NOTE, "") in ("", written):  # else a person wrote there
            self._client.set_tag(run_id, _NOTE, text)
            write_note(grid_folder, description=text)
        self._close(run_id, artifacts, "FINISHED" if complete else "KILLED")

    def interrupted(self, folders: list[ExperimentFolder], parent: str) -> None:
        """Mark the grid and the runs that had begun as killed, so that none seems to go on. Warns if that fails."""
        try:
            self._attempt_end(lambda: self._kill(folders, parent))
        except Exception as error:  # a damaged file, a driver's own error: the user has asked for the end
            log.warning("tracking: not every run is marked as killed (%s)", error)

    def _kill(self, folders: list[ExperimentFolder], parent: str) -> None:
        self._client.set_terminated(parent, "KILLED")
        for folder in folders:
            noted = read_note(folder.path)
            # an earlier version noted no status, and its runs were RUNNING from the beginning
            if noted.get("delivered_step", 0) > 0 and noted.get("status", "RUNNING") == "RUNNING":
                # a run that has ended was not killed, also if its end is not delivered yet
                shown = _STATES.get(folder.status().state, "KILLED")
                self._client.set_terminated(noted["run_id"], shown, ended(folder.path))
                write_note(folder.path, status=shown)

    def monitor_system(self, run: str) -> Any:
        """Start to log CPU, memory, disk, network and GPU of this machine as system metrics of a run.

        Returns the monitor; the caller calls its `finish`.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run, tracking_uri=self.uri, sampling_interval=10)
        monitor.start()
        return monitor

    def _make_run(
        self, folder: Path, name: str, tags: dict[str, str], experiment: str | None = None, start: int | None = None
    ) -> Any:
        """Return a new run, or the run that a launch made here before it was cut off.

        The mark identifies it, not the names: another storage, or an emptied one, may use the same names.
        """
        noted, found, home = read_note(folder), None, experiment or self._experiment
        mark = noted.get("mark") if noted.get("run_id") is None else None
        if mark is not None:
            found = next(iter(self._client.search_runs([home], f"tags.`{_MARK}` = '{mark}'")), None)
        else:
            mark = uuid.uuid4().hex
            write_json(folder / "mlflow.json", {"run_id": None, "mark": mark, "resumed": noted.get("resumed", [])})
            push(folder)  # before the run is made: a launch on another machine looks for its mark
        with sent_once():  # the server may have made it, and the next call looks for its mark
            run = found or self._client.create_run(home, start, tags | {_MARK: mark}, name)
        there = last_step(run)  # of a run that is found, another machine may have delivered steps
        new = {"delivered_step": there, "pending": None, "enlisted": False, "names": NAMES, "store": self._store}
        write_note(folder, run_id=run.info.run_id, **new)
        return run

    def _close(self, run: str, artifacts: list[Path], state: str, end: int | None = None) -> None:
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(run, str(path), path.name)
            else:
                self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, state, end)

    def _attempt(self, action: Callable[[], object], folder: Path) -> bool:
        try:
            action()
        except self._failures as error:
            log.warning("%s; the record waits in %s", self._no_answer(error), folder)
            return False
        return True

    def _attempt_end(self, action: Callable[[], object]) -> bool:
        if self._away:
            return False
        try:
            action()
        except self._failures as error:
            self._away = True
            wait = f"the metrics wait in {self._storage}, and the same command delivers them"
            log.warning("%s; %s", self._no_answer(error), wait)
            return False
        return True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Raise `UserError` if the store does not answer calls without which a launch cannot begin."""
        try:
            yield
        except self._failures as error:
            raise self._user_error(error) from None

    def _user_error(self, error: Exception) -> UserError:
        ours = self.uri.startswith("sqlite:")
        if mend := refusal(error, masked(self.uri)):
            return UserError(f"tracking: {masked(self.uri)} {mend}")
        fix = "check its folder, or set MLFLOW_TRACKING_URI" if ours else "start it, or unset MLFLOW_TRACKING_URI"
        return UserError(f"{self._no_answer(error)}: {fix}")

    def _no_answer(self, error: Exception) -> str:
        if isinstance(error, BucketAway):
            return str(error)
        return f"tracking: {masked(self.uri)} does not answer ({reason(error)})"

    def _known_run(self, folder: Path) -> Any:
        """Return the run that an earlier launch made for this folder; None if this store does not have it."""
        from mlflow.exceptions import MlflowException

        run_id = read_note(folder).get("run_id")
        if run_id is None:
            return None
        with self._answering():
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        if run.info.lifecycle_stage == "active":
            return run
        restore = f"MLFLOW_TRACKING_URI='{masked(self.uri)}' mlflow runs restore --run-id {run_id}"
        log.warning("tracking: the run of %s is deleted: a new one takes its place; the old one: %s", folder, restore)
        return None

    def _settle(self, folder: Path) -> tuple[str, int]:
        """Return the run and the last step that it has; ask the store for what was sent without an answer."""
        state = read_json(folder / "mlflow.json")
        run, delivered, pending = str(state["run_id"]), int(state["delivered_step"]), state["pending"]
        if pending is not None:
            arrived = self._client.get_metric_history(run, pending["metric"])
            if any(point.step == pending["step"] for point in arrived):
                delivered = pending["step"]
            write_note(folder, delivered_step=delivered, pending=None)
        return run, delivered


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Yield whole entries, as many as one call takes."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and sum(len(e.metrics) for e in batch) + len(entry.metrics) > _METRICS_PER_CALL:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch
