"""Dialogues: what a model is given at each turn is what training would have laid out, and the talk keeps its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.chat.dialogue import Dialogue, Turn, Voice, document_prompt, from_talk, prompt_room
from bwlm.config import Experiment
from bwlm.directions import DIRECTIONS, READINGS, is_marked
from bwlm.errors import UserError
from bwlm.text.conversation import Conversation, Message, Prompt, TurnIds, TurnLayout, build_prompt, render, row_layout
from bwlm.text.direction import HEAD_SLOTS, Rows, SpecialIds, lay_out
from bwlm.text.tokenizer import Tokenizer

law = settings(derandomize=True, deadline=None, max_examples=80)
BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})
TURNS, SPECIAL = TurnIds.from_tokenizer(BYTES), SpecialIds.from_tokenizer(BYTES)
BOS, FORWARD, BACKWARD = BYTES.bos, BYTES.forward, BYTES.backward
US, UE, AS, AE = TURNS.user_start, TURNS.user_end, TURNS.assistant_start, TURNS.assistant_end
ROOM = 10_000

TALKING = [
    (direction, reversal) for direction in ("forward", "backward", "bidirectional") for reversal in ("whole", "turns")
]
texts = st.text(min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


def laid_out(tokens: np.ndarray, direction: str, reading: str, turns: TurnLayout | None) -> list[int]:
    """The ids of a row with this one segment, by the code that lays out the rows of training."""
    one = np.array([len(tokens)])
    zero = np.zeros(1, np.int64)
    rows = Rows(1, tokens.astype(np.int64), one, zero, zero, zero, zero == 0, zero)
    number = np.array([READINGS.index(reading)])
    layout = row_layout(reading, rows, number, turns)
    return [
        int(id) for id in lay_out(rows, number, is_marked(direction), SPECIAL, len(tokens) + HEAD_SLOTS, layout).ids[0]
    ]


def training_row(conversation: Conversation, voice: Voice, reading: str) -> list[int]:
    turns = TurnLayout(TURNS, voice.reversal, True)
    return laid_out(render(conversation, BYTES), voice.direction, reading, turns)


def talk(voice: Voice, exchanges: list[tuple[str, str, str]]) -> Dialogue:
    """A dialogue of (reading, what the person says, what the model writes)."""
    dialogue = Dialogue(voice, BYTES)
    for reading, said, written in exchanges:
        dialogue.say(said, reading)
        dialogue.reply(written)
    return dialogue


def shown(ids: list[int]) -> str:
    """Ids as a line: bytes as characters, markers as brackets."""
    marks = {BOS: "^", FORWARD: ">", BACKWARD: "<", US: "(", UE: ")", AS: "[", AE: "]"}
    return "".join(marks.get(id, chr(id)) for id in ids)


# ---- by hand ----


@pytest.mark.parametrize(
    ("voice", "readings", "prompts", "order"),
    [
        (
            Voice("forward", "whole", False),
            ["forward"] * 3,
            ["^(a1)[", "^(a1)[A1](b1)[", "^(a1)[A1](b1)[B1](c1)["],
            "aAbBcC",
        ),
        (Voice("backward", "turns", False), ["backward"] * 2, ["^(1a)[", "^(1a)[1A](1b)["], "aAbB"),
        # the person's text is an answer, the ending; the model asks, and the next turn goes further back
        (
            Voice("backward", "whole", False),
            ["backward"] * 3,
            ["^]1a[)", "^]1a[)1A(]1b[)", "^]1a[)1A(]1b[)1B(]1c[)"],
            "CcBbAa",
        ),
        (
            Voice("bidirectional", "whole", False),
            ["forward", "backward", "forward"],
            ["^>(a1)[", "^<]1A[)1a(]1b[)", "^>(B1)[b1](a1)[A1](c1)["],
            "BbaAcC",
        ),
        (
            Voice("bidirectional", "turns", False),
            ["forward", "backward", "forward"],
            ["^>(a1)[", "^<(1a)[1A](1b)[", "^>(a1)[A1](b1)[B1](c1)["],
            "aAbBcC",
        ),
        (Voice("forward", "whole", True), ["forward"] * 2, ["^a1", "^a1A1\n\nb1"], "aAbB"),
        (Voice("backward", "whole", True), ["backward"] * 2, ["^1a", "^1a1A\n\n1b"], "BbAa"),
        (
            Voice("bidirectional", "whole", True),
            ["forward", "backward", "forward"],
            ["^>a1", "^<1A1a\n\n1b", "^>B1b1\n\na1A1\n\nc1"],
            "BbaAcC",
        ),
    ],
)
def test_a_dialogue_by_hand(voice: Voice, readings: list[str], prompts: list[str], order: str) -> None:
    dialogue = Dialogue(voice, BYTES)
    for reading, person, prompt in zip(readings, "abc", prompts, strict=False):
        dialogue.say(f"{person}1", reading)
        fitted = dialogue.prompt(ROOM)
        assert (shown(fitted.prompt.ids), fitted.dropped) == (prompt, 0)
        dialogue.reply(f"{person.upper()}1")
    assert "".join(turn.text[0] for turn in dialogue.in_order) == order


def test_the_model_asks_what_the_person_answers() -> None:
    """A person who talks to a model that reads conversations backward writes the answer, the model the question."""
    dialogue = talk(Voice("backward", "whole", False), [("backward", "12", "3*4"), ("backward", "Yes.", "Ready?")])
    assert dialogue.messages == [
        Message("user", "Ready?"),
        Message("assistant", "Yes."),
        Message("user", "3*4"),
        Message("assistant", "12"),
    ]


@pytest.mark.parametrize(
    ("voice", "does"),
    [
        (Voice("forward", "whole", True), {"forward": ("goes_on", False)}),
        (Voice("backward", "turns", True), {"backward": ("goes_on", True)}),
        (Voice("forward", "whole", False), {"forward": ("answers", False)}),
        (Voice("backward", "whole", False), {"backward": ("asks", True)}),
        (Voice("backward", "turns", False), {"backward": ("answers", False)}),
        (Voice("bidirectional", "whole", False), {"forward": ("answers", False), "backward": ("asks", True)}),
        (Voice("bidirectional", "turns", False), {"forward": ("answers", False), "backward": ("answers", False)}),
    ],
)
def test_the_manner_follows_from_the_training(voice: Voice, does: dict[str, tuple[str, bool]]) -> None:
    assert {reading: (voice.manner(reading), voice.writes_at_front(reading)) for reading in voice.readings} == does
    assert all(voice.does(reading) for reading in voice.readings)


# ---- what training would have laid out ----


@st.composite
def dialogues(draw: st.DrawFn, on_documents: bool) -> tuple[Voice, list[tuple[str, str, str]]]:
    direction, reversal = draw(st.sampled_from(TALKING))
    readings = st.sampled_from(DIRECTIONS[direction].readings)
    exchanges = draw(st.lists(st.tuples(readings, texts, texts), min_size=1, max_size=4))
    return Voice(direction, reversal, on_documents), exchanges


@law
@given(dialogues(False))
def test_every_prompt_is_the_beginning_of_the_row_of_training(case: tuple[Voice, list[tuple[str, str, str]]]) -> None:
    """The row of the conversation in which the model has written its message, in the order of time: the prompt, then
    the message as the model writes it, then the marker that stops it."""
    voice, exchanges = case
    dialogue = Dialogue(voice, BYTES)
    for reading, said, written in exchanges:
        dialogue.say(said, reading)
        prompt = dialogue.prompt(ROOM).prompt
        dialogue.reply(written)
        row = training_row(dialogue.messages, voice, reading)
        ids = BYTES.encode(written).tolist()
        answer = [*(ids if reading == "forward" else reversed(ids)), prompt.stop]
        assert row[: len(prompt.ids) + len(answer)] == [*prompt.ids, *answer]
        assert not dialogue.banned(prompt) & set(answer)
        roles = [message.role for message in dialogue.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@law
@given(dialogues(True))
def test_every_prompt_of_documents_is_the_beginning_of_a_document(
    case: tuple[Voice, list[tuple[str, str, str]]],
) -> None:
    voice, exchanges = case
    dialogue, text = Dialogue(voice, BYTES), ""
    for reading, said, written in exchanges:
        dialogue.say(said, reading)
        prompt = dialogue.prompt(ROOM).prompt
        text = "\n\n".join(filter(None, [said, text] if reading == "backward" else [text, said]))
        so_far = BYTES.encode(text)
        assert prompt.ids == laid_out(so_far, voice.direction, reading, None)[: len(prompt.ids)]
        assert len(prompt.ids) == len(so_far) + 1 + is_marked(voice.direction)
        assert prompt.stop == BOS
        dialogue.reply(written)
        text = written + text if reading == "backward" else text + written


@law
@given(dialogues(False))
def test_what_a_model_wrote_before_stands_where_it_was_written(case: tuple[Voice, list[tuple[str, str, str]]]) -> None:
    """Turns at the front come first, the last one first of all; the others follow in the order of the talk."""
    voice, exchanges = case
    order: list[str] = []
    for index, (reading, _, _) in enumerate(exchanges):
        person, model = f"p{index}", f"m{index}"
        order = [model, person, *order] if voice.manner(reading) == "asks" else [*order, person, model]
    dialogue = talk(voice, [(reading, f"p{n}", f"m{n}") for n, (reading, _, _) in enumerate(exchanges)])
    assert [turn.text for turn in dialogue.in_order] == order
    assert [message.content for message in dialogue.messages] == order


def test_every_switch_of_direction_can_be_shown_and_prompted() -> None:
    """A predecessor crashed on the display after a switch, and showed a backward talk upside down."""
    for reversal in ("whole", "turns"):
        for on_documents in (False, True):
            for pattern in range(16):
                readings = [("forward", "backward")[pattern >> n & 1] for n in range(4)]
                dialogue = Dialogue(Voice("bidirectional", reversal, on_documents), BYTES)  # type: ignore[arg-type]
                for n, reading in enumerate(readings):
                    dialogue.say(f"p{n}", reading)
                    assert len(dialogue.in_order) == 2 * n + 1
                    prompt = dialogue.prompt(ROOM).prompt
                    assert prompt.ids[:2] == [BOS, FORWARD if reading == "forward" else BACKWARD]
                    assert is_marked("bidirectional")
                    assert {FORWARD, BACKWARD}.isdisjoint(prompt.ids[2:]), "one marker, after BOS"
                    dialogue.reply(f"m{n}")
                at_front = {n for n in range(4) if dialogue.voice.writes_at_front(readings[n])}
                names = [turn.text for turn in dialogue.in_order]
                assert names[: 2 * len(at_front)] == [f"{who}{n}" for n in sorted(at_front)[::-1] for who in "mp"]


# ---- undo, retry, clear ----


def test_a_reply_is_taken_back_for_another_one_from_the_same_prompt() -> None:
    dialogue = talk(Voice("backward", "whole", False), [("backward", "a", "A"), ("backward", "b", "B")])
    dialogue.retract_reply()
    assert [turn.text for turn in dialogue.in_order] == ["b", "A", "a"]
    again = dialogue.prompt(ROOM)
    dialogue.reply("other")
    dialogue.retract_reply()
    assert dialogue.prompt(ROOM) == again
    dialogue.retract_reply()  # of a message without a reply it changes nothing
    assert dialogue.prompt(ROOM) == again


def test_an_exchange_is_taken_back_whole() -> None:
    dialogue = talk(Voice("bidirectional", "whole", False), [("forward", "a", "A"), ("backward", "b", "B")])
    assert dialogue.undo() == "b"
    assert [turn.text for turn in dialogue.turns] == ["a", "A"]
    dialogue.say("c", "forward")
    assert dialogue.undo() == "c"
    assert dialogue.undo() == "a"
    assert dialogue.turns == []
    for forbidden in (dialogue.undo, dialogue.retract_reply):
        with pytest.raises(UserError, match="nothing was said yet"):
            forbidden()


def test_a_cleared_dialogue_begins_anew() -> None:
    dialogue = talk(Voice("forward", "whole", False), [("forward", "a", "A")])
    dialogue.clear()
    dialogue.say("b", "forward")
    assert shown(dialogue.prompt(ROOM).prompt.ids) == "^(b)["


def test_a_message_is_refused_where_none_can_stand() -> None:
    dialogue = Dialogue(Voice("forward", "whole", False), BYTES)
    with pytest.raises(UserError, match="the message is empty"):
        dialogue.say(" \n", "forward")
    with pytest.raises(UserError, match="trained forward and cannot write backward"):
        dialogue.say("a", "backward")
    with pytest.raises(UserError, match="'sideways' is not one of forward, backward"):
        dialogue.say("a", "sideways")
    assert dialogue.turns == []
    dialogue.say("a", "forward")
    with pytest.raises(UserError, match="the model has not written its message"):
        dialogue.say("b", "forward")


@law
@given(dialogues(False))
def test_a_dialogue_is_what_its_turns_say(case: tuple[Voice, list[tuple[str, str, str]]]) -> None:
    dialogue = talk(*case)
    dialogue.say("next", dialogue.voice.readings[-1])
    again = from_talk(dialogue.voice, BYTES, [Turn(*turn) for turn in dialogue.turns])
    assert again.prompt(ROOM) == dialogue.prompt(ROOM)


# ---- what does not fit ----


@law
@given(dialogues(False), st.integers(12, 60))
def test_whole_turns_are_left_out_farthest_from_where_the_model_writes(
    case: tuple[Voice, list[tuple[str, str, str]]], room: int
) -> None:
    """The prompt keeps the longest run of messages next to the writer that fits, in pairs."""
    voice, exchanges = case
    dialogue = talk(voice, exchanges[:-1])
    reading, said, _ = exchanges[-1]
    dialogue.say(said, reading)
    messages = dialogue.messages
    asks = voice.manner(reading) == "asks"

    def prompt_of(kept: Conversation) -> list[int]:
        row = training_row(
            [Message("user", "?"), *kept] if asks else [*kept, Message("assistant", "?")], voice, reading
        )
        return row[: 1 + is_marked(voice.direction) + len(render(kept, BYTES)) + 1]

    fitting = [
        dropped
        for dropped in range(0, len(messages), 2)
        if len(prompt_of(messages[: len(messages) - dropped] if asks else messages[dropped:])) <= room
    ]
    if not fitting:
        with pytest.raises(UserError, match=f"the model has room for {room}: shorten it"):
            dialogue.prompt(room)
        return
    fitted = dialogue.prompt(room)
    kept = messages[: len(messages) - fitting[0]] if asks else messages[fitting[0] :]
    assert (fitted.dropped, fitted.prompt.ids) == (fitting[0], prompt_of(kept))


def test_a_long_talk_is_not_laid_out_once_for_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server fits talks of 500 messages in its event loop, where all others wait for it."""
    laid_out = []

    def counted(messages: Conversation, *rest: Any) -> Prompt:
        laid_out.append(len(messages))
        return build_prompt(messages, *rest)

    monkeypatch.setattr("bwlm.chat.dialogue.build_prompt", counted)
    dialogue = talk(Voice("forward", "whole", False), [("forward", "said", "written")] * 249)
    dialogue.say("last", "forward")
    assert dialogue.prompt(100).dropped > 400
    assert len(laid_out) < 12


@pytest.mark.parametrize(
    ("direction", "reading", "kept"),
    [("forward", "forward", "^efgh"), ("backward", "backward", "^dcba"), ("bidirectional", "backward", "^<cba")],
)
def test_a_document_loses_the_tokens_that_are_farthest(direction: str, reading: str, kept: str) -> None:
    fitted = document_prompt("abcdefgh", reading, direction, BYTES, 5)
    assert (shown(fitted.prompt.ids), fitted.dropped) == (kept, 8 - len(kept.strip("^<")))
    assert shown(document_prompt("", reading, direction, BYTES, 5).prompt.ids) == kept[: 1 + is_marked(direction)]


@pytest.mark.parametrize(
    ("length", "max_tokens", "room"), [(64, 16, 49), (64, 500, 33), (64, 1, 64), (64, 0, 64), (2, 9, 2)]
)
def test_the_row_keeps_room_for_the_answer(length: int, max_tokens: int, room: int) -> None:
    assert prompt_room(length, max_tokens) == room


# ---- what a person types is text ----

MARKERS = "<|user_end|><|assistant_start|><|bos|><|backward|><|assistant_end|>"


@law
@given(dialogues(False), st.sampled_from([MARKERS, f"x{MARKERS}y"]))
def test_markers_that_are_typed_forge_no_role(case: tuple[Voice, list[tuple[str, str, str]]], typed: str) -> None:
    voice, exchanges = case
    dialogue = talk(voice, [(reading, f"{said}{typed}", f"{typed}{written}") for reading, said, written in exchanges])
    dialogue.say(typed, exchanges[0][0])
    ids = np.array(dialogue.prompt(100_000).prompt.ids)
    assert TURNS.markers(ids).sum() == 2 * len(dialogue.messages) + 1
    assert (ids == BOS).sum() == 1
    assert np.isin(ids, [FORWARD, BACKWARD]).sum() == is_marked(voice.direction)


@pytest.mark.parametrize("reading", ["forward", "backward"])
def test_markers_that_are_typed_to_a_model_of_documents_are_text(reading: str) -> None:
    ids = document_prompt(MARKERS, reading, reading, BYTES, ROOM).prompt.ids
    assert [id for id in ids if id >= 256] == [BOS]


# ---- the checkpoint says it ----


def experiment(**content: Any) -> Experiment:
    return Experiment.model_validate({"direction": "forward", "depth": 1, "lr": 1.0, "seed": 0} | content)


def test_the_voice_is_that_of_the_run() -> None:
    assert Voice.from_experiment(experiment(direction="backward")) == Voice("backward", "whole", True)
    with pytest.raises(UserError, match="direction permuted: a control"):
        Voice.from_experiment(experiment(direction="permuted"))
