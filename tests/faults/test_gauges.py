"""Gauges of a grid in a real Prometheus: every query of the dashboard finds what Ray exports while cells train."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from bwlm.grid.gauges import CELL_LABELS, CELLS, FIGURES, LOSS_FINITE, STATES
from tests.cluster.heads import free_ports
from tests.grids import BWLM, GridFile, private_environment, reap

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD, PAGE = DOCS / "grafana.json", DOCS / "monitoring.md"
WAIT = 120.0
"""Most seconds until a condition holds."""

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the package prometheus")


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + WAIT
    while not (result := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)
    return result


class Prometheus(NamedTuple):
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray with a short path: its sockets lie below."""
    folder = Path(tempfile.mkdtemp(prefix="bwg-", dir="/tmp"))
    yield folder
    reap([one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prometheus(ray_folder: Path, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus with the settings of docs/monitoring.md, but for the folder of Ray and shorter intervals."""
    settings = PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]
    settings = re.sub("[0-9]+s", "1s", settings.replace("/tmp/ray/", f"{ray_folder}/ray/"))
    (tmp_path / "prometheus.yml").write_text(settings)
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        yield Prometheus(f"http://127.0.0.1:{port}")
        process.terminate()


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def is_there(prometheus: Prometheus) -> bool:
    try:
        return bool(httpx.get(f"{prometheus.url}/-/ready").is_success)
    except httpx.TransportError:
        return False


def test_every_query_finds_a_grid_that_trains(
    prometheus: Prometheus, ray_folder: Path, grid_file: GridFile, tmp_path: Path
) -> None:
    grid = grid_file(budget={"steps": 100_000, "batch_tokens": 512}, checkpoint={"every": 20})
    environment = private_environment(tmp_path / "runs") | {"RAY_TMPDIR": str(ray_folder)}
    until(lambda: is_there(prometheus))
    with subprocess.Popen([BWLM, "grid", "run", grid], env=environment, stderr=subprocess.PIPE, text=True) as launch:
        try:
            for expression in queries():
                asked = expression.replace("$grid", "g")
                until(lambda asked=asked: prometheus.query(asked))  # type: ignore[misc]
            check_labels(prometheus)
        finally:
            launch.terminate()
            launch.communicate()


def check_labels(prometheus: Prometheus) -> None:
    running = prometheus.query(f"ray_{LOSS_FINITE}")
    assert {one["metric"]["cell"] for one in running} <= {"g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"}
    labels = running[0]["metric"]
    assert {name: labels[name] for name in CELL_LABELS if name not in ("cell", "direction")} == {
        "grid": "g",
        "phase": "base",
        "depth": "1",
        "lr": "1.0",
        "seed": "0",
    }
    states = {one["metric"]["state"]: float(one["value"][1]) for one in prometheus.query(f"ray_{CELLS}")}
    assert set(states) == set(STATES)
    assert sum(states.values()) == 2
    exported = {one["metric"]["__name__"] for one in prometheus.query('{__name__=~"ray_bwlm_.*"}')}
    of_no_reward = {f"ray_{name}" for name, _ in FIGURES.values()} - {"ray_bwlm_reward"}
    assert exported == of_no_reward | {f"ray_{LOSS_FINITE}", f"ray_{CELLS}"}


def test_the_dashboard_asks_for_no_other_gauge() -> None:
    known = {f"ray_{name}" for name, _ in FIGURES.values()} | {f"ray_{LOSS_FINITE}", f"ray_{CELLS}"}
    assert {name for one in queries() for name in re.findall(r"ray_\w+", one)} <= known


def test_the_page_lists_every_gauge() -> None:
    table = re.findall(r"^\| `(ray_\w+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(table[:-2]) == {f"ray_{name}": description for name, description in FIGURES.values()}
    assert [name for name, _ in table[-2:]] == [f"ray_{LOSS_FINITE}", f"ray_{CELLS}"]
