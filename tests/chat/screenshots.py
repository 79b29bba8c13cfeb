"""The pictures of the page in the docs, with real models.

`python -m tests.chat.screenshots STORAGE FORWARD BACKWARD BIDIRECTIONAL` takes them anew.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from bwlm.chat.served import ServedModel
from bwlm.trained.load import load_model
from tests.chat.browser import launch
from tests.chat.serving import Gate, GatedEngine, running

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
SETTINGS = {"temperature": 0.7, "seed": 3, "max_tokens": 150}
TEXT = (
    "The war came to an end in 1945, and the people of the city went back to their houses. "
    "Nobody had thought that it would last for so long."
)


def main(storage: str, *runs: str) -> None:
    """Serve the runs, and take each picture anew."""
    with running([gated(Path(storage), run) for run in runs]) as server, sync_playwright() as driver:
        page = launch(driver).new_page(viewport={"width": 1000, "height": 640}, color_scheme="light")
        page.goto(server.url)
        page.evaluate("settings => localStorage.setItem('bwlm.settings', settings)", json.dumps(SETTINGS))
        backward_in_progress(page, server.engine(runs[1]).gate)
        wide(page)
        side_by_side(page)
        dark(page)
        narrow(page)


def gated(storage: Path, run: str) -> ServedModel:
    """Return a run as a model that is served, whose steps can be held up."""
    loaded = load_model(storage, run)
    return replace(ServedModel.from_loaded(run, loaded, 1, 1), engine=GatedEngine(loaded.model, 1, 1))


def backward_in_progress(page: Page, gate: Gate) -> None:
    """Take the page while a backward model writes."""
    page.get_by_label("Model", exact=True).select_option(index=1)
    gate.let(90)
    write(page, " and so the war came to an end.")
    page.locator("#transcript .line").nth(2).wait_for()
    take(page, "backward")
    gate.open()
    ended(page)


def wide(page: Page) -> None:
    """Take a text that a bidirectional model wrote on at both ends."""
    page.get_by_label("Model", exact=True).select_option(index=2)
    page.get_by_label("→ forward").check()
    write(page, "The captain of the ship")
    ended(page)
    page.get_by_label("← backward").check()
    page.get_by_role("button", name="Go on").click()
    ended(page)
    take(page, "wide")


def side_by_side(page: Page) -> None:
    """Take the surprise of one text, forward and backward."""
    page.set_viewport_size({"width": 1000, "height": 720})
    page.get_by_role("link", name="Side by side").click()
    page.get_by_label("Text that both sides read").fill(TEXT)
    page.get_by_role("button", name="Show surprise").click()
    page.locator(".side .piece").nth(10).hover()
    take(page, "side-by-side")


def dark(page: Page) -> None:
    """Take the difference of both sides, in the dark."""
    page.emulate_media(color_scheme="dark")
    page.get_by_label("Difference").check()
    take(page, "dark")


def narrow(page: Page) -> None:
    """Take the chat on a telephone."""
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 360, "height": 640})
    page.get_by_role("link", name="Chat").click()
    take(page, "narrow")


def write(page: Page, text: str) -> None:
    """Send a message."""
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def ended(page: Page) -> None:
    """Wait until the answer has ended."""
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)


def take(page: Page, name: str) -> None:
    """Keep a picture of the page, in 256 colours."""
    with Image.open(BytesIO(page.screenshot())) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(IMAGES / f"chat-{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
