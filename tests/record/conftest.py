"""MLflow stores for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from bwlm.record.mlflow_store import tracking_uri
from bwlm.record.tracking import Tracking


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store in a folder whose name needs quoting in a URI. It is made once, because that takes a second."""
    root = tmp_path_factory.mktemp("a store, 100% #1")
    return Tracking(tracking_uri(root, None), root).uri


@pytest.fixture
def store(database: str, tmp_path: Path) -> Tracking:
    return Tracking(database, tmp_path)


@pytest.fixture
def client(store: Tracking) -> MlflowClient:
    return MlflowClient(store.uri)
