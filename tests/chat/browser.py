"""A browser for the tests of the page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright


def launch(driver: Playwright) -> Browser:
    """Return the system's chromium, or playwright's; without either, the test is skipped."""
    path = shutil.which("chromium") or driver.chromium.executable_path
    if not Path(path).exists():
        pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
    return driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
