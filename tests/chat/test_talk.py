"""What each line of a talk does, without a terminal and without a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bwlm.chat.dialogue import Dialogue, Voice
from bwlm.chat.settings import Settings
from bwlm.chat.talk import COMMANDS, About, Talk
from bwlm.errors import UserError
from bwlm.text.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})
BOTH = Voice("bidirectional", "whole", False)


def new_talk(voice: Voice = BOTH, length: int = 64, **settings: Any) -> Talk:
    about = About("mine", 1200, "sft", 4, voice.direction, voice.reversal, length)
    return Talk(about, Dialogue(voice, BYTES), Settings(**settings), voice.readings[0])


def exchange(talk: Talk, said: str, written: str) -> None:
    assert talk.enter(said) == ("", "write")
    talk.dialogue.reply(written)


def texts(talk: Talk) -> list[str]:
    return [turn.text for turn in talk.dialogue.turns]


# ---- messages ----


def test_a_line_is_a_message_unless_it_begins_with_a_slash() -> None:
    talk = new_talk()
    exchange(talk, "Hello", "Hi")
    exchange(talk, "two\nlines", "yes")
    exchange(talk, "//etc/hosts?", "a file")
    exchange(talk, " /help", "no")
    assert texts(talk)[::2] == ["Hello", "two\nlines", "/etc/hosts?", " /help"]
    assert talk.enter("  ") == ("", "listen")


def test_a_message_that_is_too_long_is_told_and_taken_back() -> None:
    talk = new_talk(max_tokens=32)
    exchange(talk, "a", "b")
    assert talk.enter("x" * 60).then == "write"
    with pytest.raises(UserError, match="takes 65 tokens, and the model has room for 33: shorten it"):
        talk.begin()
    assert texts(talk) == ["a", "b"]


def test_an_answer_that_cannot_be_written_anew_is_kept() -> None:
    """The room of a prompt depends on the settings, which may have changed since."""
    talk = new_talk(max_tokens=1)
    exchange(talk, "x" * 50, "yes")
    talk.enter("/set max_tokens 32")
    assert talk.enter("/retry").then == "write"
    with pytest.raises(UserError, match="shorten it"):
        talk.begin()
    assert texts(talk) == ["x" * 50, "yes"]


def test_every_answer_has_the_next_seed() -> None:
    """So a talk with the same seed, lines and settings is the same, and a second try is another one."""
    talk = new_talk(seed=7)
    talk.enter("a")
    seeds = [talk.begin()[0].request.seed for _ in range(3)]
    assert seeds == [7, 8, 9]
    talk.enter("/set seed 3")
    assert talk.begin()[0].request.seed == 3


def test_a_reply_is_asked_for_as_the_settings_say() -> None:
    talk = new_talk(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, max_tokens=20)
    talk.enter("ab")
    request = talk.begin()[0].request
    end = BYTES.specials["<|assistant_end|>"]
    assert request.max_tokens == 20
    assert request.stop == {end}
    assert asdict(request.sampling) == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "banned": frozenset(BYTES.specials.values()) - {end},
    }


@pytest.mark.parametrize(
    ("voice", "told"),
    [
        (BOTH, "2 messages left out at the beginning: the model reads 64 tokens at once"),
        (Voice("backward", "whole", False), "2 messages left out at the end: the model reads 64 tokens at once"),
        (Voice("forward", "whole", True), "14 tokens left out at the beginning: the model reads 64 tokens at once"),
        (Voice("backward", "whole", True), "14 tokens left out at the end: the model reads 64 tokens at once"),
    ],
)
def test_what_is_left_out_to_fit_is_told(voice: Voice, told: str) -> None:
    talk = new_talk(voice, max_tokens=32)
    exchange(talk, "a" * 20, "b" * 10)
    talk.enter("c" * (14 if voice.on_documents else 20))
    _, dropped = talk.begin()
    assert talk.left_out(dropped) == told
    assert talk.left_out(0) == ""


# ---- commands ----


def test_undo_retry_and_clear() -> None:
    talk = new_talk()
    exchange(talk, "first", "one")
    exchange(talk, "second", "two")
    assert talk.enter("/retry") == ("", "write")
    assert texts(talk) == ["first", "one", "second"]
    talk.dialogue.reply("three")
    assert talk.enter("/undo") == ("took back: second", "listen")
    assert texts(talk) == ["first", "one"]
    assert talk.enter("/clear") == ("2 messages forgotten", "listen")
    for command in ("/undo", "/retry"):
        assert talk.enter(command) == ("nothing was said yet", "listen")


def test_a_bidirectional_model_switches_between_turns() -> None:
    talk = new_talk()
    exchange(talk, "question", "answer")
    assert talk.enter("/backward") == ("backward: it writes the message that yours answers", "listen")
    exchange(talk, "earlier answer", "earlier question")
    assert talk.enter("/forward") == ("forward: it answers you", "listen")
    exchange(talk, "last question", "last answer")
    assert [turn.text for turn in talk.dialogue.in_order] == [
        "earlier question", "earlier answer", "question", "answer", "last question", "last answer",
    ]  # fmt: skip


@pytest.mark.parametrize(("direction", "other"), [("forward", "backward"), ("backward", "forward")])
def test_a_model_of_one_direction_says_why_it_cannot_switch(direction: str, other: str) -> None:
    talk = new_talk(Voice(direction, "whole", False))
    told = f"direction: this model was trained {direction} and cannot write {other}"
    assert talk.enter(f"/{other}") == (told, "listen")
    assert talk.reading == direction


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/undoo", "/undoo: no such command (did you mean '/undo'?); /help lists them"),
        ("/bakward", "(did you mean '/backward'?)"),
        ("/", "/: no such command; /help lists them"),
        ("/clear all", "/clear: takes nothing after it (found 'all')"),
        ("/set temprature 1", "temprature: no such setting (did you mean 'temperature'?): set one of temperature, "),
        ("/set temperature", "/set temperature: write its value after it, such as /set temperature 0.7"),
        ("/set temperature hot", "temperature: must be a number, such as 0.5 (found 'hot')"),
        ("/set temperature -1", "temperature must be at least 0 and finite, not -1.0"),
        ("/set temperature nan", "temperature must be at least 0 and finite, not nan"),
        ("/set top-k 0", "top_k must be at least 1, not 0"),
        ("/set top_k 1.5", "top_k: must be a whole number"),
        ("/set top_p 0", "top_p must be above 0 and at most 1, not 0.0"),
        ("/set min_p 2", "min_p must be 0 to 1, not 2.0"),
        ("/set repetition_penalty 0", "repetition_penalty must be 0.01 to 100, not 0.0"),
        ("/set max_tokens 0", "max_tokens must be at least 1, not 0"),
        ("/save", "/save: write the name of a file after it"),
        ("/save no/such/folder\0/x", "cannot be written"),
    ],
)
def test_a_mistake_is_a_line_and_changes_nothing(line: str, told: str) -> None:
    talk = new_talk()
    before = (talk.settings, talk.reading, texts(talk))
    outcome = talk.enter(line)
    assert told in outcome.told
    assert "\n" not in outcome.told
    assert outcome.then == "listen"
    assert (talk.settings, talk.reading, texts(talk)) == before


def test_each_setting_is_set() -> None:
    talk = new_talk(seed=1)
    for line in (
        "temperature 0.7", "top-k off", "top_p .9", "min-p 0.05", "repetition-penalty 1.1", "max_tokens 1e2", "seed 5"
    ):  # fmt: skip
        assert talk.enter(f"/set {line}").then == "listen"
    assert talk.settings == Settings(0.7, None, 0.9, 0.05, 1.1, 100, 5)
    shown = "temperature 0.7, top_k off, top_p 0.9, min_p 0.05, repetition_penalty 1.1, max_tokens 100, seed 5"
    assert talk.enter("/set") == (shown, "listen")


def test_a_saved_talk_can_be_sent_to_a_server(tmp_path: Path) -> None:
    talk = new_talk(seed=3)
    exchange(talk, "12", "naïve 東京")
    talk.enter("/backward")
    exchange(talk, "yes", "?")
    path = tmp_path / "talk.json"
    assert talk.enter(f"/save {path}") == (f"saved in {path}", "listen")
    saved = json.loads(path.read_text())
    assert saved == {
        "model": asdict(talk.about),
        "settings": asdict(talk.settings),
        "turns": [
            {"role": "user", "content": "12", "direction": "forward"},
            {"role": "assistant", "content": "naïve 東京", "direction": "forward"},
            {"role": "user", "content": "yes", "direction": "backward"},
            {"role": "assistant", "content": "?", "direction": "backward"},
        ],
    }
    assert talk.enter(f"/save {path}").told == f"{path}: there is such a file already: give another name"
    assert json.loads(path.read_text()) == saved


def test_help_names_every_command_and_every_command_is_known() -> None:
    told = new_talk().enter("/help").told
    for command in COMMANDS:
        assert command in told
        assert "no such command" not in new_talk().enter(command).told
    assert all(len(line) <= 100 for line in told.splitlines())


@pytest.mark.parametrize("command", ["/quit", "/exit", " /quit ".strip()])
def test_leaving(command: str) -> None:
    assert new_talk().enter(command) == ("", "leave")


@pytest.mark.parametrize(
    ("voice", "does"),
    [
        (Voice("forward", "whole", True), "Forward, it goes on with your text."),
        (Voice("backward", "whole", True), "Backward, it writes what came before your text."),
        (Voice("backward", "turns", False), "Backward, it answers you, each answer from its end."),
        (BOTH, "Forward, it answers you; backward, it writes the message that yours answers."),
    ],
)
def test_the_greeting_says_what_the_model_does(voice: Voice, does: str) -> None:
    assert new_talk(voice).greeting == f"mine, step 1,200: sft, depth 4. {does}"
