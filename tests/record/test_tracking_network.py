"""A real MLflow server behind a network that fails: what training has written arrives, and each point once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bwlm.record.journal import Journal
from bwlm.record.tracking import Tracking
from tests.mlflow_server import free_port, server
from tests.record.mlflow_runs import DATASET, make
from tests.s3_server import CUT, LOSE, PASS, REFUSE, SLOW, FaultyProxy, Request, faulty_proxy

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("mlflow"), free_port()) as url:
        yield url


@pytest.fixture
def proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with faulty_proxy(url) as proxy:
        proxy.slow_seconds = 1.5
        yield proxy


@pytest.mark.parametrize(("fault", "retries"), [(REFUSE, 0), (CUT, 0), (LOSE, 0), (SLOW, 0), (LOSE, 2), (SLOW, 2)])
def test_every_request_of_a_run_may_fail_once(
    fault: str, retries: int, proxy: FaultyProxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the making of the run to its last metrics; a slow answer comes when the client has given up.

    MLflow's client may repeat what can be repeated, as bwlm lets it: the making of a run cannot.
    """
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    folder = make(tmp_path, f"g_{fault}")
    tracking = Tracking(proxy.url, tmp_path, f"network-{fault}-{retries}")
    tracking.expect(folder, None, DATASET)
    failed: set[tuple[str, str]] = set()

    def rule(request: Request) -> str:
        asked = request.method, request.path.partition("?")[0]
        if asked in failed:
            return PASS
        failed.add(asked)
        return fault

    proxy.rule = rule
    journal = Journal(folder.path)
    tries = 0
    for step in range(1, 9):
        journal.append(step, {"train_loss": 1 / step, "tokens_per_second": 100.0 + step})
        while not tracking.try_deliver(folder):
            tries += 1
            assert tries < 40
    assert len(failed) >= 4
    client = MlflowClient(url)
    home = client.get_experiment_by_name(tracking.experiment)
    assert home is not None
    (run,) = client.search_runs([home.experiment_id])
    for name in run.data.metrics:
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == list(range(1, 9)), name
    assert len(run.inputs.dataset_inputs) == 1
    assert tries >= (1 if retries else 4)
