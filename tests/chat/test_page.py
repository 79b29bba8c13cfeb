"""The page in a real browser, on a real server: what a person sees and does, in each direction.

After each test the browser's log must hold no error, no refusal by the content security policy, and no request to
another address.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect, sync_playwright

from bwlm.chat.access import Access
from bwlm.chat.dialogue import Dialogue, Turn, Voice
from bwlm.chat.served import ServedModel
from bwlm.model.gpt import GPT
from bwlm.text.tokenizer import Tokenizer
from tests.chat.browser import launch
from tests.chat.memorised import memorise
from tests.chat.serving import GatedEngine, Server, running, tiny_model, until

pytestmark = pytest.mark.faults

BEGINNING = "In the winter the river rose. "
MIDDLE = (
    "The captain shut the gate and waited for the morning, and all of the village carried their letters, their silver "
    "and their honest old books up the hill to the stone house by the garden."
)
ENDING = " So the village became an island."
JAPANESE = "昔々、東京の川のほとりに、小さな家がありました。Ελλάδα, kävelyä. 🙂"
MARKUP = "<img src=x onerror=alert(1)><b>bold</b> & so on"
QUESTION, ANSWER = "Where is the river?", "It is behind the garden, at the end of the village."
EARLIER_QUESTION, EARLIER_ANSWER = "Who are you?", "The captain of the island."


@pytest.fixture(scope="module")
def site(tokenizer: Tokenizer) -> Iterator[Server]:
    person, model = "person", "model"
    base = Voice("bidirectional", "whole", on_documents=True)
    talks: dict[str, tuple[Voice, list[list[Turn]]]] = {
        "tale": (
            base,
            [
                [Turn(person, BEGINNING, "forward"), Turn(model, MIDDLE, "forward")],
                [Turn(person, ENDING, "backward"), Turn(model, MIDDLE, "backward")],
                [Turn(person, BEGINNING + MIDDLE, "backward"), Turn(model, "Long ago. ", "backward")],
            ],
        ),
        "kotoba": (
            Voice("backward", "whole", True),
            [[Turn(person, "おわり。", "backward"), Turn(model, JAPANESE, "backward")]],
        ),
        "markup": (
            Voice("forward", "whole", True),
            [[Turn(person, "Write. ", "forward"), Turn(model, MARKUP, "forward")]],
        ),
        "helper": (
            Voice("forward", "whole", on_documents=False),
            [
                [Turn(person, QUESTION, "forward"), Turn(model, ANSWER, "forward")],
                [
                    Turn(person, QUESTION, "forward"),
                    Turn(model, ANSWER, "forward"),
                    Turn(person, EARLIER_QUESTION, "forward"),
                    Turn(model, EARLIER_ANSWER, "forward"),
                ],
            ],
        ),
        "past": (
            Voice("backward", "whole", on_documents=False),
            [
                [Turn(person, ANSWER, "backward"), Turn(model, QUESTION, "backward")],
                [
                    Turn(person, ANSWER, "backward"),
                    Turn(model, QUESTION, "backward"),
                    Turn(person, EARLIER_ANSWER, "backward"),
                    Turn(model, EARLIER_QUESTION, "backward"),
                ],
            ],
        ),
        "turns": (
            Voice("backward", "turns", on_documents=False),
            [[Turn(person, QUESTION, "backward"), Turn(model, ANSWER, "backward")]],
        ),
    }
    models = {name: memorise(voice, tokenizer, known) for name, (voice, known) in talks.items()}
    with running([served(name, talks[name][0], tokenizer, model) for name, model in models.items()]) as site:
        yield site


def served(name: str, voice: Voice, tokenizer: Tokenizer, model: GPT) -> ServedModel:
    about = {
        "phase": "base" if voice.on_documents else "sft",
        "depth": model.config.depth,
        "direction": voice.direction,
        "readings": list(voice.readings),
        "manners": {reading: voice.manner(reading) for reading in voice.readings},
        "reversal": voice.reversal,
        "sequence_length": model.config.sequence_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return ServedModel(name, voice, tokenizer, GatedEngine(model, slots=2, waiting=0), about)


# ---- a browser that tells what it logs ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        chromium = launch(driver)
        yield chromium
        chromium.close()


@dataclass
class Log:
    """Log of the browser: its messages, and its requests."""

    errors: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    """Parts of errors that a test brings about."""

    def follow(self, page: Page) -> None:
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))

    def unexpected(self) -> list[str]:
        return [error for error in self.errors if not any(part in error for part in self.expected)]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(one.post_data or "") for one in self.requests if one.url.endswith(path) and one.post_data]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def page(browser: Browser, site: Server, log: Log) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1000, "height": 720}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(10_000)
    log.follow(page)
    page.goto(site.url + "/")
    set_settings(page, temperature=0)
    yield page
    for name in site.models:
        site.engine(name).gate.open()
    context.close()
    assert not log.unexpected()
    outside = [one.url for one in log.requests if not one.url.startswith((site.url, "blob:", "data:"))]
    assert not outside


@pytest.fixture
def shot(page: Page, tmp_path: Path) -> Callable[[str], None]:
    """Keeps a picture of the page in the test's folder (`--basetemp` says where)."""
    return lambda name: page.screenshot(path=tmp_path / f"{name}.png") and None


def set_settings(page: Page, **values: float) -> None:
    page.evaluate("values => localStorage.setItem('bwlm.settings', JSON.stringify(values))", values)


def choose(page: Page, model: str) -> None:
    page.get_by_label("Model", exact=True).select_option(model)


def send(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def ended(page: Page) -> None:
    """Wait until no answer is being written."""
    expect(page.locator("#stop")).to_be_hidden()


def said(page: Page) -> str:
    return page.locator("#transcript .sheet").text_content() or ""


def texts(page: Page) -> list[str]:
    return page.locator("#transcript .text").all_text_contents()


def bottom_of(page: Page, selector: str) -> float:
    box = page.locator(selector).bounding_box()
    assert box is not None
    return round(box["y"] + box["height"])


def status(page: Page) -> Locator:
    return page.locator("#status")


Shot = Callable[[str], None]


# ---- chat ----


def test_a_forward_text_grows_at_its_end(page: Page, site: Server, shot: Shot) -> None:
    choose(page, "tale")
    expect(page.get_by_role("heading", name="This model goes on with a text")).to_be_visible()
    shot("empty")
    site.engine("tale").gate.let(30)
    send(page, BEGINNING)
    expect(page.locator("#transcript .model")).to_contain_text("The captain")
    so_far = said(page)
    assert (BEGINNING + MIDDLE).startswith(so_far)
    assert len(so_far) < len(BEGINNING + MIDDLE)
    shot("growing")
    site.engine("tale").gate.open()
    ended(page)
    assert said(page) == BEGINNING + MIDDLE
    assert page.locator("#announcer").text_content() == MIDDLE
    shot("done")


def test_a_backward_text_grows_into_place_from_its_end(page: Page, site: Server, shot: Shot) -> None:
    """Lines that were written do not move while more is written in front of them."""
    page.set_viewport_size({"width": 520, "height": 720})
    choose(page, "tale")
    page.get_by_label("← backward").check()
    site.engine("tale").gate.let(40)
    send(page, ENDING)
    lines = page.locator("#transcript .line")
    expect(lines.first).to_be_visible()
    last = lines.last.bounding_box()
    before = (lines.last.text_content(), last)
    bottom = bottom_of(page, ".sheet")
    count = lines.count()
    assert (MIDDLE + ENDING).endswith(said(page))
    shot("growing")
    site.engine("tale").gate.let(20)
    expect(lines).not_to_have_count(count)
    assert (lines.last.text_content(), lines.last.bounding_box()) == before
    site.engine("tale").gate.open()
    ended(page)
    assert said(page) == MIDDLE + ENDING
    shot("done")
    assert bottom_of(page, ".sheet") == bottom


def test_the_direction_switches_at_every_turn(page: Page, shot: Shot) -> None:
    choose(page, "tale")
    send(page, BEGINNING)
    ended(page)
    page.get_by_label("← backward").check()
    page.get_by_role("button", name="Go on").click()
    ended(page)
    assert said(page) == "Long ago. " + BEGINNING + MIDDLE
    shot("both-sides")


def test_a_model_of_one_direction_has_no_switch(page: Page) -> None:
    choose(page, "kotoba")
    expect(page.get_by_label("← backward")).to_be_hidden()
    expect(page.locator("#facts")).to_have_text("← backward · base · depth 2 · 496 k parameters")


def test_answers_stand_below_what_was_asked(page: Page, shot: Shot) -> None:
    choose(page, "helper")
    for question in (QUESTION, EARLIER_QUESTION):
        send(page, question)
        ended(page)
    assert texts(page) == [QUESTION, ANSWER, EARLIER_QUESTION, EARLIER_ANSWER]
    shot("answers")


def test_what_came_before_stands_above(page: Page, log: Log, shot: Shot) -> None:
    """The talk goes back in time: the order of the page is that of time, the server is told the order of the talk."""
    choose(page, "past")
    expect(page.get_by_role("heading", name="This model writes what came before")).to_be_visible()
    for ending in (ANSWER, EARLIER_ANSWER):
        send(page, ending)
        ended(page)
    assert texts(page) == [EARLIER_QUESTION, EARLIER_ANSWER, QUESTION, ANSWER]
    sent = log.bodies("chat/completions")[-1]["messages"]
    assert [message["content"] for message in sent] == [ANSWER, QUESTION, EARLIER_ANSWER]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    shot("upward")


def test_a_backward_answer_stands_below_and_grows_at_its_front(page: Page, site: Server) -> None:
    choose(page, "turns")
    site.engine("turns").gate.let(14)
    send(page, QUESTION)
    expect(page.locator("#transcript .growing")).to_contain_text(".")
    part = page.locator("#transcript .growing").text_content() or ""
    assert ANSWER.endswith(part)
    site.engine("turns").gate.open()
    ended(page)
    assert texts(page) == [QUESTION, ANSWER]


def test_no_wrong_character_at_any_moment(page: Page, site: Server, shot: Shot) -> None:
    """Each state of the page, while text of many-byte characters grows at its front, is an end of the text."""
    choose(page, "kotoba")
    page.evaluate(
        """() => {
            const transcript = document.getElementById("transcript");
            window.seen = [];
            const note = () => window.seen.push(transcript.querySelector(".sheet")?.textContent ?? "");
            new MutationObserver(note).observe(transcript, {childList: true, characterData: true, subtree: true});
        }"""
    )
    site.engine("kotoba").gate.let(20)
    send(page, "おわり。")
    expect(page.locator("#transcript .model")).to_contain_text("🙂")
    site.engine("kotoba").gate.open()
    ended(page)
    whole = JAPANESE + "おわり。"
    assert said(page) == whole
    seen = set(page.evaluate("window.seen"))
    assert len(seen) > 20
    assert [part for part in seen if not whole.endswith(part)] == []
    shot("japanese")


@pytest.mark.parametrize(
    "pieces", [["\n"], ["b", "\n"], ["b", "\n\n", "a\n"], ["\nb", "\r\n", " ", "\n\n\n"], [" " * 999]]
)
def test_lines_that_are_only_begun_end_the_breaking_of_lines(page: Page, pieces: list[str]) -> None:
    """A text that is written backward may begin with a line break, until more is written."""
    shown = page.evaluate(
        """async (pieces) => {
            const { Growth } = await import("/growth.js");
            const element = document.createElement("div");
            document.body.append(element);
            const growth = new Growth(element, true);
            let lines = 0;
            growth.head.after = (line) => {
                if (++lines > 99) throw new Error("the lines never end");
                Element.prototype.after.call(growth.head, line);
            };
            pieces.forEach((piece) => growth.add(piece));
            return element.textContent;
        }""",
        pieces,
    )
    assert shown == "".join(reversed(pieces))


def test_a_text_that_is_too_long_is_refused_not_cut(page: Page, log: Log) -> None:
    log.expected = ("status of 400",)
    choose(page, "helper")
    for place, button, status in (("#input", "#send", "#status"), ("#compare-text", "#score", "#compare-status")):
        if place == "#compare-text":
            page.locator("#to-compare").click()
        page.locator(place).fill("x" * 8001)
        page.locator(button).click()
        expect(page.locator(status)).to_contain_text("at most 8000 characters")
        expect(page.locator(place)).to_have_value("x" * 8001)


def test_what_a_model_writes_is_text_not_markup(page: Page, log: Log) -> None:
    choose(page, "markup")
    send(page, "Write. ")
    ended(page)
    assert said(page) == "Write. " + MARKUP
    assert page.locator("#transcript img, #transcript b").count() == 0


def test_a_stopped_answer_stays_and_frees_its_slot(page: Page, site: Server, shot: Shot) -> None:
    choose(page, "tale")
    site.engine("tale").gate.let(30)
    send(page, BEGINNING)
    expect(page.locator("#transcript .model")).to_contain_text("The captain")
    page.get_by_label("Message").press("Escape")
    ended(page)
    site.engine("tale").gate.open()
    expect(page.locator("#transcript .label")).to_contain_text("stopped")
    assert (BEGINNING + MIDDLE).startswith(said(page))
    until(lambda: site.models["tale"].running().live == 0)
    shot("stopped")
    page.get_by_role("button", name="Go on").click()
    ended(page)
    assert site.models["tale"].running().live == 0


def test_stopped_before_the_first_word_gives_the_message_back(page: Page, site: Server) -> None:
    choose(page, "helper")
    site.engine("helper").gate.let(0)
    send(page, QUESTION)
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text("Stopped before the first word.")
    expect(page.get_by_label("Message")).to_have_value(QUESTION)
    assert texts(page) == []


def test_retry_writes_again_and_clear_forgets(page: Page, log: Log) -> None:
    choose(page, "helper")
    expect(page.get_by_role("button", name="Retry")).to_be_disabled()
    send(page, QUESTION)
    ended(page)
    page.get_by_role("button", name="Retry").click()
    ended(page)
    assert texts(page) == [QUESTION, ANSWER]
    first, second = log.bodies("chat/completions")
    assert first["messages"] == second["messages"]
    assert first["seed"] != second["seed"]
    page.get_by_role("button", name="Clear").click()
    assert texts(page) == []
    expect(page.get_by_role("heading", name="This model answers")).to_be_visible()
    expect(page.get_by_label("Message")).to_be_focused()


def test_a_reload_keeps_the_talk_and_a_new_tab_begins_empty(page: Page, site: Server) -> None:
    choose(page, "past")
    send(page, ANSWER)
    ended(page)
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("past")
    assert texts(page) == [QUESTION, ANSWER]
    other = page.context.new_page()
    other.goto(site.url)
    expect(other.locator("#chat")).to_be_visible()
    assert texts(other) == []


def test_the_server_s_refusal_is_shown_and_the_message_given_back(page: Page, log: Log, shot: Shot) -> None:
    log.expected = ("status of 400",)
    choose(page, "helper")
    long = "river " * 600
    send(page, long)
    expect(status(page)).to_contain_text("tokens")
    expect(status(page)).to_have_class("status fault")
    expect(page.get_by_label("Message")).to_have_value(long)
    shot("error")


def test_an_answer_that_breaks_off_is_kept_with_its_error(page: Page, site: Server, shot: Shot) -> None:
    choose(page, "tale")
    site.engine("tale").gate.let(30)
    send(page, BEGINNING)
    expect(page.locator("#transcript .model")).to_contain_text("The captain")
    site.engine("tale").failure = RuntimeError("out of memory")
    site.engine("tale").gate.open()
    ended(page)
    expect(page.locator("#transcript .label")).to_contain_text("broken off")
    assert (BEGINNING + MIDDLE).startswith(said(page))
    shot("broken-off")


def test_a_busy_server_is_told_and_asked_again(page: Page, site: Server, log: Log, shot: Shot) -> None:
    log.expected = ("status of 429",)
    choose(page, "helper")
    site.engine("helper").gate.let(0)
    others = [ask_in_background(site, "helper") for _ in range(2)]
    until(lambda: site.models["helper"].running().live == 2)
    send(page, QUESTION)
    expect(status(page)).to_contain_text("The server is busy. Trying again in")
    shot("busy")
    site.engine("helper").gate.open()
    ended(page)
    assert texts(page) == [QUESTION, ANSWER]
    assert [other.result() for other in others] == [ANSWER, ANSWER]


def test_a_server_that_is_gone_is_told(page: Page, log: Log) -> None:
    log.expected = ("ERR_CONNECTION_REFUSED",)
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    send(page, BEGINNING)
    expect(status(page)).to_have_text("The server cannot be reached. Is it still running?")
    page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    page.reload()
    expect(page.get_by_role("heading", name="The server does not answer")).to_be_visible()
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#chat")).to_be_visible()


def test_models_that_load_are_waited_for(page: Page, shot: Shot) -> None:
    held: list[Route] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload(wait_until="commit")
    expect(page.get_by_text("Loading the models")).to_be_visible()
    shot("loading")
    until(lambda: bool(page.title() and held))
    held[0].continue_()
    expect(page.locator("#chat")).to_be_visible()


def test_a_server_with_a_token_asks_for_it(browser: Browser, site: Server, log: Log, tokenizer: Tokenizer) -> None:
    log.expected = ("status of 401",)
    helper = served("helper", Voice("forward", "whole", on_documents=False), tokenizer, tiny_model(tokenizer))
    with running([helper], access=Access(token="secret")) as guarded:
        page = browser.new_context().new_page()
        log.follow(page)
        page.goto(guarded.url)
        page.get_by_label("Token", exact=True).fill("secret")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#facts")).to_contain_text("sft")
        page.context.close()
    assert not log.unexpected()


def test_settings_are_kept_and_sent(page: Page, log: Log, shot: Shot) -> None:
    choose(page, "helper")
    page.locator("#composer").get_by_role("button", name="Settings").click()
    page.get_by_label("Top k").fill("5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Most tokens").fill("5")
    shot("settings")
    page.get_by_role("button", name="Keep").click()
    page.reload()
    send(page, QUESTION)
    ended(page)
    body = log.bodies("chat/completions")[0]
    assert {name: body.get(name) for name in ("temperature", "top_k", "seed", "max_tokens")} == {
        "temperature": 0,
        "top_k": 5,
        "seed": 7,
        "max_tokens": 5,
    }
    expect(page.locator("#transcript .label")).to_contain_text("cut at the limit of tokens · seed 7")


def test_a_setting_out_of_its_range_is_not_kept(page: Page) -> None:
    page.locator("#composer").get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("3")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#settings")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#settings")).to_be_hidden()
    assert json.loads(page.evaluate("localStorage.getItem('bwlm.settings')")) == {"temperature": 0}


def test_a_talk_is_shared_as_a_file(page: Page, browser: Browser, tmp_path: Path) -> None:
    choose(page, "past")
    send(page, ANSWER)
    ended(page)
    page.get_by_role("button", name="Copy this text").click()
    expect(status(page)).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == QUESTION
    content = json.loads(download(page, "Data (.json)", tmp_path).read_text())
    assert content["text"] == f"{QUESTION}\n\n{ANSWER}"
    assert [turn["speaker"] for turn in content["turns"]] == ["person", "model"]
    assert download(page, "Text (.txt)", tmp_path).read_text() == f"{QUESTION}\n\n{ANSWER}"
    alone = browser.new_context(offline=True).new_page()
    alone.goto(f"file://{download(page, 'Page (.html)', tmp_path)}")
    assert texts_of(alone) == [QUESTION, ANSWER]
    assert alone.locator("script, link, button").count() == 0
    alone.context.close()


def download(page: Page, button: str, folder: Path) -> Path:
    page.get_by_role("button", name="Share").click()
    with page.expect_download() as started:
        page.get_by_role("button", name=button).click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def texts_of(page: Page) -> list[str]:
    return page.locator(".turn .text").all_text_contents()


# ---- side by side ----


def test_surprise_stands_side_by_side_on_one_scale(page: Page, site: Server, shot: Shot) -> None:
    """The figures are those of the server's log-probabilities, in bits; both sides have the same pieces."""
    page.get_by_role("link", name="Side by side").click()
    text = BEGINNING + MIDDLE
    page.get_by_label("Text that both sides read").fill(text)
    page.get_by_role("button", name="Show surprise").click()
    left, right = page.locator(".side .text").all()
    expect(left.locator(".piece").first).to_be_visible()
    assert left.text_content() == right.text_content() == text
    assert left.locator(".piece").count() == right.locator(".piece").count()
    for side, reading in ((0, "forward"), (1, "backward")):
        bits = -sum(logprobs(site, "tale", reading, text)) / 0.6931471805599453
        per_byte = f"{bits / len(text.encode()):.3f} bits per byte"
        expect(page.locator(".figure").nth(side)).to_have_text(re.compile(f"^{re.escape(per_byte)}"))
    left.locator(".piece").nth(3).hover()
    expect(page.locator("#readout")).to_contain_text("left")
    assert left.locator(".here").text_content() == right.locator(".here").text_content()
    shot("surprise")
    page.get_by_label("Difference").check()
    shot("difference")
    shades = [side.locator(".piece").evaluate_all(SHADES) for side in (left, right)]
    assert [share for share, _ in shades[0]] == [share for share, _ in shades[1]]
    assert all(one != other for (share, one), (_, other) in zip(*shades, strict=True) if share != "0.0%")


SHADES = "pieces => pieces.map(one => [one.style.getPropertyValue('--share'), one.classList.contains('less')])"


def logprobs(site: Server, model: str, direction: str, text: str) -> list[float]:
    body = {"model": model, "direction": direction, "prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}
    return site.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]


def test_surprise_is_told_to_keyboard_and_screen_reader(page: Page) -> None:
    page.goto(page.url.partition("#")[0] + "#compare")
    page.get_by_label("Text that both sides read").fill("the river 東京")
    page.get_by_role("button", name="Show surprise").click()
    text = page.locator(".side .text").first
    expect(text.locator(".piece").first).to_be_visible()
    text.focus()
    text.press("ArrowRight")
    expect(page.locator("#readout")).to_contain_text("bits · difference")
    assert page.locator(".side .here").first.evaluate("one => one.dataset.at") == "0"
    text.press("ArrowLeft")
    page.get_by_text("Values as a table").click()
    rows = page.locator("#values tr")
    assert rows.count() == 1 + page.locator(".side").first.locator(".piece").count()
    assert (
        "".join(row.split("\t")[0] for row in page.locator("#values td:first-child").all_inner_texts())
        == "the river 東京"
    )


def test_two_sides_write_from_one_text(page: Page, shot: Shot) -> None:
    page.get_by_role("link", name="Side by side").click()
    page.get_by_label("Text that both sides read").fill(BEGINNING)
    page.locator("#left").select_option(label="→ tale")
    page.locator("#right").select_option(label="→ markup")
    page.get_by_role("button", name="Write from it").click()
    expect(page.locator("#compare-stop")).to_be_hidden()
    assert page.locator(".side .sheet").first.text_content() == BEGINNING + MIDDLE
    assert page.locator(".side .sheet").last.text_content().startswith(BEGINNING)
    shot("written")


def test_the_picture_is_saved(page: Page, browser: Browser, tmp_path: Path) -> None:
    page.goto(page.url.partition("#")[0] + "#compare")
    page.get_by_label("Text that both sides read").fill("the river")
    page.get_by_role("button", name="Show surprise").click()
    expect(page.get_by_role("button", name="Save picture")).to_be_enabled()
    with page.expect_download() as started:
        page.get_by_role("button", name="Save picture").click()
    started.value.save_as(tmp_path / "picture.html")
    alone = browser.new_context(offline=True).new_page()
    alone.goto(f"file://{tmp_path}/picture.html")
    shade = "piece => getComputedStyle(piece).backgroundColor"
    assert alone.locator(".piece").first.evaluate(shade) == page.locator(".piece").first.evaluate(shade)
    assert alone.locator("script, link, button, select").count() == 0
    alone.context.close()


# ---- how it looks ----


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough(page: Page, theme: str, shot: Shot) -> None:
    """WCAG AA: 4.5 to 1 for every text on what lies below it, on all shades of both scales too."""
    page.emulate_media(color_scheme=theme)
    choose(page, "past")
    assert low_contrast(page) == []
    send(page, ANSWER)
    ended(page)
    assert low_contrast(page) == []
    shot("chat")
    page.locator("#composer").get_by_role("button", name="Settings").click()
    assert low_contrast(page) == []
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("link", name="Side by side").click()
    page.get_by_label("Text that both sides read").fill(BEGINNING + MIDDLE)
    page.get_by_role("button", name="Show surprise").click()
    page.get_by_text("Values as a table").click()
    for colours in ("Surprise", "Difference"):
        page.get_by_label(colours, exact=True).check()
        page.locator(".piece").evaluate_all(
            "pieces => pieces.forEach((one, at) => one.style.setProperty('--share', `${(5 * at) % 101}%`))"
        )
        assert low_contrast(page) == []
        shot(colours.lower())


CONTRAST = Path(__file__).with_name("contrast.js").read_text()


def low_contrast(page: Page) -> list[str]:
    found: list[str] = page.evaluate(CONTRAST)
    return found


def test_colours_follow_the_system_until_one_is_chosen(page: Page) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert dark != light
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate(paper) == light
    page.reload()
    assert page.evaluate(paper) == light
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate(paper) == dark


@pytest.mark.parametrize("model", ["tale", "past"])
def test_a_narrow_screen_shows_all(page: Page, model: str, shot: Shot) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    choose(page, model)
    send(page, ANSWER if model == "past" else BEGINNING)
    ended(page)
    shot("chat")
    assert beyond(page) == []
    page.get_by_role("link", name="Side by side").click()
    page.get_by_label("Text that both sides read").fill(BEGINNING + "unbroken" * 20)
    page.get_by_role("button", name="Show surprise").click()
    expect(page.locator(".piece").first).to_be_visible()
    page.get_by_text("Values as a table").click()
    shot("compare")
    assert beyond(page) == []


def beyond(page: Page) -> list[str]:
    """Return the elements that stick out of the window at a side, but for those that scroll in a box of their own."""
    found: list[str] = page.evaluate(
        """() => [...document.body.querySelectorAll("*")].filter((one) => {
            const box = one.getBoundingClientRect();
            return box.width && !one.closest(".table, .unseen") && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map((one) => `${one.tagName} ${one.className}`)"""
    )
    return found


def test_every_control_has_a_name_and_shows_its_focus(page: Page) -> None:
    for view in ("#chat", "#compare"):
        page.goto(page.url.partition("#")[0] + view)
        nameless = page.evaluate(
            """() => {
                const name = (one) => one.ariaLabel || one.labels?.[0]?.textContent.trim() || one.textContent.trim();
                const controls = [...document.querySelectorAll("button, a, input, select, textarea")];
                return controls.filter((one) => !name(one)).map((one) => one.outerHTML);
            }"""
        )
        assert nameless == []
    page.goto(page.url.partition("#")[0] + "#chat")
    focus = "() => getComputedStyle(document.activeElement).outlineStyle"
    page.get_by_label("Message").press("Tab")
    assert page.evaluate(focus) == "solid"


def test_focus_stays_where_the_button_was(page: Page) -> None:
    choose(page, "helper")
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_role("button", name="Send").focus()
    page.keyboard.press("Enter")
    ended(page)
    expect(page.get_by_label("Message")).to_be_focused()


def test_keys_reach_the_field_and_write_lines(page: Page) -> None:
    choose(page, "helper")
    page.get_by_role("link", name="Chat").focus()
    page.keyboard.press("/")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("a/b")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("c")
    expect(page.get_by_label("Message")).to_have_value("a/b\nc")


def test_the_field_stays_where_it_is(page: Page, site: Server) -> None:
    """Nothing jumps: the field for the message has one place, before, while and after an answer is written."""
    choose(page, "helper")
    places = [page.locator(".field").bounding_box()]
    site.engine("helper").gate.let(10)
    send(page, QUESTION)
    expect(page.locator("#transcript .growing")).to_contain_text("I")
    places.append(page.locator(".field").bounding_box())
    site.engine("helper").gate.open()
    ended(page)
    places.append(page.locator(".field").bounding_box())
    assert places[0] == places[1] == places[2]


# ---- what the page computes ----

turns = st.lists(st.tuples(st.sampled_from(["forward", "backward"]), st.booleans()), max_size=8)


@given(st.sampled_from(["base", "whole", "turns"]), turns)
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[])
def orders_as_the_dialogue(page: Page, tokenizer: Tokenizer, kind: str, exchanges: list[tuple[str, bool]]) -> None:
    voice = Voice("bidirectional", "turns" if kind == "turns" else "whole", kind == "base")
    dialogue = Dialogue(voice, tokenizer)
    for number, (reading, answered) in enumerate(exchanges):
        dialogue.say(f"person {number}", reading)
        if answered or number + 1 < len(exchanges):
            dialogue.reply(f"model {number}")
    manners = {reading: voice.manner(reading) for reading in voice.readings}
    listed = [turn._asdict() for turn in dialogue.turns]
    order = page.evaluate(
        """async ([model, turns]) => {
            const { Talk } = await import("/talk.js");
            return new Talk(model, turns).inOrder.map((turn) => turn.text);
        }""",
        [{"manners": manners, "readings": list(voice.readings)}, listed],
    )
    assert order == [turn.text for turn in dialogue.in_order]


def test_turns_stand_in_the_order_of_the_dialogue(page: Page, tokenizer: Tokenizer) -> None:
    orders_as_the_dialogue(page, tokenizer)


def test_pieces_of_surprise_by_hand(page: Page) -> None:
    """Tokens of a part of a character are one piece; two tokenizations are compared on the cuts that both have."""
    found = page.evaluate(
        """async () => {
            const { aligned, figure, pieces } = await import("/surprise.js");
            const ln2 = Math.LN2;
            const bytes = { text: "a東b", offsets: [0, 1, 1, 1, 2], logprobs: [null, -ln2, -2 * ln2, -ln2, -3 * ln2] };
            const words = { text: "a東b", offsets: [0, 1], logprobs: [-ln2, -5 * ln2] };
            return [pieces(bytes), figure(bytes), aligned(pieces(bytes), pieces(words))];
        }"""
    )
    own, total, (left, right) = found
    assert own == [
        {"start": 0, "end": 1, "bits": None},
        {"start": 1, "end": 2, "bits": pytest.approx(4)},
        {"start": 2, "end": 3, "bits": pytest.approx(3)},
    ]
    assert total == {"bits": pytest.approx(7), "bytes": 4, "tokens": 4, "perByte": pytest.approx(7 / 4)}
    assert left[1] == {"start": 1, "end": 3, "bits": pytest.approx(7)}
    assert right == [{"start": 0, "end": 1, "bits": pytest.approx(1)}, {"start": 1, "end": 3, "bits": pytest.approx(5)}]


# ---- without the browser ----


def ask_in_background(site: Server, model: str) -> Future[str]:
    """Ask a model a question, and return what it will have answered."""
    answer: Future[str] = Future()
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}

    def ask() -> None:
        answer.set_result(site.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])

    threading.Thread(target=ask, daemon=True).start()
    return answer
