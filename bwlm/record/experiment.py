"""The experiment folder: a run's config, link to its parent, status, and lease.

Not here: how the lease keeps two processes apart (`lease.py`).
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bwlm.config import Experiment
from bwlm.errors import UserError, nearest
from bwlm.model.compute import Compute
from bwlm.paths import atomic_folder, check_id, discard_unfinished, is_id, read_json, write_json
from bwlm.phases import PHASES
from bwlm.record.health import DIGEST, RECORDS, check_agrees, check_seal, damage, records_of, sealed
from bwlm.record.journal import last_entry
from bwlm.record.lease import LEASE_SECONDS, Holder, Lease, living_holder, take, take_at_once
from bwlm.record.lineage import LINK, ParentLink, read_link, write_link
from bwlm.record.run_config import RunConfig

State = Literal["waiting", "running", "finished", "stopped", "failed"]
LEASE = "lease.json"
"""The lease of the worker that trains the run."""
LAUNCH = "launch.json"
"""The lease of the command that launched the training."""
SAMPLES = "samples"
"""Folder of what was written at validations of RL, to be read."""
TOKENIZER = "tokenizer"
"""Folder of the run's own copy of its tokenizer."""
_WRITTEN = (
    *("status.json", "metrics.jsonl", "*.h5", "*.h5.tail", "checkpoints/step_*", "evaluations/*/*/*"),
    *(f"{SAMPLES}/*", TOKENIZER),
)
"""Files that the holder of the lease writes under a temporary name first."""
_SINCE_VERSION_2 = ("identity_version", "modules", "accepted_code")
"""Fields that a config.json of identity version 1 lacks."""
_CONFIG_MEND = "put back the file that the run was made with, or delete the run: bwlm runs delete {run}"
_STATUS_MEND = "write {} into it and the run goes on from its last checkpoint"
_PACKAGES = ("bwlm", "torch", "ray", "mlflow", "tiktoken", "numpy", "pyarrow")


@dataclass(frozen=True)
class Status:
    """Content of status.json: how a run ended, or that it has not."""

    state: State = "waiting"
    reason: str = ""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The last that were measured, all finite."""
    diverged: int | None = None
    """The step whose loss was not finite any more."""

    @property
    def ended(self) -> bool:
        """True if the run has an end; a run that was only interrupted resumes."""
        return self.state in ("finished", "failed") or (self.state == "stopped" and bool(self.reason))


class ExperimentFolder:
    """`<storage>/<experiment id>/`."""

    def __init__(self, storage: Path, experiment_id: str) -> None:
        self.id = check_id(experiment_id, "experiment id")
        self.path = storage / experiment_id
        self.held: Lease | None = None
        """The lease, while this process holds it by `lease`."""

    def __fspath__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def research_log(self, phase: str) -> Path:
        return self.path / f"{phase}.h5"

    def evaluation(self, phase: str, reading: str) -> Path:
        return self.path / "evaluations" / phase / reading

    def create(self, config: RunConfig, link: ParentLink | None = None) -> None:
        """Makes the folder of a run; config.json last, since it says that the experiment exists."""
        assert (link is None) == PHASES[config.experiment.phase].is_first
        self.path.mkdir(parents=True, exist_ok=True)
        write_link(self.path, link)
        self.write_status(Status())
        versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        self._write_config(config, {"versions": versions, "created": time.time()})

    def reconfigure(self, config: RunConfig) -> None:
        """Takes over settings that say where and how fast the run goes on, and by which code, not what it is."""
        before = self._read_config()
        assert config.identity | {"code": ""} == before["identity"] | {"code": ""}, "another run's settings"
        self._write_config(config, {name: before[name] for name in ("versions", "created")})

    def _write_config(self, config: RunConfig, besides: dict[str, Any]) -> None:
        content = asdict(config) | {"experiment": config.experiment.model_dump(), "fingerprint": config.fingerprint}
        own = self.path / TOKENIZER
        folders = {"corpus": Path(config.corpus), "tokenizer": own if own.exists() else Path(config.tokenizer)}
        told = {name: _from_storage(folder, self.path.parent) for name, folder in folders.items()}
        write_json(self.path / "config.json", sealed(content | told | besides))

    def _read_config(self) -> dict[str, Any]:
        """Raises `UserError` naming the file if it is not the config of an experiment, or was edited."""
        path, mend = self.path / "config.json", _CONFIG_MEND.format(run=self.id)
        if not path.exists():
            raise UserError(f"{path}: gone: {mend}")
        content = read_json(path)
        try:
            check_seal(path, content, mend)
            if DIGEST not in content:  # of an earlier version
                check_agrees(path, content, mend)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path}: not the config of an experiment; move it out of the storage") from None
        return dict(content)

    def keep_tokenizer(self, tokenizer: Path) -> None:
        """Copies a tokenizer into the run's folder, which then needs no other; a run that has its own keeps it."""
        own = self.path / TOKENIZER
        if not self.exists():  # left by a launch that was cut off, which may have asked for another tokenizer
            shutil.rmtree(own, ignore_errors=True)
        if not own.exists():
            with atomic_folder(own) as folder:
                for file in tokenizer.iterdir():
                    shutil.copyfile(file, folder / file.name)

    def config(self) -> RunConfig:
        """Raises `UserError` naming the file if it is not an experiment's, or one of another version of bwlm."""
        path, content = self.path / "config.json", self._read_config()
        try:
            known = {name: content[name] for name in RunConfig.__dataclass_fields__ if name not in _SINCE_VERSION_2}
            known |= {name: content[name] for name in _SINCE_VERSION_2 if name in content}
            # a run of before this setting read its documents in the order of their files
            data = {"shuffle": False} | content["experiment"]["data"]
            experiment = Experiment.model_validate(content["experiment"] | {"data": data})
            read = {"experiment": experiment, "compute": Compute(**content["compute"])}
            own = self.path / TOKENIZER
            folders = {
                "corpus": _in_storage(content["corpus"], self.path.parent),
                "tokenizer": str(own) if own.exists() else _in_storage(content["tokenizer"], self.path.parent),
            }
            return RunConfig(**known | read | folders)
        except (KeyError, TypeError):
            raise UserError(f"{path}: not the config of an experiment; move it out of the storage") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or first["msg"].removeprefix("Value error, ")
            raise UserError(f"{path}: not an experiment of this version of bwlm ({field})") from None

    def link(self) -> ParentLink | None:
        """None for a base run."""
        return read_link(self.path)

    def parent(self) -> str | None:
        link = self.link()
        return link.parent if link else None

    def write_status(self, status: Status) -> None:
        """Raises `LeaseLost` if this process held the lease and lost it."""
        self._write_status(asdict(status))

    def finish(self, status: Status) -> None:
        """Notes that a run has finished, and what it leaves behind, so that later damage is told. Raises as above."""
        assert status.state == "finished"
        self._write_status(asdict(status) | {RECORDS: records_of(self.path, status.step)})

    def _write_status(self, content: dict[str, Any]) -> None:
        try:
            write_json(self.path / "status.json", sealed(content), self.check_lease)
        except OSError:
            self.check_lease()  # who took it may have deleted what was half written
            raise

    def status(self) -> Status:
        """A run that holds no lease and did not end is `waiting`, or `stopped` if it had begun.

        Raises `UserError` for a file that says something else, or was edited.
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
        """Content of status.json. Raises as `status`."""
        content = self._read_status()
        try:
            return Status(**{name: value for name, value in content.items() if name not in (DIGEST, RECORDS)})
        except TypeError:
            raise UserError(f"{self.path / 'status.json'}: not the status of a run; {_STATUS_MEND}") from None

    def _read_status(self) -> dict[str, Any]:
        path = self.path / "status.json"
        if not path.exists():
            raise UserError(f"{path}: gone; {_STATUS_MEND}")
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not the status of a run; {_STATUS_MEND}")
        check_seal(path, content, _STATUS_MEND)
        return content

    def records_left(self) -> dict[str, dict[str, Any]]:
        """The sizes and hashes that the run noted when it finished; empty before, and for earlier versions."""
        return dict(self._read_status().get(RECORDS, {}))

    def damage(self, thorough: bool = True) -> list[str]:
        """Faults of the run's records, a line each. Raises `UserError` if its config or status cannot be trusted."""
        return damage(self, self.config(), self.status(), thorough)

    @property
    def warnings(self) -> Path:
        """The file of the worker's warnings, which the launch tells."""
        return self.path / "warnings.log"

    # -- the lease: one writer at a time --

    @contextmanager
    def lease(
        self, wait: float = 0.5, give_up: Callable[[], bool] = lambda: False, seconds: float = LEASE_SECONDS
    ) -> Iterator[None]:
        """Holds the run for this process; waits while another one trains it, until that one is dead or frozen.

        Raises `Interrupted` if it is told to `give_up` while it waits. A failed run that is free is tried again, so it
        has no end any more; how a run ended that was waited for stands.
        """
        self.held, waited = take(self.path / LEASE, seconds, wait, give_up)
        try:
            discard_unfinished(self.path, _WRITTEN)  # before anything is read: a holder that woke may yet finish it
            if not waited and self.exists() and self._noted_status().state == "failed":
                self.write_status(Status())
            yield
        finally:
            self.held.release()
            self.held = None

    def check_lease(self) -> None:
        """Raises `LeaseLost`, with who took it, if this process held the lease by `lease` and lost it."""
        if self.held is not None:
            self.held.check()

    @property
    def lost_lease(self) -> bool:
        """True once `check_lease` has raised."""
        return self.held is not None and self.held.lost

    def wait_until_free(self, give_up: Callable[[], bool], wait: float = 0.5) -> None:
        """Returns once no process holds the lease, or when told to give up."""
        while self.lease_holder() is not None and not give_up():
            time.sleep(wait)

    def lease_holder(self) -> str | None:
        """`host:pid` of the process that trains this run now, or None; one that is frozen does not."""
        holder = living_holder(self.path / LEASE)
        return str(holder) if holder else None

    def busy_with(self) -> Holder | None:
        """The process that has this run trained now, or where its launch is gone the worker that trains it."""
        return living_holder(self.path / LAUNCH) or living_holder(self.path / LEASE)

    @contextmanager
    def only_launch(self) -> Iterator[None]:
        """For the one launch of an experiment: raises `UserError` if another one trains it, and leaves nothing then."""
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
                with contextlib.suppress(OSError):  # not empty: there is a run
                    folder.rmdir()

    def _is_trained_by(self, holder: Holder) -> UserError:
        return UserError(
            f"{self.id}: {holder} trains it {holder.since_words}: wait for it, or end that process first; another "
            "experiment needs another --id"
        )


def _from_storage(folder: Path, storage: Path) -> str:
    """A path as files tell it: from the storage where it lies below it."""
    return folder.relative_to(storage).as_posix() if folder.is_relative_to(storage) else str(folder)


def _in_storage(told: str, storage: Path) -> str:
    """The path that a file tells; earlier versions told where the storage's cache was when the run was made."""
    path = Path(told)
    moved = storage.joinpath(*path.parts[-3:])
    if path.is_absolute() and path.parts[-3:-2] == ("cache",) and moved.exists():
        return str(moved)
    return str(storage / path)


def list_experiments(storage: Path) -> list[ExperimentFolder]:
    """Every experiment below a storage root, by id."""
    if not storage.is_dir():
        return []
    return [ExperimentFolder(storage, path.name) for path in sorted(storage.iterdir()) if _is_experiment(path)]


def _is_experiment(path: Path) -> bool:
    """True for a folder of a run, also where its config or status is gone: what reads it then names the file.

    Folders of others have a config.json too, and a launch that was cut off leaves all but the config.
    """
    if not is_id(path.name) or not path.is_dir():
        return False
    if (path / "config.json").exists():
        return (path / "status.json").exists() or (path / LINK).exists()
    return (path / LINK).exists() and (path / "checkpoints").exists()


def parents_in(storage: Path) -> dict[str, str | None]:
    """The parent of every run below a storage root, None for one that has none.

    By its link; where that is damaged, by its settings, so that nobody takes it for nobody's child.
    """
    return {folder.id: _parent_of(folder) for folder in list_experiments(storage)}


def _parent_of(folder: ExperimentFolder) -> str | None:
    for asked in (folder.parent, lambda: folder.config().experiment.parent):
        with contextlib.suppress(UserError):
            return asked()
    return None


def open_experiment(storage: Path, experiment_id: str) -> ExperimentFolder:
    """Raises `UserError` naming the nearest ids if there is no such experiment."""
    folder = ExperimentFolder(storage, experiment_id)
    if not folder.exists() and not _is_experiment(folder.path):
        known = [other.id for other in list_experiments(storage)]
        raise UserError(
            f"{experiment_id}: no such experiment in {storage}{nearest(experiment_id, known)}; see: bwlm runs list"
        )
    return folder


def open_finished(storage: Path, parent: str) -> ExperimentFolder:
    """A run that others can begin from. Raises `UserError` if there is no such run or it has not finished."""
    folder = open_experiment(storage, parent)
    state = folder.status().state
    if state != "finished":
        raise UserError(f"parent: {parent} is {state}, not finished: finish it first, or choose another parent")
    return folder
