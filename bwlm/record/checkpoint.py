"""Checkpoints: safetensors and JSON, written whole, verified by hash. Nothing of a checkpoint is ever unpickled.

step_000400/ model.safetensors optimizer.safetensors rng.safetensors meta.json (the run and step, the loop's progress,
the SHA-256 of each file, a checksum of itself)

meta.json is the commit mark: it is written last and deleted first, and a folder without it is not a checkpoint. The
folder gets its name when it is whole, and only then are older checkpoints deleted. One process writes to a folder of
checkpoints, any number may read. torch is imported only where tensors are handled, so that checkpoints are listed
without it. `saver.py` saves them while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError

from bwlm.errors import RunError, UserError
from bwlm.paths import Check, atomic_folder, read_json, sha256_of, sync, unchecked, write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Tensors: TypeAlias = "dict[str, torch.Tensor]"
MODEL, OPTIMIZER, RNG, META = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "meta.json"
FILES = (MODEL, OPTIMIZER, RNG)

_COMMITTED = re.compile(r"step_([0-9]{6,})|\.step_([0-9]{6,})\.replaced")
_OURS = re.compile(_COMMITTED.pattern + r"|\.step_[0-9]{6,}\.[0-9a-f]{8}\.tmp")
"""Names of checkpoint folders, and of folders that a killed save leaves."""


class DamagedCheckpoint(RunError):
    """File of a checkpoint that is gone, or differs from the file that was saved.

    A file that the disk cannot read now is another error: it may be readable tomorrow.
    """


@dataclass(frozen=True)
class Snapshot:
    """State that a run needs to resume from a step; its tensors are in host memory and do not change any more."""

    step: int
    model: Tensors
    optimizer: Tensors
    rng: Tensors
    """States of the random generators as bytes: `rank0/cpu`, `rank0/cuda`, `rank1/cpu`, .."""
    meta: dict[str, Any]
    """JSON: the fields that identify the checkpoint, and `progress`, the loop's own state."""
    metric: float | None = None
    """Validation figure of this very step, lower is better; None if there was no validation."""


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return contiguous copies on the CPU, also of tensors that are there: nothing else of a save holds up training."""
    import torch

    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def save_file(tensors: Tensors, path: Path) -> None:
    """Write tensors to a safetensors file."""
    from safetensors import torch as of_torch

    of_torch.save_file(tensors, path)


def load_file(path: Path) -> Tensors:
    """Return the tensors of a safetensors file, on the CPU."""
    from safetensors import torch as of_torch

    tensors: Tensors = of_torch.load_file(path)
    return tensors


# ---- which checkpoints stay ----


@dataclass(frozen=True)
class KeepPolicy:
    """Rules for which of a run's checkpoints are kept: the union of three."""

    last: int = 2
    """Number of the newest checkpoints."""
    best: bool = False
    """True to keep the checkpoint with the lowest metric."""
    every: int = 0
    """Interval of steps: checkpoints at its multiples are kept; 0: none."""

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise ValueError(f"last must be at least 1 and every not negative, not {self.last} and {self.every}")


def steps_to_keep(metrics: Mapping[int, float | None], policy: KeepPolicy) -> set[int]:
    """Return the steps to keep, of checkpoints given by step and metric; of equally good ones the earliest is best."""
    stay = set(sorted(metrics)[-policy.last :])
    if policy.every:
        stay |= {step for step in metrics if step % policy.every == 0}
    if policy.best:
        measured = [(figure, step) for step, figure in metrics.items() if figure is not None]
        stay |= {step for _, step in sorted(measured)[:1]}
    return stay


# ---- writing ----


def write_checkpoint(folder: Path, snapshot: Snapshot, keep: KeepPolicy, check: Check = unchecked) -> None:
    """Write a checkpoint durably, then delete the checkpoints that `keep` does not name.

    Later steps are deleted as well: they belong to a run that was cut off and has resumed before them. Raises
    `RunError` naming the file that cannot be written: then all earlier checkpoints stand, and nothing of this one.
    `check` is called before anything is renamed or deleted.
    """
    # first, since leftovers of a killed save may hold the space that this one needs
    _delete_all_but(_whole(folder).values(), folder, check)
    target = folder / f"step_{snapshot.step:06d}"
    files = dict(zip(FILES, (snapshot.model, snapshot.optimizer, snapshot.rng), strict=True))
    hashes: dict[str, str] = {}
    writing = target
    try:
        with atomic_folder(target) as temporary:
            for name, tensors in files.items():
                writing = target / name
                save_file(tensors, temporary / name)
                # safetensors makes files for their owner only, but a shared storage has readers
                (temporary / name).chmod(temporary.stat().st_mode & 0o666)
                hashes[name] = sha256_of(temporary / name)
            writing = target / META
            _write_meta(temporary / META, snapshot, hashes)
            writing = target
            check()
            _set_aside(target)
    except (OSError, SafetensorError) as error:
        raise RunError(_advice(writing, error, folder)) from None
    _prune(folder, snapshot.step, keep, check)


def _prune(folder: Path, newest: int, keep: KeepPolicy, check: Check) -> None:
    """Delete the checkpoints that `keep` does not name, except damaged ones: the disk may read them tomorrow."""
    known = {step: path for step, path in _whole(folder).items() if step <= newest}
    metrics: dict[int, float | None] = {}
    unread = set()
    for step, path in known.items():
        try:
            metrics[step] = _load_meta(path, step).get("metric")
        except RunError as error:
            log.warning("%s; it does not count among the checkpoints that are kept", error)
            unread.add(step)
    _delete_all_but([known[step] for step in steps_to_keep(metrics, keep) | unread], folder, check)


def _write_meta(path: Path, snapshot: Snapshot, hashes: dict[str, str]) -> None:
    figure = snapshot.metric if snapshot.metric is not None and math.isfinite(snapshot.metric) else None
    content = snapshot.meta | {"step": snapshot.step, "metric": figure, "sha256": hashes}
    content.pop("checksum", None)
    write_json(path, content | {"checksum": _checksum(content)})


def _set_aside(target: Path) -> None:
    """Rename the folder of a step that is saved again; until the new folder is there, the old one counts."""
    if target.exists():
        target.rename(target.with_name(f".{target.name}.replaced"))


def _advice(path: Path, error: Exception, folder: Path) -> str:
    steps = checkpoint_steps(folder)
    begin = f"from step {steps[-1]}" if steps else "from its beginning"
    reason = getattr(error, "strerror", None) or error
    mend = f"free space in {folder} or make it writable"
    return f"{path}: cannot be written ({reason}): {mend}; launched again, the run goes on {begin}"


def _delete_all_but(stay: Iterable[Path], folder: Path, check: Check) -> None:
    """Delete checkpoints and leftovers of saves, except `stay`; warn of a folder that cannot be deleted."""
    if not folder.exists():
        return
    staying = set(stay)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path not in staying and not path.is_symlink():
            check()
            try:
                (path / META).unlink(missing_ok=True)
                sync(path)  # else a power cut might bring meta.json back without the files that it names
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s: cannot be deleted (%s): delete it by hand", path, error.strerror)


# ---- reading ----


def _whole(folder: Path) -> dict[int, Path]:
    """Return the folder of each complete checkpoint by step, in order."""
    folders: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*/{META}")):  # `.step_..replaced` sorts first, so its replacement overrides it
        if match := _COMMITTED.fullmatch(path.parent.name):
            folders[int(match[1] or match[2])] = path.parent
    return dict(sorted(folders.items()))


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints, in order."""
    return list(_whole(folder))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder where the files of a step lie, or would lie."""
    return _whole(folder).get(step, folder / f"step_{step:06d}")


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's meta.json, without its tensors. Raises as `load_checkpoint`."""
    return _load_meta(step_folder(folder, step), step)


def check_fits(path: Path, meta: Mapping[str, Any], expected: Mapping[str, object]) -> None:
    """Raise `UserError` with the fields in which the checkpoint at `path` is not as `expected`."""
    other = [
        f"{name} is {meta.get(name)!r}, and {value!r} is needed"
        for name, value in expected.items()
        if meta.get(name) != value
    ]
    if other:
        raise UserError(f"{path}: another model's checkpoint ({'; '.join(other)}): move it out of that experiment")


def refuse_foreign(folder: Path, expected: Mapping[str, object]) -> None:
    """Raise `UserError` if any checkpoint here is another model's.

    Reads no tensors, so that it can be called before memory is taken.
    """
    for step, path in _whole(folder).items():
        try:
            meta = _load_meta(path, step)
        except RunError:
            continue  # loading it will raise this again
        check_fits(path, meta, expected)


def load_checkpoint(folder: Path, step: int) -> Snapshot:
    """Return the checkpoint of a step.

    Raises `DamagedCheckpoint` naming a file that is not what was saved, and `RunError` naming one that cannot be
    read.
    """
    path = step_folder(folder, step)
    meta = _load_meta(path, step)
    model, optimizer, rng = (_load_tensors(path / name, meta) for name in FILES)
    return Snapshot(step, model, optimizer, rng, meta, meta.get("metric"))


def load_weights(folder: Path, step: int) -> tuple[Tensors, dict[str, Any]]:
    """Return the model's tensors and meta.json, without reading the other files. Raises as `load_checkpoint`."""
    path = step_folder(folder, step)
    meta = _load_meta(path, step)
    return _load_tensors(path / MODEL, meta), meta


def weights_digest(folder: Path, step: int) -> str:
    """Return the SHA-256 of the model's file, in hex. Raises `DamagedCheckpoint` if it has changed."""
    path = step_folder(folder, step)
    meta = _load_meta(path, step)
    _verify(path / MODEL, meta)
    return str(meta["sha256"][MODEL])


def load_newest(folder: Path) -> Snapshot | None:
    """Return the newest whole checkpoint, with a warning for each newer one that is damaged; None without any.

    Raises `UserError` if none is whole, and `RunError` if one cannot be read: to pass over it for a moment's fault
    would cost the steps up to it. The caller checks before that the checkpoints are this run's (`refuse_foreign`).
    """
    steps = checkpoint_steps(folder)
    for step in reversed(steps):
        try:
            return load_checkpoint(folder, step)
        except DamagedCheckpoint as error:
            log.warning("%s; trying the checkpoint before it", error)
    if steps:
        raise UserError(f"{folder}: every checkpoint is damaged: put one back, or move the folder away to begin again")
    return None


def _load_meta(path: Path, step: int) -> dict[str, Any]:
    meta_path = path / META
    try:
        meta = read_json(meta_path)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from None
    except RecursionError as error:
        raise DamagedCheckpoint(f"{meta_path}: damaged ({error})") from None
    except OSError as error:
        raise _unreadable(meta_path, error) from None
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _checksum(meta):
        raise DamagedCheckpoint(f"{meta_path}: damaged (its checksum is not that of its content)")
    if meta.get("step") != step or not isinstance(meta.get("sha256"), dict):
        raise DamagedCheckpoint(f"{meta_path}: not the meta.json of a checkpoint of step {step}")
    return meta


def _load_tensors(path: Path, meta: Mapping[str, Any]) -> Tensors:
    _verify(path, meta)
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _verify(path: Path, meta: Mapping[str, Any]) -> None:
    try:
        if sha256_of(path) != meta["sha256"].get(path.name):
            raise DamagedCheckpoint(f"{path}: damaged (its SHA-256 is not the one in meta.json)")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be read ({error.strerror}): once it can, launch the run again and it goes on")


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
