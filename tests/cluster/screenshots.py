"""The pictures of a grid in the docs: `python -m tests.cluster.screenshots` trains the demo on a cluster for them.

Two clicks lead to a cell's log in Ray's dashboard; beside it MLflow and the report, all while cells still train.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import httpx
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.chat.browser import launch
from tests.cluster.heads import BIN, ROOT, Head, ray_job, started_head, submit
from tests.mlflow_server import free_port, server

IMAGES = ROOT / "docs" / "images"
_MINUTES = 10


def main() -> None:
    """Submit the demo, take the pictures once half of it has finished, and stop it."""
    with tempfile.TemporaryDirectory() as folder, started_head(cpus=3) as head, sync_playwright() as driver:
        tracking = Path(folder) / "mlflow"
        tracking.mkdir()
        with server(tracking, free_port()) as address:
            storage = Path(folder) / "storage"
            demo = ("grids/demo.yaml", "--set", f"launch.tracking_uri={address}")
            job = submit(head, storage, *demo, options=("--no-wait", "--submission-id", "demo"))
            assert job.returncode == 0, job.stdout + job.stderr
            wait_for(lambda: finished(head, storage) >= 18)
            browser = launch(driver)
            token = (Path(head.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
            dashboard = browser.new_context(
                viewport={"width": 1100, "height": 640}, extra_http_headers={"Authorization": f"Bearer {token}"}
            ).new_page()
            ray_dashboard(dashboard, head.dashboard)
            mlflow(browser.new_page(viewport={"width": 1280, "height": 760}), address)
            report(browser.new_page(viewport={"width": 1000, "height": 900}), storage)
            ray_job(head, "stop", "demo")


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60 * _MINUTES
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1)


def finished(head: Head, storage: Path) -> int:
    """Number of cells that have finished."""
    command = [str(BIN / "bwlm"), "grid", "status", "demo", "--storage", str(storage), "--json"]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, check=False)
    return int(json.loads(done.stdout)["summary"]["counts"].get("finished", 0)) if done.returncode == 0 else 0


def ray_dashboard(page: Page, address: str) -> None:
    """The job with its lines of progress; then two clicks: the page of actors, and the log of one that trains."""
    page.goto(f"{address}/#/jobs/demo")
    page.get_by_text(re.compile(r"\d+/36")).first.wait_for()
    take(page, "ray-job")
    page.goto(f"{address}/#/actors")
    row = page.get_by_role("row").filter(has_text="train_cell").first
    row.wait_for()
    take(page, "ray-actors")
    row.get_by_role("link", name="Log", exact=True).click()
    page.get_by_role("tab", name="stdout", exact=True).click()
    line = page.get_by_text("trains demo_").last
    line.wait_for()
    line.scroll_into_view_if_needed()
    take(page, "ray-log")


def mlflow(page: Page, address: str) -> None:
    """The curves of the grid's runs."""
    found = httpx.get(f"{address}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": "bwlm"})
    experiment = found.raise_for_status().json()["experiment"]["experiment_id"]
    cells = quote("params.depth = '1' and params.lr = '4.0'")
    page.goto(f"{address}/#/experiments/{experiment}/runs?compareRunsMode=CHART&searchFilter={cells}")
    page.get_by_role("button", name="Close").click()
    page.get_by_text("d1_lr4_s0_forward").first.wait_for()
    take(page, "mlflow-runs")


def report(page: Page, storage: Path) -> None:
    """The report of what has finished so far."""
    subprocess.run([BIN / "bwlm", "analyze", "report", "demo", "--storage", str(storage)], check=True)
    [path] = (storage / "grids" / "demo").glob("*.html")
    page.goto(path.as_uri())
    expect(page.locator("svg, canvas").first).to_be_visible()
    take(page, "report")


def take(page: Page, name: str) -> None:
    """Keep a picture of the page, in 256 colours."""
    page.wait_for_timeout(2000)
    with Image.open(BytesIO(page.screenshot())) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
