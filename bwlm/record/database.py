"""MLflow's SQLite database: made whole by one process, and refused with the fix if this MLflow cannot use it.

MLflow makes and migrates a database when a client first opens it, without a lock: of several first opens at once most
fail (`findings/mlflow_first_opens.sh`). Here one process makes it under a lock, in a temporary file that is renamed.
A launch does not migrate an older schema either: other launches may have the file open.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from pathlib import Path
from urllib.parse import quote

from bwlm.errors import UserError
from bwlm.paths import discard_unfinished, exclusive, sync

_ANEW = "move it away: the next launch makes a new one and delivers every run's metrics to it again"
_WAIT_SECONDS = 20.0
"""Seconds to wait for another process that writes to the database."""


def database_of(uri: str) -> Path | None:
    """Return the file of an SQLite URI; None for any other store."""
    from sqlalchemy.engine import make_url

    name = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(name) if name and name != ":memory:" else None


def prepare_database(path: Path, uri: str, artifacts: str) -> None:
    """Make the database if it is not there. Raises `UserError` with its state and the fix if it cannot be used.

    `artifacts` is the URI below which MLflow keeps the artifacts of its default experiment.
    """
    if not _is_made(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if not _is_made(path):
                _make(path, artifacts)
    _check(path, uri)


def _is_made(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _make(path: Path, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import URL

    discard_unfinished(path.parent, [path.name])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    store = SqlAlchemyStore(URL.create("sqlite", database=str(temporary)).render_as_string(), artifacts)
    store.engine.dispose()
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def _check(path: Path, uri: str) -> None:
    import mlflow

    if not os.access(path, os.W_OK) or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(
            f"tracking: {path} or its folder is read-only: make both writable (chmod u+w), or set MLFLOW_TRACKING_URI"
        )
    revision, known = _revision(path), _revisions()
    if revision is None:
        raise UserError(f"tracking: {path} was not made whole (it has no schema version): {_ANEW}")
    if revision == known[0]:
        return
    if revision in known:
        raise UserError(
            f"tracking: {path} was made by an older MLflow (schema {revision}, and {known[0]} is needed): copy it, "
            f"then run: mlflow db upgrade '{uri}'; or {_ANEW}"
        )
    raise UserError(
        f"tracking: {path} was made by a newer MLflow (MLflow {mlflow.__version__} does not know schema {revision}): "
        f"install that MLflow again, or {_ANEW}"
    )


def _revision(path: Path) -> str | None:
    """Return the version of the schema; None for a database without one. Raises `UserError` if it cannot be read."""
    connection = None
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=_WAIT_SECONDS)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else None
    except sqlite3.OperationalError as error:
        raise UserError(f"tracking: {path} cannot be read ({error}): check it, or set MLFLOW_TRACKING_URI") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"tracking: {path} is damaged or no database ({error}): {_ANEW}") from None
    finally:
        if connection is not None:
            connection.close()


def _revisions() -> list[str]:
    """Return the schemas that this MLflow knows, the newest first."""
    import mlflow
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return [script.revision for script in scripts.walk_revisions()]
