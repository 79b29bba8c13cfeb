"""Checks of this machine before a launch: packages, storage, MLflow, processors and the compiler."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bwlm.errors import UserError
from bwlm.format import counted, file_size
from bwlm.model.compute import why_not_compile
from bwlm.paths import check_writable
from bwlm.plan.machine import available_cores, available_gpus, available_memory
from bwlm.record.mlflow_store import ask_store
from bwlm.remote import address_of
from bwlm.storage.opened import check_bucket, in_bucket


class Check(NamedTuple):
    """Check with its result: one line for a person."""

    name: str
    is_ok: bool
    found: str
    fix: str = ""
    """Way to mend it, if it failed."""


def checked(name: str, look: Callable[[], str], fix: str) -> Check:
    """Return a check that is ok if `look` raises no exception; it returns what it found."""
    try:
        return Check(name, True, look())
    except Exception as error:  # a check tells whatever went wrong, and the next one follows
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Check(name, False, words, fix)


def machine_checks(storage: Path, tracking_uri: Callable[[], str]) -> Iterator[Check]:
    """Yield the checks of this machine, each as soon as it is done."""
    yield checked("packages", _packages, "make install, or: pip install -r requirements.lock")
    yield checked("storage", partial(_storage, storage), "")
    yield mlflow_check(tracking_uri)
    yield checked("processors", _processors, "")
    yield checked(
        "compiler", _compiler, "install g++ (a GPU needs triton); without it runs are not compiled, and slower"
    )


def mlflow_check(uri: Callable[[], str]) -> Check:
    """Return the check of the MLflow store that `uri` names, by a real request."""
    return checked("MLflow", lambda: ask_store(uri()), "start the server, or correct MLFLOW_TRACKING_URI")


def _packages() -> str:
    """Return how many packages bwlm needs. Raises `UserError` for one that is missing or of another version."""
    from packaging.requirements import Requirement

    needed = [Requirement(one) for one in importlib.metadata.requires("bwlm") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    if wrong := [fault for one in needed if (fault := _fault(one.name, one.specifier.contains))]:
        raise UserError("; ".join(wrong))
    return f"{counted(len(needed), 'package')} of the versions that bwlm needs"


def _fault(name: str, is_wanted: Callable[[str], bool]) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    return "" if is_wanted(version) else f"{name} {version} is another version than bwlm needs"


def bucket_words(storage: Path) -> str:
    """Return what works in the bucket of a storage, by real requests. Raises as `check_bucket`."""
    check_bucket(storage)
    return f"{address_of(storage)}: objects are created once, read, replaced only if unchanged, listed and deleted"


def _storage(storage: Path) -> str:
    check_writable(storage)
    if in_bucket(storage):
        return f"{bucket_words(storage)}; its copies lie in {storage}"
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    return f"{storage} is writable, {file_size(shutil.disk_usage(existing).free)} free"


def _processors() -> str:
    gpus = available_gpus()
    return f"{counted(available_cores(), 'core')}, {file_size(available_memory())} of memory, {counted(gpus, 'GPU')}"


def _compiler() -> str:
    if why := why_not_compile("cuda" if available_gpus() else "cpu"):
        raise UserError(why)
    return "torch.compile works"
