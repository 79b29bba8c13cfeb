"""Text that grows from ids: whole characters alone, at the end or at the front, up to a stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.chat.growth import TextGrowth
from bwlm.text.tokenizer import Tokenizer

law = settings(derandomize=True, deadline=None, max_examples=200)
BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})
READINGS = ("forward", "backward")
TEXTS = ["東京は日本の首都です。", "Ελλάδα, ἀρχὴ ἥμισυ", "Hyvää yötä, äiti", "🙂👩‍👩‍👧 naïve", "don't 1984"]

texts = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(TEXTS), max_size=2).map("".join))
broken = st.binary(max_size=10)
words = st.lists(st.one_of(texts.map(str.encode), broken), max_size=4).map(b"".join)


def grown(tokenizer: Tokenizer, ids: list[int], reading: str, stops: list[str]) -> tuple[TextGrowth, list[str]]:
    """The growth of ids in the order in which a model writes them, and its text after each id and at the end."""
    growth, moments = TextGrowth(tokenizer, reading, stops), list[str]()
    joined = ""
    for id in ids if reading == "forward" else reversed(ids):
        piece = growth.add(id)
        joined = joined + piece if reading == "forward" else piece + joined
        assert growth.text == joined
        moments.append(growth.text)
    piece = growth.close()
    assert growth.text == (joined + piece if reading == "forward" else piece + joined)
    return growth, [*moments, growth.text]


def cut_by_hand(text: str, reading: str, stops: list[str]) -> str:
    """The text up to the stop text that is complete first, one character at a time."""
    for length in range(1, len(text) + 1):
        part = text[:length] if reading == "forward" else text[-length:]
        ends = [s for s in stops if s and (part.endswith(s) if reading == "forward" else part.startswith(s))]
        if ends:
            longest = max(map(len, ends))
            return part[:-longest] if reading == "forward" else part[longest:]
    return text


@law
@given(words, st.sampled_from(READINGS))
def test_no_moment_shows_a_wrong_character_with_bytes_as_tokens(content: bytes, reading: str) -> None:
    check_moments(BYTES, list(content), reading)


@law
@given(st.lists(st.integers(0, 391), max_size=24), st.sampled_from(READINGS))
def test_no_moment_shows_a_wrong_character_with_any_ids(tokenizer: Tokenizer, ids: list[int], reading: str) -> None:
    check_moments(tokenizer, ids, reading)


@law
@given(texts, st.sampled_from(READINGS))
def test_no_moment_shows_a_wrong_character_with_merged_tokens(tokenizer: Tokenizer, text: str, reading: str) -> None:
    check_moments(tokenizer, tokenizer.encode(text).tolist(), reading)


def check_moments(tokenizer: Tokenizer, ids: list[int], reading: str) -> None:
    whole = tokenizer.decode(ids)
    growth, moments = grown(tokenizer, ids, reading, [])
    assert growth.text == whole
    assert not growth.stopped
    for moment in moments:
        assert whole.startswith(moment) if reading == "forward" else whole.endswith(moment)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reading", READINGS)
def test_a_character_is_shown_as_soon_as_its_last_byte_is_there(text: str, reading: str) -> None:
    """Nothing is held back but the bytes of one character."""
    _, moments = grown(BYTES, list(text.encode()), reading, [])
    ends = {len(text[:n].encode()): n for n in range(len(text) + 1)}
    size = len(text.encode())
    for count, moment in enumerate(moments[:-1], start=1):
        whole = max(n for end, n in ends.items() if end <= count)
        if reading == "backward":
            whole = max(len(text) - n for end, n in ends.items() if size - end <= count)
        assert len(moment) == whole


def test_bytes_that_are_no_character_by_hand() -> None:
    """Backward, bytes that continue a character wait for its first byte, at most three of them."""
    _, moments = grown(BYTES, [0x61, 0x80, 0x80, 0x80, 0x80, 0x62], "backward", [])
    assert moments == ["b", "b", "b", "b", "�b", "a����b", "a����b"]
    _, moments = grown(BYTES, [0xE6, 0x9D, 0xB1], "backward", [])
    assert moments == ["", "", "東", "東"]
    _, moments = grown(BYTES, [0xE6, 0x9D], "forward", [])
    assert moments == ["", "", "�"]


# ---- stop texts ----


@pytest.mark.parametrize(
    ("text", "reading", "stops", "kept"),
    [
        ("one\n\ntwo", "forward", ["\n\n"], "one"),
        ("one\n\ntwo\n\nthree", "backward", ["\n\n"], "three"),
        ("aab", "forward", ["ab"], "a"),
        ("abb", "backward", ["ab"], "b"),
        ("ababac", "forward", ["abac"], "ab"),
        ("cabaab", "backward", ["caba"], "ab"),
        ("xabcdy", "forward", ["bc", "abcd"], "xa"),  # complete first, however long its tokens are
        ("xabcdy", "backward", ["bc", "abcd"], "dy"),
        ("xabcy", "forward", ["bc", "abc"], "x"),  # of two that are complete at once the longer one
        ("xabcy", "backward", ["ab", "abc"], "y"),
        ("abab", "forward", ["ba", "abab"], "a"),
        ("abab", "backward", ["ba", "abab"], "b"),
        ("日本の東京", "forward", ["の東"], "日本"),
        ("日本の東京", "backward", ["本の"], "東京"),
        ("stop", "forward", ["stop"], ""),
        ("stop", "backward", ["stop"], ""),
        ("sto", "forward", ["stop"], "sto"),
        ("top", "backward", ["stop"], "top"),
        ("abc", "forward", [""], "abc"),
    ],
)
def test_stop_texts_by_hand(tokenizer: Tokenizer, text: str, reading: str, stops: list[str], kept: str) -> None:
    assert cut_by_hand(text, reading, stops) == kept
    for one in (BYTES, tokenizer, MERGED):
        growth, _ = grown(one, one.encode(text).tolist(), reading, stops)
        assert (growth.text, growth.stopped) == (kept, kept != text)


@law
@given(st.text("ab東\n", max_size=14), st.lists(st.text("ab東\n", max_size=4), max_size=3), st.sampled_from(READINGS))
def test_no_part_of_a_stop_text_is_ever_shown(tokenizer: Tokenizer, text: str, stops: list[str], reading: str) -> None:
    """The text ends where it would if it came one character at a time, and at no moment shows more than that."""
    kept = cut_by_hand(text, reading, stops)
    for one in (BYTES, tokenizer, MERGED):
        growth, moments = grown(one, one.encode(text).tolist(), reading, stops)
        assert growth.text == kept
        assert growth.stopped == (kept != text)
        for moment in moments:
            assert kept.startswith(moment) if reading == "forward" else kept.endswith(moment)


MERGED = Tokenizer(
    {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"ba": 257, b"abab": 258, b"aab": 259, b"abb": 260}
)
"""Tokens that hold whole stop texts, so that several come at once."""


def test_nothing_is_added_after_a_stop() -> None:
    growth = TextGrowth(BYTES, "forward", ["b"])
    assert [growth.add(id) for id in b"abac"] == ["a", "", "", ""]
    assert (growth.text, growth.close(), growth.stopped) == ("a", "", True)


def test_a_stop_text_of_broken_bytes_is_found_at_the_end() -> None:
    growth = TextGrowth(BYTES, "forward", ["�"])
    assert [growth.add(id) for id in b"a\xe6"] == ["a", ""]
    assert (growth.close(), growth.stopped, growth.text) == ("", True, "a")
