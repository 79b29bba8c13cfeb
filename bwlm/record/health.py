"""Faults of a run's records: files that were edited, cut off or deleted since the run wrote them.

`config.json` and `status.json` hold a digest of their own content. A run that finishes notes in `status.json` the
size of each record that it leaves, and the SHA-256 of all but the checkpoint. Runs of earlier versions have neither,
and are checked as far as is possible without. Whether a run may go on is decided in `experiment`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlm.errors import RunError, UserError
from bwlm.paths import FileState, file_state, sha256_of
from bwlm.progress import track
from bwlm.record.checkpoint import META, MODEL, step_folder, weights_digest
from bwlm.record.checkpoint_name import BEST, run_of
from bwlm.record.fingerprint import fingerprint
from bwlm.record.journal import NAME, faults_of_order, last_entry
from bwlm.record.known_files import finding, kept_findings, sha256_by_state
from bwlm.record.lineage import LINK
from bwlm.storage.opened import size_of

if TYPE_CHECKING:
    from bwlm.record.experiment import ExperimentFolder, Status
    from bwlm.record.lineage import ParentLink
    from bwlm.record.run_config import RunConfig

DIGEST = "digest"
RECORDS = "records"
_HASHED = (NAME, "evaluations/*/*/validation.parquet", "evaluations/*/*/validation.json")
"""Records that analyses read whole anyway, so that hashing them costs little beside it."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file with the digest of all its other fields."""
    return {**content, DIGEST: _digest(content)}


def check_seal(path: Path, content: Mapping[str, Any], mend: str) -> None:
    """Raise `UserError` with the fix if the file has a digest that is not the digest of its content."""
    if DIGEST in content and content[DIGEST] != _digest(content):
        raise UserError(f"{path}: edited by hand (its digest differs): {mend}")


def check_agrees(path: Path, content: Mapping[str, Any], mend: str) -> None:
    """Raise `UserError` naming the field if a config.json without a digest contradicts itself.

    Its fingerprint must be the fingerprint of its identity, and its settings must agree with its identity.
    """
    identity = content["identity"]
    if fingerprint(identity) != content["fingerprint"]:
        raise UserError(f"{path}: edited by hand (its fingerprint is not that of its identity): {mend}")
    for name, value in _flat(content["experiment"]):
        if name in identity and identity[name] != value:
            raise UserError(
                f"{path}: edited by hand (experiment.{name} is {value}, and {identity[name]} in its identity): {mend}"
            )


def records_of(folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Return each record of a finished run by its path in the folder: `bytes`, and `sha256` but for checkpoints."""
    last = step_folder(folder / "checkpoints", steps)
    hashed = [path for pattern in _HASHED for path in sorted(folder.glob(pattern))]
    hashed += sorted(folder.glob("*.h5"))
    sized = [path for path in (last / META, last / MODEL) if path.exists()]
    records = {path: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in hashed}
    records |= {path: {"bytes": path.stat().st_size} for path in sized}
    return {str(path.relative_to(folder)): record for path, record in records.items()}


def damage(folder: ExperimentFolder, config: RunConfig, status: Status, thorough: bool = True) -> list[str]:
    """Return the faults of a run's records, a line each; none for a run that is whole.

    Without `thorough` only file names, sizes and the end of the journal are checked, so that many runs are listed at
    once. A torn last line of the journal is no fault of a run that has not ended: it was killed, and resumes before
    that line.
    """
    records = folder.records_left()
    faults = list(_changed(folder.path, records, thorough))
    faults += _link_faults(folder.link(), config)
    if NAME not in records:
        faults += _journal_faults(folder.path, status, thorough)
    log = folder.research_log(config.experiment.phase)
    if thorough and status.ended and log.exists() and log.name not in {line.partition(":")[0] for line in faults}:
        every = config.experiment.research_log.scalars
        due = status.step - status.step % every if every and status.state == "finished" else 0
        faults += _log_faults(log, due)
    return faults


def _link_faults(link: ParentLink | None, config: RunConfig) -> Iterator[str]:
    """Yield how a link to a parent contradicts the settings of its run, whose digest shows that they are whole."""
    named = {name: getattr(link, name, None) for name in ("parent", "sha256")} | {"best": bool(link and link.best)}
    known = {
        "parent": run_of(config.experiment.parent),
        "sha256": config.identity.get("parent"),
        "best": config.identity.get("parent_checkpoint") == BEST,
    }
    for name, value in named.items():
        if value != known[name]:
            yield f"{LINK}: edited by hand ({name} is {value}, and {known[name]} in config.json)"


def check_log(folder: ExperimentFolder, path: Path) -> None:
    """Raise `UserError` if a finished run's research log is not what it left; reads it whole, once a process."""
    left = folder.records_left().get(path.name, {})
    if "sha256" in left and path.exists() and sha256_by_state(file_state(path)) != left["sha256"]:
        raise UserError(f"{path}: edited since the run finished (its SHA-256 differs): put the file back")


def damage_of_weights(folder: ExperimentFolder, config: RunConfig, status: Status) -> list[str]:
    """Return the fault of a finished run's last weights, which are read whole for it."""
    if status.state != "finished" or not (step_folder(folder.checkpoints, config.steps) / MODEL).exists():
        return []  # if the run had weights, `damage` has named them; or they are in a bucket, and checked when fetched
    try:
        weights_digest(folder.checkpoints, config.steps)
    except RunError as error:
        return [str(error).removeprefix(f"{folder.path}/")]
    return []


def _changed(folder: Path, records: Mapping[str, Mapping[str, Any]], thorough: bool) -> Iterator[str]:
    for name, left in records.items():
        path = folder / name
        if (size := size_of(path)) is None:
            yield f"{name}: gone"
            continue
        is_hashed = thorough and "sha256" in left and not name.endswith(".h5")
        if size != left["bytes"]:
            yield f"{name}: {size:,} bytes, and {left['bytes']:,} when the run finished"
        elif is_hashed and sha256_by_state(file_state(f"{path}")) != left["sha256"]:
            yield f"{name}: edited since the run finished (its SHA-256 differs)"


def _journal_faults(folder: Path, status: Status, thorough: bool) -> Iterator[str]:
    if (folder / NAME).exists():
        yield from (f"{NAME}: {fault}" for fault in _order_faults(file_state(folder / NAME), thorough))
    last = last_entry(folder)
    if status.ended and last and (last.step < status.step or (status.state == "finished" and last.step > status.step)):
        yield f"{NAME}: ends at step {last.step:,}, and the run {status.state} at step {status.step:,}"


@lru_cache(maxsize=100_000)
def _order_faults(state: FileState, whole: bool) -> tuple[str, ...]:
    return tuple(faults_of_order(Path(state.path).parent, whole))


def _log_faults(log: Path, due: int) -> list[str]:
    """Return the faults of a research log that must reach a step."""

    def find(path: Path) -> str:
        from bwlm.record.researchlog import fault_of_log  # h5py, which a list of runs does without

        return "\n".join(fault_of_log(path, due))

    return finding(file_state(log), f"faults up to step {due}", find).splitlines()


def _digest(content: Mapping[str, Any]) -> str:
    return fingerprint({name: value for name, value in content.items() if name != DIGEST})


def _flat(experiment: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield settings under the names that an identity gives them."""
    for name, value in experiment.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", value[inner]) for inner in value)
        else:
            yield name, value


def readable(folders: Iterable[ExperimentFolder], damaged: bool = False) -> tuple[list[ExperimentFolder], list[str]]:
    """Return the experiments whose records can be read and are whole, and a line on each other: why it is left out.

    No damaged run must hide the rest. With `damaged` a run stays if its config, status and link can be trusted; its
    faults are named all the same, as far as a check that reads little finds them.
    """
    whole, reasons, every = [], [], list(folders)
    with kept_findings(every[0].path.parent) if every and not damaged else contextlib.nullcontext():
        for folder in track(every, "checking the records", "runs"):
            if not folder.path.exists():
                reasons.append(f"{folder.id} is left out: it has not begun")
                continue
            try:
                folder.link()
                faults = folder.damage(thorough=not damaged)
                if damaged or not faults:
                    whole.append(folder)
                if faults:
                    reasons.append(damage_words(folder, faults, left_out=not damaged))
            except UserError as error:
                reasons.append(f"{folder.id} is left out: {error}")
    return whole, reasons


def damage_words(folder: ExperimentFolder, faults: list[str], left_out: bool = False) -> str:
    """Return the line that names a damaged run, its faults and the fix."""
    said = "is left out: it is damaged" if left_out else "is damaged"
    mend = f"put the files back, or delete the run: bwlm runs delete {folder.id}"
    return f"{folder.id} {said}: {'; '.join(faults)}: {mend}"
