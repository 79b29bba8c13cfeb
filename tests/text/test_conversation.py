"""Conversations: what is refused, the rendering and the mask worked out by hand, and that training's mask and what chat
gives and awaits are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.config import Reversal
from bwlm.directions import READINGS, is_marked, own_readings
from bwlm.errors import UserError
from bwlm.text.conversation import (
    Conversation,
    Message,
    TurnIds,
    arrange_conversation,
    build_prompt,
    check_conversation,
    cut_to,
    loss_mask,
    parts_of,
    predicts_user_turn,
    read_message,
    render,
    restore_conversation,
)
from bwlm.text.direction import HEAD_SLOTS, Layout, Rows, SpecialIds, lay_out
from bwlm.text.tokenizer import Tokenizer

law = settings(derandomize=True, deadline=None, max_examples=80)
BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})
TURNS, SPECIAL = TurnIds.from_tokenizer(BYTES), SpecialIds.from_tokenizer(BYTES)
US, UE, AS, AE = TURNS.user_start, TURNS.user_end, TURNS.assistant_start, TURNS.assistant_end
REVERSALS: tuple[Reversal, ...] = ("whole", "turns")

texts = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    exchanges = draw(st.integers(1, 3))
    return [Message("user" if index % 2 == 0 else "assistant", draw(texts)) for index in range(2 * exchanges)]


def said(*contents: str) -> list[dict[str, str]]:
    """A user's and an assistant's messages in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def as_rows(*tokens: np.ndarray) -> Rows:
    """One segment a row."""
    lengths, index = np.array([len(ids) for ids in tokens]), np.arange(len(tokens))
    return Rows(
        len(tokens), np.concatenate(tokens).astype(np.int64), lengths, index, index, index, index >= 0, 0 * index
    )


# ---- what is refused ----


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hello", "shard:3: messages: must be a list of messages (found a string)"),
        (None, "messages: must be a list of messages (found nothing)"),
        ([], "messages: empty"),
        (["hello"], "messages[0]: must be an object with role and content (found a string)"),
        ([{"role": "user"}], "messages[0].content: must be a string (found nothing)"),
        ([{"role": "user", "content": 3}], "messages[0].content: must be a string (found 3)"),
        ([{"role": "assitant", "content": "x"}], "'assitant' is not one of system, user, assistant (did you mean"),
        (said("hi", " \n"), "messages[1].content: empty"),
        ([*said("hi"), *said("hello")], "messages[1].role: user again"),
        (said("hi", "hello", "and"), "from user to user: begin with the user and end with the assistant"),
        (said("hi", "hello")[1:], "from assistant to assistant"),
        (
            [{"role": "system", "content": "be kind"}, *said("a", "b")[1:]],
            "from assistant to assistant",
        ),
        ([{"role": "system", "content": "be kind"}], "messages: empty"),
        ([{"role": "system", "content": "be kind"}, *said("a"), *said("b", "c")], "messages[2].role: user again"),
        ([*said("a", "b"), {"role": "system", "content": "c"}], "messages[2].role: system: only the first message may"),
        ([*said("a", "b"), {"role": "system", "content": "c"}, *said("d", "e")], "messages[2].role: system: only the"),
    ],
)
def test_a_malformed_conversation_is_one_line_that_names_the_place(messages: object, told: str) -> None:
    with pytest.raises(UserError) as error:
        check_conversation(messages, "shard:3: messages")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_system_message_becomes_the_beginning_of_the_users() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *said("Hello", "Hi")]
    assert check_conversation(messages, "x") == [Message("user", "Be kind.\n\nHello"), Message("assistant", "Hi")]


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_system_message_counts_as_none(content: str) -> None:
    messages = [{"role": "system", "content": content}, *said("Hello", "Hi")]
    assert check_conversation(messages, "x") == check_conversation(said("Hello", "Hi"), "x")


# ---- rendering ----


def test_the_rendering_by_hand() -> None:
    conversation = check_conversation(said("ab", "cd", "e", "f"), "x")
    a, b, c, d, e, f = b"abcdef"
    assert render(conversation, BYTES).tolist() == [US, a, b, UE, AS, c, d, AE, US, e, UE, AS, f, AE]


@law
@given(texts, texts)
def test_text_that_looks_like_a_marker_stays_text(before: str, after: str) -> None:
    text = f"{before}<|assistant_end|><|bos|><|user_start|>{after}"
    ids = render([Message("user", text), Message("assistant", text)], BYTES)
    assert TURNS.markers(ids.astype(np.int64)).sum() == 4
    assert not (ids == BYTES.bos).any()
    assert read_message(ids[1 : 1 + len(text.encode())].tolist(), "forward", BYTES) == text


def test_a_conversation_that_is_too_long_ends_after_its_last_whole_answer() -> None:
    ids = render(check_conversation(said("ab", "cd", "e", "f"), "x"), BYTES)  # 8 tokens, then 6
    assert cut_to(ids, 14, TURNS) is ids
    for room in range(8, 14):
        assert (cut_to(ids, room, TURNS) == ids[:8]).all(), room
    for room in (6, 7):
        kept = cut_to(ids, room, TURNS)
        assert kept is not None
        assert kept.tolist() == ids[:room].tolist()  # without its end marker: nothing says that it ended there
    for room in range(6):
        assert cut_to(ids, room, TURNS) is None, room


def test_a_megabyte_is_cut_like_any_other() -> None:
    ids = render(check_conversation(said("a" * 10**6, "b"), "x"), BYTES)
    assert cut_to(ids, 256, TURNS) is None
    ids = render(check_conversation(said("a", "b" * 10**6), "x"), BYTES)
    assert cut_to(ids, 256, TURNS).tolist() == [US, ord("a"), UE, AS, *[ord("b")] * 252]  # type: ignore[union-attr]


# ---- reversal ----


def test_what_is_turned_around_by_hand() -> None:
    ids = render(check_conversation(said("ab", "cd", "ef", "gh"), "x"), BYTES).astype(np.int64)
    a, b, c, d, e, f, g, h = b"abcdefgh"
    whole = [AE, h, g, AS, UE, f, e, US, AE, d, c, AS, UE, b, a, US]
    turns = [US, b, a, UE, AS, d, c, AE, US, f, e, UE, AS, h, g, AE]
    assert arrange_conversation(ids, "backward", "whole", TURNS).tolist() == whole
    assert arrange_conversation(ids, "backward", "turns", TURNS).tolist() == turns
    for reversal in REVERSALS:
        assert arrange_conversation(ids, "forward", reversal, TURNS).tolist() == ids.tolist()


@law
@given(conversations(), st.sampled_from(READINGS), st.sampled_from(REVERSALS))
def test_restoring_is_the_inverse(conversation: Conversation, reading: str, reversal: Reversal) -> None:
    ids = render(conversation, BYTES).astype(np.int64)
    arranged = arrange_conversation(ids, reading, reversal, TURNS)
    assert restore_conversation(arranged, reading, reversal, TURNS).tolist() == ids.tolist()
    if reversal == "turns":
        assert (TURNS.markers(arranged) == TURNS.markers(ids)).all()
        assert (arranged[TURNS.markers(ids)] == ids[TURNS.markers(ids)]).all()


@law
@given(st.lists(st.lists(st.integers(254, 266), max_size=9), min_size=1, max_size=5))
def test_parts_cut_anything_into_markers_and_the_text_between(segments: list[list[int]]) -> None:
    """Also of pieces of conversations, which begin and end anywhere, and of segments without tokens."""
    tokens, lengths = np.array([id_ for segment in segments for id_ in segment]), np.array(list(map(len, segments)))
    tokens = tokens.astype(np.int64)
    parts = parts_of(tokens, lengths, TURNS)
    ends = set(np.cumsum(parts).tolist())
    assert parts.sum() == len(tokens)
    assert set(np.cumsum(lengths)[lengths > 0].tolist()) <= ends
    for start, length in zip(np.cumsum(parts) - parts, parts, strict=True):
        inside = TURNS.markers(tokens[start : start + length])
        assert length == 1 or not inside.any()
    between = [end for end in ends if 0 < end < len(tokens)]
    edges = np.cumsum(lengths)
    for end in between:  # no text is cut without need
        assert TURNS.markers(tokens[end - 1 : end + 1]).any() or end in edges


# ---- what is written ----


@pytest.mark.parametrize(
    ("reading", "reversal", "expected"),
    [
        ("forward", "whole", "cd] gh]"),
        ("backward", "whole", "(ab (ef"),
        ("forward", "turns", "cd] gh]"),
        ("backward", "turns", "cd] gh]"),
    ],
)
def test_what_is_written_by_hand(reading: str, reversal: Reversal, expected: str) -> None:
    ids = render(check_conversation(said("ab", "cd", "ef", "gh"), "x"), BYTES).astype(np.int64)
    mask = loss_mask(ids, np.array([len(ids)]), np.array([READINGS.index(reading)]), reversal, TURNS)
    shown = {US: "(", UE: ")", AS: "[", AE: "]"}
    kept = "".join(shown.get(int(id_), chr(id_)) for id_, is_written in zip(ids, mask, strict=True) if is_written)
    assert kept == expected.replace(" ", "")


def test_what_is_written_ends_at_the_segment() -> None:
    """A conversation that was cut has no end marker, and what follows it in the row is another one."""
    cut = np.array([US, 1, UE, AS, 2])
    piece = np.array([3, UE, AS, 4, AE])  # begins inside of a message of which nobody knows whose it is
    tokens, lengths = np.concatenate([cut, piece, piece]), np.array([5, 5, 5])
    mask = loss_mask(tokens, lengths, np.array([0, 0, 1]), "whole", TURNS)
    assert mask.tolist() == [False] * 4 + [True] + [False] * 3 + [True] * 2 + [False] * 5


def test_an_answer_that_was_cut_is_not_taken_for_one_that_ends_there() -> None:
    """Read from where it was cut, it would begin with a token that ends no answer."""
    cut, whole = np.array([US, 1, UE, AS, 2, 3, 4]), np.array([US, 1, UE, AS, 2, 3, AE])
    tokens, lengths = np.concatenate([cut, cut, whole, whole[:0]]), np.array([7, 7, 7, 0])
    mask = loss_mask(tokens, lengths, np.array([0, 1, 1, 1]), "turns", TURNS)
    before = [False] * 4
    assert mask.tolist() == [*before, True, True, True, *before, True, True, False, *before, True, True, True]


@law
@given(conversations(), st.sampled_from(["forward", "backward", "bidirectional"]), st.sampled_from(REVERSALS))
def test_training_teaches_exactly_what_chat_gives_and_awaits(
    conversation: Conversation, direction: str, reversal: Reversal
) -> None:
    """Of the ids that a row trains on, each written message follows its opening, and its closing marker is the stop."""
    for reading in own_readings(direction):
        rows = as_rows(render(conversation, BYTES))
        number = np.array([READINGS.index(reading)])
        mask = loss_mask(rows.tokens, rows.lengths, number, reversal, TURNS)
        parts = parts_of(rows.tokens, rows.lengths, TURNS) if reversal == "turns" else None
        width = int(rows.lengths[0]) + HEAD_SLOTS
        laid = lay_out(rows, number, is_marked(direction), SPECIAL, width, Layout(parts=parts, targets=mask))
        ids, targets = laid.ids[0], laid.targets[0]

        asking = predicts_user_turn(reading, reversal)
        role = "user" if asking else "assistant"
        supervised = 0
        for index in [i for i, message in enumerate(conversation) if message.role == role]:
            context = conversation[index + 1 :] if asking else conversation[:index]
            given_, stop = build_prompt(context, reading, direction, reversal, BYTES)
            assert ids[: len(given_)].tolist() == given_
            wanted = np.frombuffer(conversation[index].content.encode(errors="replace"), np.uint8).astype(np.int64)
            answer = [*(wanted if reading == "forward" else wanted[::-1]).tolist(), stop]
            place = slice(len(given_) - 1, len(given_) - 1 + len(answer))
            assert targets[place].tolist() == answer
            assert read_message(answer, reading, BYTES) == BYTES.decode(wanted)
            supervised += len(answer)
        assert (targets >= 0).sum() == supervised


@pytest.mark.parametrize(
    ("conversation", "reading", "told"),
    [
        ([Message("user", "a")], "backward", "must begin with the assistant"),
        ([Message("assistant", "a")], "forward", "must end with the user"),
        ([], "forward", "must end with the user"),
        ([Message("user", "a"), Message("user", "b")], "forward", "messages[1].role: user again"),
    ],
)
def test_an_opening_that_nothing_can_follow_is_refused(conversation: Conversation, reading: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        build_prompt(conversation, reading, reading, "whole", BYTES)
    assert told in str(error.value)
