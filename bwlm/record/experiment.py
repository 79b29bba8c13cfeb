"""Experiment folder: a run's config, link to its parent, status, and lease.

`lease.py` says how the lease keeps two processes apart.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from bwlm.errors import UserError, nearest
from bwlm.paths import FileState, atomic_folder, check_id, discard_unfinished, file_state, is_id, read_json, write_json
from bwlm.phases import PHASES
from bwlm.record.checkpoint_name import CheckpointName, run_of
from bwlm.record.config_file import TOKENIZER, config_content, read_config, write_config
from bwlm.record.health import DIGEST, RECORDS, check_seal, damage, records_of, sealed
from bwlm.record.journal import last_entry
from bwlm.record.lease import (
    LEASE_SECONDS,
    Holder,
    Lease,
    last_holder,
    living_holder,
    present_holder,
    take,
    take_at_once,
)
from bwlm.record.lineage import LINK, ParentLink, read_link, write_link
from bwlm.record.run_config import RunConfig
from bwlm.record.starts import STARTS
from bwlm.storage.keeper import kept_in_bucket

Records = dict[str, dict[str, Any]]
"""Sizes and hashes of a finished run's records, by their paths in its folder."""
State = Literal["waiting", "running", "finished", "stopped", "failed"]
LEASE = "lease.json"
"""File of the lease of the worker that trains the run."""
LAUNCH = "launch.json"
"""File of the lease of the command that launched the training."""
WORKER = "worker.json"
"""File that names the worker which trains the run, or trained it last, and the worker's log on its machine."""
SAMPLES = "samples"
"""Folder of samples that RL writes at validations, for people to read."""
_WRITTEN = (
    *("status.json", WORKER, STARTS, "metrics.jsonl", "*.h5", "*.h5.tail", "checkpoints/step_*", "evaluations/*/*/*"),
    *(f"{SAMPLES}/*", TOKENIZER),
)
"""Files that the holder of the lease writes under a temporary name first."""
_STATUS_MEND = "write {} into it, and the same command resumes the run from its last checkpoint"
_PACKAGES = ("bwlm", "torch", "ray", "mlflow", "tiktoken", "numpy", "pyarrow")


@dataclass(frozen=True)
class Status:
    """Content of status.json: how a run ended, or that it has not."""

    state: State = "waiting"
    reason: str = ""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures that were measured last, all finite."""
    diverged: int | None = None
    """Step whose loss was not finite any more; None for a run that did not diverge."""

    @property
    def ended(self) -> bool:
        """True if the run has an end; a run that was only interrupted resumes."""
        return self.state in ("finished", "failed") or (self.state == "stopped" and bool(self.reason))


class ExperimentFolder:
    """Folder of a run, `<storage>/<experiment id>/`."""

    def __init__(self, storage: Path, experiment_id: str) -> None:
        self.id = check_id(experiment_id, "experiment id")
        self.path = storage / experiment_id
        self.held: Lease | None = None
        """Lease, while this process holds it by `lease`."""

    def __fspath__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Return whether the run has its config.json, which is written last when a run is made."""
        return (self.path / "config.json").exists()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def research_log(self, phase: str) -> Path:
        """Return the path of a phase's research log."""
        return self.path / f"{phase}.h5"

    def evaluation(self, phase: str, reading: str) -> Path:
        """Return the folder of a phase's evaluations in one reading."""
        return self.path / "evaluations" / phase / reading

    def create(self, config: RunConfig, link: ParentLink | None = None) -> None:
        """Make the folder of a run; config.json comes last, since it says that the experiment exists."""
        assert (link is None) == PHASES[config.experiment.phase].is_first
        self.path.mkdir(parents=True, exist_ok=True)
        write_link(self.path, link)
        self.write_status(Status())
        versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        write_config(self.path, config, {"versions": versions, "created": time.time()})

    def reconfigure(self, config: RunConfig) -> None:
        """Replace the settings that say where, how fast and by which code the run goes on; its identity stays."""
        before = config_content(self.path)
        assert config.identity | {"code": ""} == before["identity"] | {"code": ""}, "another run's settings"
        write_config(self.path, config, {name: before[name] for name in ("versions", "created")})

    def keep_tokenizer(self, tokenizer: Path) -> None:
        """Copy a tokenizer into the run's folder, which then needs no other. A run that has its own keeps it."""
        own = self.path / TOKENIZER
        if not self.exists():  # left by a launch that was cut off, which may have asked for another tokenizer
            shutil.rmtree(own, ignore_errors=True)
        if not own.exists():
            with atomic_folder(own) as folder:
                for file in tokenizer.iterdir():
                    shutil.copyfile(file, folder / file.name)

    def config(self) -> RunConfig:
        """Return the run's config.

        Raises `UserError` naming the file if it is not an experiment's, was edited, or is of another version of bwlm.
        """
        return read_config(self.path)

    def link(self) -> ParentLink | None:
        """Return the link to the parent; None for a base run. Raises `UserError` if the file holds something else."""
        return read_link(self.path)

    def parent(self) -> str | None:
        """Return the id of the parent; None for a base run."""
        link = self.link()
        return link.parent if link else None

    def write_status(self, status: Status) -> None:
        """Write status.json. Raises `LeaseLost` if this process held the lease and lost it."""
        self._write_status(asdict(status))

    def finish(self, status: Status) -> None:
        """Note that the run has finished and which records it leaves, so that later damage shows.

        Raises as `write_status`.
        """
        assert status.state == "finished"
        self._write_status(asdict(status) | {RECORDS: records_of(self.path, status.step)})

    def forget_record(self, name: str) -> None:
        """Note that a finished run no longer has a file that it left, so that its absence is no damage."""
        status, records = self._read_status()
        if name in records:
            left = {other: record for other, record in records.items() if other != name}
            self._write_status(asdict(status) | {RECORDS: left})

    def _write_status(self, content: dict[str, Any]) -> None:
        try:
            write_json(self.path / "status.json", sealed(content), self.check_lease)
        except OSError:
            self.check_lease()  # a process that took the lease may have deleted the temporary file
            raise

    def status(self) -> Status:
        """Return how the run ended, or else its present state, step and metrics.

        A run that has not ended is `running` while a process holds its lease; else it is `stopped` if it had begun,
        and `waiting` if it had not. Raises `UserError` if status.json is gone, holds something else, or was edited.
        """
        status = self._noted_status()
        if status.ended:
            return status
        entry = last_entry(self.path)
        step, metrics = (entry.step, entry.metrics) if entry else (0, {})
        if validated := last_entry(self.path, "val_bpb"):
            figures = {name: value for name, value in validated.metrics.items() if name.startswith("val_")}
            metrics = figures | metrics
        if self.lease_holder() is not None:
            return Status("running", "", step, metrics)
        if entry is None:
            return Status()
        return Status("stopped", "", step, metrics)

    def _noted_status(self) -> Status:
        """Return the content of status.json, without the records. Raises as `status`."""
        return self._read_status()[0]

    def _read_status(self) -> tuple[Status, Records]:
        path = f"{self.path}/status.json"
        try:
            state = file_state(path)
        except OSError:
            raise UserError(f"{path}: no such file: {_STATUS_MEND}") from None
        return _read_status(state)

    def records_left(self) -> Records:
        """Return the sizes and hashes that the run noted when it finished; empty before, and for earlier versions."""
        return self._read_status()[1]

    def damage(self, thorough: bool = True) -> list[str]:
        """Return the faults of the run's records, a line each.

        Raises `UserError` if its config or status cannot be trusted.
        """
        return damage(self, self.config(), self.status(), thorough)

    @property
    def warnings(self) -> Path:
        """File of the worker's warnings, which the launch prints."""
        return self.path / "warnings.log"

    # -- the lease: one writer at a time --

    @contextmanager
    def lease(
        self,
        wait: float = 0.5,
        give_up: Callable[[], bool] = lambda: False,
        seconds: float = LEASE_SECONDS,
        trains: bool = True,
    ) -> Iterator[None]:
        """Hold the run for this process while the block runs; wait while another process trains it.

        The wait ends when the other process has released the lease, is dead, or is frozen. Raises `Interrupted` if
        `give_up` becomes true during the wait. A failed run that is free is tried again, so its status is reset; if
        the run was waited for, or is not to be trained (`trains`), its status stands. In a bucket the folder is brought
        up to date first, and pushed during the block and at its end: raises `RunError` if that cannot be, and
        `LeaseLost` if another machine has taken the run. There only a block that `trains` begins an attempt.
        """
        self.held, waited = take(self.path / LEASE, seconds, wait, give_up)
        try:
            with kept_in_bucket(self.path, self.held.claim, trains):
                discard_unfinished(
                    self.path, _WRITTEN
                )  # before anything is read: a holder that wakes could rename them
                if trains and not waited and self.exists() and self._noted_status().state == "failed":
                    self.write_status(Status())
                yield
            if self.held.claim is not None:
                self.held.check()  # the bucket may have refused the last push
        finally:
            self.held.release()
            self.held = None

    def check_lease(self) -> None:
        """Raise `LeaseLost`, naming the taker, if this process held the lease by `lease` and lost it."""
        if self.held is not None:
            self.held.check()

    @property
    def lost_lease(self) -> bool:
        """True once `check_lease` has raised."""
        return self.held is not None and self.held.lost

    def wait_until_free(self, give_up: Callable[[], bool], wait: float = 0.5) -> None:
        """Wait until no process holds the lease, or until `give_up` becomes true."""
        while self.lease_holder() is not None and not give_up():
            time.sleep(wait)

    def lease_holder(self) -> str | None:
        """Return `host:pid` of the process that trains this run now; None if there is none, or if it is frozen."""
        holder = living_holder(self.path / LEASE)
        return str(holder) if holder else None

    def frozen_holder(self) -> str | None:
        """Return `host:pid` of the process that holds the lease and has shown no sign of life for as long as it lasts.

        Returns None if the holder lives, or if nobody holds the lease.
        """
        holder, is_silent = present_holder(self.path / LEASE) or (None, False)
        return str(holder) if is_silent else None

    def last_host(self) -> str:
        """Return the name of the machine that trained this run last; `?` if none has."""
        return last_holder(self.path / LEASE).host

    def busy_with(self) -> Holder | None:
        """Return the process that launched this run's training, or if that is gone the worker that trains it."""
        return living_holder(self.path / LAUNCH) or living_holder(self.path / LEASE)

    @contextmanager
    def only_launch(self) -> Iterator[None]:
        """Hold the run for its one launch while the block runs.

        Raises `UserError` if another launch trains the run, and leaves nothing behind then.
        """
        if holder := self.busy_with():
            raise self._is_trained_by(holder)
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        taken = take_at_once(self.path / LAUNCH)
        if isinstance(taken, Holder):
            raise self._is_trained_by(taken)
        try:
            yield
        finally:
            if taken.is_held():
                (self.path / LAUNCH).unlink()
            taken.release()
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: it holds a run
                    folder.rmdir()

    def _is_trained_by(self, holder: Holder) -> UserError:
        return UserError(
            f"{self.id}: {holder} trains it {holder.since_words}: wait for it, or end that process first; another "
            "experiment needs another --id"
        )


@lru_cache(maxsize=10_000)
def _read_status(state: FileState) -> tuple[Status, Records]:
    """Return the status and the records that a status.json notes. Raises as `ExperimentFolder.status`."""
    path = Path(state.path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the status of a run: {_STATUS_MEND}")
    check_seal(path, content, _STATUS_MEND)
    try:
        status = Status(**{name: value for name, value in content.items() if name not in (DIGEST, RECORDS)})
    except TypeError:
        raise UserError(f"{path}: not the status of a run: {_STATUS_MEND}") from None
    return status, content.get(RECORDS, {})


def list_experiments(storage: Path) -> list[ExperimentFolder]:
    """Return every experiment below a storage root, by id."""
    if not storage.is_dir():
        return []
    return [ExperimentFolder(storage, path.name) for path in sorted(storage.iterdir()) if _is_experiment(path)]


def list_starting(storage: Path) -> list[str]:
    """Return the ids of experiments whose launch still prepares their text, so that they have no config yet."""
    if not storage.is_dir():
        return []
    folders = [path for path in sorted(storage.iterdir()) if is_id(path.name) and (path / LAUNCH).exists()]
    return [p.name for p in folders if not _is_experiment(p) and ExperimentFolder(storage, p.name).busy_with()]


def _is_experiment(path: Path) -> bool:
    """Return whether a folder is a run's, also if its config or status is gone: its reader then names the file.

    Folders of other tools have a config.json too, and a launch that was cut off leaves everything but the config.
    """
    if not is_id(path.name) or not path.is_dir():
        return False
    if (path / "config.json").exists():
        return (path / "status.json").exists() or (path / LINK).exists()
    return (path / LINK).exists() and (path / "checkpoints").exists()


def parents_in(storage: Path) -> dict[str, str | None]:
    """Return the parent of every run below a storage root; None for a run without one.

    The link says it, or if the link is damaged the run's settings, so that a child is never taken for a base run.
    """
    return {folder.id: _parent_of(folder) for folder in list_experiments(storage)}


def _parent_of(folder: ExperimentFolder) -> str | None:
    for read in (folder.parent, lambda: run_of(folder.config().experiment.parent)):
        with contextlib.suppress(UserError):
            return read()
    return None


def open_experiment(storage: Path, experiment_id: str) -> ExperimentFolder:
    """Return the folder of an experiment. Raises `UserError` naming the nearest ids if there is no such experiment."""
    folder = ExperimentFolder(storage, experiment_id)
    if not folder.exists() and not _is_experiment(folder.path):
        if holder := folder.busy_with():
            raise UserError(f"{experiment_id}: {holder} starts it {holder.since_words}: wait until it trains")
        known = [other.id for other in list_experiments(storage)]
        raise UserError(
            f"{experiment_id}: no such experiment in {storage}{nearest(experiment_id, known)}; see: bwlm runs list"
        )
    return folder


def find_checkpoint(storage: Path, text: str) -> tuple[ExperimentFolder, int]:
    """Return the run and the step of a checkpoint's name. Raises `UserError` if there is no such run or checkpoint."""
    name = CheckpointName.parse(text)
    folder = open_experiment(storage, name.run)
    return folder, name.step_in(folder)


def open_finished(storage: Path, parent: str) -> ExperimentFolder:
    """Return a run that others can begin from. Raises `UserError` if there is no such run or it has not finished."""
    folder = open_experiment(storage, parent)
    state = folder.status().state
    if state != "finished":
        raise UserError(f"parent: {parent} is {state}, not finished: finish it first, or choose another parent")
    return folder
