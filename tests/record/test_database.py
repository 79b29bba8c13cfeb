"""MLflow's database: made once however many ask for it at the same moment, and its odd states told with their mend."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from alembic import command
from alembic.config import Config
from mlflow import MlflowClient

from bwlm.errors import UserError
from bwlm.record.database import _revisions, database_of
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.tracking import EXPERIMENT, Tracking

CLIENTS = 6
NOBODY = 65534


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as bwlm makes it. Read only."""
    storage = tmp_path_factory.mktemp("made")
    store = Tracking(tracking_uri(storage, None), storage)
    store._client._tracking_client.store.engine.dispose()
    return storage / "mlflow.db"


@pytest.fixture
def database(made: Path, tmp_path: Path) -> Path:
    shutil.copy(made, tmp_path / "mlflow.db")
    return tmp_path / "mlflow.db"


def refusal(database: Path) -> str:
    before = database.read_bytes()
    with pytest.raises(UserError) as caught:
        Tracking(tracking_uri(database.parent, None), database.parent)
    assert database.read_bytes() == before, "a launch changed a database that it refused"
    message = str(caught.value)
    assert "\n" not in message
    return message


def set_revision(database: Path, revision: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])


FIRST_LAUNCH = """
import sys
from pathlib import Path
from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.tracking import Tracking
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
storage = Path(sys.argv[1])
print(Tracking(tracking_uri(storage, None), storage)._experiment)
"""


@pytest.mark.faults
def test_launches_that_all_come_first_make_one_database(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    storage.mkdir()
    command_line = [sys.executable, "-c", FIRST_LAUNCH, str(storage)]
    pipe = subprocess.PIPE
    launches = [subprocess.Popen(command_line, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(CLIENTS)]
    for launch in launches:  # all have imported what takes long, and go at the same moment
        assert launch.stdout is not None
        assert launch.stdout.readline() == "ready\n"
    for launch in launches:
        assert launch.stdin is not None
        launch.stdin.write("go\n")
        launch.stdin.flush()
    ends = [(*launch.communicate(timeout=300), launch.returncode) for launch in launches]
    assert [code for _, _, code in ends] == [0] * CLIENTS, [error for _, error, _ in ends]
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == EXPERIMENT]
    assert {out.strip() for out, _, _ in ends} == {experiment.experiment_id}
    assert {path.name for path in storage.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_a_launch_killed_while_it_made_the_database_leaves_room_for_the_next(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.0123abcd.tmp").write_bytes(b"half of one")
    (tmp_path / "mlflow.db").touch()
    store = Tracking(tracking_uri(tmp_path, None), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    experiments = {found.name: found.artifact_location for found in store._client.search_experiments()}
    assert experiments[EXPERIMENT].startswith((tmp_path / "mlartifacts").as_uri())


def test_only_files_are_made() -> None:
    assert database_of("sqlite:////a%20b/mlflow.db") == Path("/a b/mlflow.db")
    assert [database_of(uri) for uri in ("sqlite://", "sqlite:///:memory:", "http://x", "postgresql://h/x")] == [
        None
    ] * 4


def test_an_older_schema_is_told_and_the_command_mends_it(database: Path) -> None:
    """A database of an earlier revision, as MLflow's own migrations make it."""
    uri = f"sqlite:///{database}"
    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    config.set_main_option("sqlalchemy.url", uri)
    newest, before = _revisions()[:2]
    command.downgrade(config, before)
    told = refusal(database)
    assert told.startswith(
        f"tracking: {database} was made by an older MLflow (schema {before}, and {newest} is needed): copy it, "
        f"then run: mlflow db upgrade '{uri}'; or move it away: the next launch makes a new one"
    )
    bin_folder = Path(sys.executable).parent
    upgrade = told.partition("then run: ")[2].partition(";")[0]
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    subprocess.run(upgrade, shell=True, env=environment, check=True, capture_output=True)
    Tracking(uri, database.parent)


def test_a_newer_schema_is_told(database: Path) -> None:
    set_revision(database, "ffffffffffff")
    told = refusal(database)
    assert f"{database} was made by a newer MLflow (MLflow {mlflow.__version__} does not know schema ffff" in told
    assert "install that MLflow again, or move it away" in told


def test_a_database_that_was_made_by_half_is_told(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DROP TABLE alembic_version")
    assert "was not made whole (it has no schema version): move it away: the next launch makes" in refusal(database)


def test_a_file_that_is_no_database_is_told(database: Path) -> None:
    database.write_bytes(b"not a database, but long enough to be looked at " * 10)
    assert "is damaged or no database (file is not a database): move it away" in refusal(database)


@pytest.fixture
def of_another(made: Path) -> Iterator[Path]:
    """A database that other users can read, where they can reach it."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copy(made, folder / "mlflow.db")
    (folder / "mlflow.db").chmod(0o444)
    folder.chmod(0o755)
    yield folder / "mlflow.db"
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_database_that_may_not_be_written_is_told(of_another: Path) -> None:
    """Root may write anything, so another user asks."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setuid(NOBODY)
        try:
            Tracking(f"sqlite:///{of_another}", of_another.parent)
            told = "it was opened"
        except BaseException as error:
            told = str(error)
        os.write(theirs, told.encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(ours, 4096).decode()
    assert told == (
        f"tracking: {of_another} or its folder is read-only: make both writable (chmod u+w), or set MLFLOW_TRACKING_URI"
    )
