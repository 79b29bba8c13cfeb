"""Talks with trained models through a pipe, and what a terminal draws; real terminals are in test_pty.py."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bwlm.chat.dialogue import Dialogue, Voice
from bwlm.chat.engine import Engine
from bwlm.chat.reply import Reply
from bwlm.chat.settings import Settings
from bwlm.chat.talk import About, Talk
from bwlm.chat.terminal import Pipe, converse, drawn
from bwlm.evaluate.generation import MessageGenerator
from bwlm.format import visible
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.conversation import Message
from bwlm.trained.load import LoadedModel, load_model
from tests.runs import ANSWER, Answering, NewFamily

GREEDY = Settings(temperature=0.0, top_k=None)


def talk_with(folder: ExperimentFolder, settings: Settings = GREEDY) -> tuple[Talk, Engine, LoadedModel]:
    loaded = load_model(folder.path.parent, folder.id)
    voice = Voice.from_experiment(loaded.config.experiment)
    about = About(
        folder.id, loaded.step, "sft", 1, voice.direction, voice.reversal, loaded.config.shape.sequence_length
    )
    talk = Talk(about, Dialogue(voice, loaded.tokenizer), settings, voice.readings[0])
    return talk, Engine(loaded.model, slots=2), loaded


class Script:
    """A face that reads given lines and keeps what it is shown."""

    def __init__(self, lines: list[str], at_each: Callable[[str], None] = lambda text: None) -> None:
        self.lines, self.told, self.moments, self._at_each = lines, list[str](), list[list[str]](), at_each

    def read(self, reading: str) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def tell(self, text: str) -> None:
        self.told.append(text)

    @contextmanager
    def showing(self, talk: Talk, reply: Reply) -> Iterator[Callable[[], None]]:
        self.moments.append([])

        def show() -> None:
            self.moments[-1].append(reply.text)
            self._at_each(reply.text)

        yield show


# ---- what is said ----


@pytest.mark.parametrize(
    ("direction", "reversal"), [("forward", "whole"), ("backward", "turns"), ("bidirectional", "turns")]
)
def test_a_model_answers_turn_after_turn(answering: Answering, direction: str, reversal: str) -> None:
    talk, engine, _ = talk_with(answering(direction, reversal))
    face = Script(["stone window", "letter"])
    converse(talk, engine, face)
    assert [turn.text for turn in talk.dialogue.turns] == ["stone window", ANSWER, "letter", ANSWER]
    for moments in face.moments:
        assert len(set(moments)) > 1, "it does not stream"
        for moment in moments:
            assert ANSWER.endswith(moment) if direction == "backward" else ANSWER.startswith(moment)


def test_a_model_that_asks_writes_what_evaluation_would_have_it_write(answering: Answering) -> None:
    talk, engine, loaded = talk_with(answering("backward", "whole"))
    face = Script([ANSWER, ANSWER])
    converse(talk, engine, face)
    first, second = (turn.text for turn in talk.dialogue.turns if turn.speaker == "model")
    writer = MessageGenerator("backward", "whole", loaded.tokenizer, 256)
    ending = [Message("user", "?"), Message("assistant", ANSWER)]
    for written, conversation in ((first, ending), (second, [*ending, Message("user", first), ending[1]])):
        prompt = writer.prompt(conversation, "backward")
        [message] = writer.generate(loaded.model, [prompt], "backward", seeds=[0])
        assert (written, message.finished) == (message.text, True)
    assert all(first.endswith(moment) for moment in face.moments[0])


def test_both_directions_in_one_talk(answering: Answering) -> None:
    talk, engine, _ = talk_with(answering("bidirectional", "whole"))
    face = Script(["stone", "/backward", ANSWER, "/forward", "window"])
    converse(talk, engine, face)
    said = [turn.text for turn in talk.dialogue.in_order]
    assert (said[1], said[3:]) == (ANSWER, [ANSWER, "window", ANSWER])
    assert said[2] == "stone"
    assert said[0] == talk.dialogue.turns[3].text != ""


def test_the_same_seed_says_the_same_and_retry_says_another(answering: Answering) -> None:
    drawn_ = replace(GREEDY, temperature=1.5, seed=4)
    texts = []
    for _ in range(2):
        talk, engine, _ = talk_with(answering("backward", "whole"), drawn_)
        for line in (ANSWER, "/retry", "/retry", "/retry"):
            converse(talk, engine, Script([line]))
            texts.append(talk.dialogue.turns[-1].text)
    assert texts[:4] == texts[4:]
    assert len(set(texts)) > 1


def test_a_message_that_is_too_long_is_told_and_the_talk_goes_on(answering: Answering) -> None:
    talk, engine, _ = talk_with(answering("forward", "whole"))
    face = Script(["stone " * 100, "stone"])
    converse(talk, engine, face)
    assert "the model has room for 33: shorten it" in face.told[0]
    assert [turn.text for turn in talk.dialogue.turns] == ["stone", ANSWER]


# ---- Ctrl-C ----


def test_ctrl_c_keeps_what_was_written_and_the_talk_goes_on(trained_base: NewFamily) -> None:
    def interrupt(text: str) -> None:
        if len(text) > 5:
            os.kill(os.getpid(), signal.SIGINT)

    talk, engine, _ = talk_with(trained_base("forward"), replace(GREEDY, max_tokens=60))
    before = signal.getsignal(signal.SIGINT)
    face = Script(["The river"], interrupt)
    converse(talk, engine, face)
    kept = talk.dialogue.turns[-1].text
    assert kept == face.moments[0][-1]
    assert len(face.moments[0]) < 60
    assert face.told == ["stopped: /retry writes another answer"]
    assert signal.getsignal(signal.SIGINT) == before
    assert (engine.running, engine.queued) == (0, 0)
    whole = Script(["/retry"])
    converse(talk, engine, whole)
    assert talk.dialogue.turns[-1].text.startswith(kept)
    assert len(talk.dialogue.turns[-1].text) > len(kept)


# ---- a pipe ----


def test_a_pipe_reads_lines_and_prints_answers_alone(
    answering: Answering, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, engine, _ = talk_with(answering("forward", "whole"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("stone\r\n/forwrad\n\nwindow"))
    converse(talk, engine, Pipe())
    shown = capsys.readouterr()
    assert shown.out == f"{ANSWER}\n{ANSWER}\n"
    assert shown.err == "/forwrad: no such command (did you mean '/forward'?); /help lists them\n"


def test_what_a_model_writes_steers_no_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\x00\r\x7f\x9b31m\n\tnaïve 東京") == "a␛[2Jb␇␀␍␡�31m\n\tnaïve 東京"


# ---- what is drawn ----


def screen_of(dialogue: Dialogue, written: str, width: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(drawn(dialogue, written))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_backward_talk_is_drawn_in_the_order_of_time(answering: Answering) -> None:
    tokenizer: Any = load_model(answering("backward", "whole").path.parent, "backward-whole").tokenizer
    dialogue = Dialogue(Voice("backward", "whole", False), tokenizer)
    dialogue.say("Fine, thank you.", "backward")
    assert screen_of(dialogue, "are you?") == ["model  are you?", "you    Fine, thank you."]
    dialogue.reply("How are you?")
    dialogue.say("Good morning\x1b!", "backward")
    assert screen_of(dialogue, "") == [
        "model", "you    Good morning␛!", "model  How are you?", "you    Fine, thank you.",
    ]  # fmt: skip


def test_an_answer_from_its_end_is_drawn_alone_and_a_document_as_one_text(answering: Answering) -> None:
    tokenizer: Any = load_model(answering("backward", "whole").path.parent, "backward-whole").tokenizer
    dialogue = Dialogue(Voice("backward", "turns", False), tokenizer)
    dialogue.say("How are you?", "backward")
    assert screen_of(dialogue, "thank you, and you yourself?") == ["model  thank you, and you", "       yourself?"]
    document = Dialogue(Voice("backward", "whole", True), tokenizer)
    document.say("it ended.", "backward")
    assert screen_of(document, "And so ") == ["And so it ended."]
    document.reply("And so ")
    document.say("Earlier.", "backward")
    assert screen_of(document, "") == ["Earlier.", "", "And so it ended."]
