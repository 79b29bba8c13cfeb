"""MLflow's store: its address, the artifacts of a storage that was moved, and why a store does not answer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bwlm.credentials import masked, refuse_secret
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.remote import address_of
from bwlm.storage.opened import in_bucket

log = logging.getLogger(__name__)

_LONGEST_REASON = 110
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def tracking_uri(storage: Path, chosen: str | None) -> str:
    """Return the grid's setting, else the environment's as for any MLflow client, else SQLite below the storage.

    Raises `UserError` if it holds a secret, since it is printed and MLflow itself notes it, and if it is no address.
    """
    named = "launch.tracking_uri" if chosen else "MLFLOW_TRACKING_URI"
    uri = chosen or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and in_bucket(storage):
        raise UserError(
            f"tracking: {address_of(storage)} cannot hold MLflow's database: start `mlflow server` and set "
            "MLFLOW_TRACKING_URI"
        )
    uri = uri or sqlite_uri(storage / "mlflow.db")
    refuse_secret(uri, named)
    try:
        urlsplit(uri).port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise UserError(f"{named}: {uri} is no address ({error}): give http://host:port, or unset it") from None
    return uri


def open_client(uri: str) -> Any:
    """Return a client of a store, which gives up soon and warns once: training and scoring do not wait for it."""
    for name, value in ((_RETRIES, "2"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a warning per retry; we say it once
    from mlflow import MlflowClient

    return MlflowClient(uri)


@contextlib.contextmanager
def sent_once() -> Iterator[None]:
    """Let MLflow's client send each request of the block once; else it repeats one that gets no answer.

    The client reads the number of retries from the environment at each request, so this holds for all threads.
    """
    before = os.environ.get(_RETRIES)
    os.environ[_RETRIES] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_RETRIES, None)
        else:
            os.environ[_RETRIES] = before


def ask_store(uri: str) -> str:
    """Return what a store holds, by a real request. Raises `UserError` if it does not answer, or refuses."""
    from bwlm.record.database import database_of

    path = database_of(uri)
    if path is not None and not path.exists():
        return f"{path} is made by the first launch"
    try:
        found = open_client(uri).search_experiments(max_results=1000)
    except Exception as error:  # a store's driver has errors of its own, and they share no base
        raise UserError(f"{masked(uri)} {refusal(error, uri) or f'does not answer ({reason(error)})'}") from None
    return f"{masked(uri)} answers: {counted(len(found), 'experiment')}"


def active_run(client: Any, run: str) -> str | None:
    """Return the id of a run if the store has it; None if it is deleted or elsewhere."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if found.info.lifecycle_stage == "active" else None


def sqlite_uri(path: Path) -> str:
    """Return the URI of an SQLite file, whatever characters its path holds."""
    from sqlalchemy.engine import URL, make_url

    plain = f"sqlite:///{path}"
    # the plain URI, if it is read back the same: from an escaped URI MLflow makes a folder of the escaped name
    if make_url(plain).database == str(path):
        return plain
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def follow_storage(database: Path, known: str, here: str) -> None:
    """Point a storage's own database to the artifacts beside it: MLflow keeps absolute paths, and storages move.

    Otherwise the artifacts of a moved storage are not found, and new ones are written to its old place.
    """
    if known == here or not known.endswith("/mlartifacts"):
        return
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, known))
        below = "artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?"
        connection.execute(f"UPDATE runs SET {below}", (here, len(known) + 1, len(known) + 1, f"{known}/"))
    log.info("the storage was moved: MLflow now finds artifacts in %s", database.parent / "mlartifacts")


def ui_command(uri: str, bin_folder: Path) -> str:
    """Return the command that a person types, or the address that a person opens, to see the runs."""
    if uri.startswith(("http://", "https://")):
        return uri
    return shlex.join([str(bin_folder / "mlflow"), "ui", "--backend-store-uri", uri])


def refusal(error: Exception, uri: str) -> str | None:
    """Return the state of a server that answers but refuses, and the fix; None for any other error."""
    from mlflow.exceptions import MlflowException

    text = str(error)
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    if "Invalid Host header" in text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"refuses this host name (403): start it with: mlflow server --allowed-hosts {host}"
    if status == 401 or "error code 401" in text:
        return "wants a user and a password (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status == 403 or "error code 403" in text:
        return "forbids this (403): ask for the right to write, or set MLFLOW_TRACKING_USERNAME to a user that has it"
    if "out-of-date database schema" in text:
        return f"has the schema of another MLflow: copy the database, then run: mlflow db upgrade '{uri}'"
    return None


def reason(error: Exception) -> str:
    """Return the cause of an error in one clause; urllib3 prints a nest of its objects, the cause in the innermost."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    nested = re.search(r"HTTPS?Connection|Max retries", text)
    cause = re.search(r"(?<=\] )[A-Z][\w ]+|timed out|too many \d+ error responses|certificate verify failed", text)
    if nested:
        return cause[0] if cause else "no connection"
    return textwrap.shorten(masked(text.split(". ")[0]), _LONGEST_REASON, placeholder="...")
