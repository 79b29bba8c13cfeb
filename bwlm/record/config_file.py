"""config.json of a run: written with a digest of its content; read, checked and validated once for each state of it."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.model.compute import Compute
from bwlm.paths import FileState, file_state, read_json, write_json
from bwlm.record.health import DIGEST, check_agrees, check_seal, sealed
from bwlm.record.run_config import RunConfig

CONFIG = "config.json"
TOKENIZER = "tokenizer"
"""Folder of the run's own copy of its tokenizer."""
_SINCE_VERSION_2 = ("identity_version", "modules", "accepted_code")
"""Fields that a config.json of identity version 1 lacks."""
_MEND = "put back the file that the run was made with, or delete the run: bwlm runs delete {run}"


def write_config(folder: Path, config: RunConfig, besides: dict[str, Any]) -> None:
    """Write the config of the run in `folder`, with further fields; paths below the storage are relative to it."""
    content = asdict(config) | {"experiment": config.experiment.model_dump(), "fingerprint": config.fingerprint}
    own = folder / TOKENIZER
    folders = {"corpus": Path(config.corpus), "tokenizer": own if own.exists() else Path(config.tokenizer)}
    paths = {name: _from_storage(path, folder.parent) for name, path in folders.items()}
    write_json(folder / CONFIG, sealed(content | paths | besides))


def config_content(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises `UserError` naming the file if it is gone, is not the config of an experiment, or was edited.
    """
    path, mend = folder / CONFIG, _MEND.format(run=folder.name)
    if not path.exists():
        raise UserError(f"{path}: no such file: {mend}")
    content = read_json(path)
    try:
        check_seal(path, content, mend)
        if DIGEST not in content:  # written by an earlier version
            check_agrees(path, content, mend)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not the config of an experiment; move it out of the storage") from None
    return dict(content)


def read_config(folder: Path) -> RunConfig:
    """Return the config of the run in `folder`; every reader of a process gets the same one, until the file changes.

    Raises `UserError` as `config_content`, and if it is of another version of bwlm.
    """
    try:
        state = file_state(f"{folder}/{CONFIG}")
    except OSError:
        config_content(folder)  # says why
        raise
    return _read(state, (folder / TOKENIZER).exists())


@lru_cache(maxsize=10_000)
def _read(state: FileState, has_tokenizer: bool) -> RunConfig:
    path = Path(state.path)
    folder, storage, content = path.parent, path.parent.parent, config_content(path.parent)
    try:
        known = {name: content[name] for name in RunConfig.__dataclass_fields__ if name not in _SINCE_VERSION_2}
        known |= {name: content[name] for name in _SINCE_VERSION_2 if name in content}
        # runs from before this setting read their documents in the order of their files
        data = {"shuffle": False} | content["experiment"]["data"]
        experiment = Experiment.model_validate(content["experiment"] | {"data": data})
        read = {"experiment": experiment, "compute": Compute(**content["compute"])}
        own = str(folder / TOKENIZER) if has_tokenizer else _in_storage(content["tokenizer"], storage)
        return RunConfig(**known | read | {"corpus": _in_storage(content["corpus"], storage), "tokenizer": own})
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the config of an experiment; move it out of the storage") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path}: experiment: not a setting of this version of bwlm ({field}): use the version that made the "
            f"run, or delete it: bwlm runs delete {folder.name}"
        ) from None


def _from_storage(folder: Path, storage: Path) -> str:
    """Return a path as files tell it: relative to the storage if it lies below it."""
    return folder.relative_to(storage).as_posix() if folder.is_relative_to(storage) else str(folder)


def _in_storage(written: str, storage: Path) -> str:
    """Return the path that a file tells.

    Earlier versions wrote absolute paths into the storage's cache of that time; this storage's cache comes first.
    """
    path = Path(written)
    moved = storage.joinpath(*path.parts[-3:])
    if path.is_absolute() and path.parts[-3:-2] == ("cache",) and moved.exists():
        return str(moved)
    return str(storage / path)
