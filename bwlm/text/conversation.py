"""Conversations: checked, rendered to token ids, laid out in a direction, with their loss mask.

Rendered, in reading order and without BOS, a conversation is

    <|user_start|> .. <|user_end|> <|assistant_start|> .. <|assistant_end|> <|user_start|> ..

A direction lays that out as it does any text (`direction.py`), and `reversal` says what it turns around: `whole` the
conversation as one, markers too, so that a model that reads backward is given an ending and writes what came before;
`turns` the text of each message, whose order stays, so that it answers too, each answer from its end. What a model is
trained to write follows from the ids alone, so that training, evaluation, RL and chat cannot disagree about it.

Axes: S segments, N tokens, P parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Reversal
from bwlm.directions import READINGS, is_marked
from bwlm.errors import UserError, nearest
from bwlm.text.direction import BACKWARD, Ints, Layout, Rows, arrange, is_mirrored, restore
from bwlm.text.tokenizer import Tokenizer

Role = Literal["user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
_KNOWN = ("system", *ROLES)

TokenIds = NDArray[np.uint32]


class Message(NamedTuple):
    role: Role
    content: str


Conversation = list[Message]


@dataclass(frozen=True)
class TurnIds:
    """Ids of the special tokens around messages."""

    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> TurnIds:
        return cls(*(tokenizer.specials[f"<|{role}_{edge}|>"] for role in ROLES for edge in ("start", "end")))

    def around(self, role: Role) -> tuple[int, int]:
        """(start, end)"""
        return (self.user_start, self.user_end) if role == "user" else (self.assistant_start, self.assistant_end)

    def markers(self, tokens: Ints) -> NDArray[np.bool_]:
        """[N] true where a token is one of these."""
        return np.isin(tokens, astuple(self))


# ---- checking ----


def check_conversation(messages: Any, where: str) -> Conversation:
    """The messages of a conversation from a file: user and assistant in turn, from the first to the last.

    A system message may come first and becomes the beginning of what the user says, as in nanochat. Raises `UserError`
    that begins with `where` (file and row) and names the message, its field and the fix.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserError(f"{where}: messages: not a list of messages but {_kind(messages)}")
    checked = [_message(message, f"{where}: messages[{index}]") for index, message in enumerate(messages)]
    if checked and checked[0][0] == "system":
        checked = _joined_system(checked, where)
    conversation = [Message(role, content) for role, content in checked]  # type: ignore[arg-type]
    check_turns(conversation, where)
    if not conversation:
        raise UserError(f"{where}: messages: empty: give a question and an answer at least")
    if conversation[0].role != "user" or conversation[-1].role != "assistant":
        raise UserError(
            f"{where}: messages: from {conversation[0].role} to {conversation[-1].role}: "
            "a conversation begins with the user and ends with the assistant"
        )
    return conversation


def check_turns(conversation: Conversation, where: str) -> None:
    """Raises `UserError` where one role speaks twice in a row."""
    for index, (before, after) in enumerate(itertools.pairwise(conversation), start=1):
        if before.role == after.role:
            raise UserError(
                f"{where}: messages[{index}].role: {after.role} again: join the two, or put in what is missing"
            )


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: not an object with role and content but {_kind(message)}")
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise UserError(f"{where}.{name}: must be a text, not {_kind(message.get(name))}")
    role, content = message["role"], message["content"]
    if role not in _KNOWN:
        raise UserError(f"{where}.role: {role[:40]!r} is not one of {', '.join(_KNOWN)}{nearest(role, _KNOWN)}")
    if not content.strip():
        raise UserError(f"{where}.content: empty: write it or take the conversation out")
    return role, content


def _joined_system(checked: list[tuple[str, str]], where: str) -> list[tuple[str, str]]:
    if len(checked) < 2 or checked[1][0] != "user":
        raise UserError(f"{where}: messages[1].role: after a system message comes the user's")
    return [("user", f"{checked[0][1]}\n\n{checked[1][1]}"), *checked[2:]]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# ---- rendering ----


def render(conversation: Conversation, tokenizer: Tokenizer) -> TokenIds:
    """Its ids in reading order, without BOS. Whatever is in a message is ordinary text there."""
    turns = TurnIds.from_tokenizer(tokenizer)
    parts: list[TokenIds] = []
    for role, content in conversation:
        start, end = turns.around(role)
        parts += [np.array([start], np.uint32), tokenizer.encode(content), np.array([end], np.uint32)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def read_back(ids: Ints, tokenizer: Tokenizer) -> Conversation | None:
    """Inverse of `render`; None for a piece of a conversation, or one that was cut."""
    turns = TurnIds.from_tokenizer(tokenizer)
    edges = np.flatnonzero(turns.markers(ids)).tolist()
    conversation = [
        Message(ROLES[index % 2], tokenizer.decode(ids[start + 1 : end]))  # type: ignore[arg-type]
        for index, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    expected = [edge for message in conversation for edge in turns.around(message.role)]
    whole = bool(conversation) and len(conversation) % 2 == 0 and edges[0] == 0 and edges[-1] == len(ids) - 1
    return conversation if whole and ids[edges].tolist() == expected else None


def cut_to(ids: TokenIds, room: int, turns: TurnIds) -> TokenIds | None:
    """A rendered conversation in at most `room` tokens, or None where too little of it fits.

    It ends after the last answer that fits whole. Where even the first does not, it loses the end of that one with its
    end marker: nothing then says that it ended there. A first question that fills the room leaves nothing to learn.
    """
    if len(ids) <= room:
        return ids
    kept = ids[:room]
    ends = np.flatnonzero(kept == turns.assistant_end)
    if len(ends):
        return kept[: ends[-1] + 1]
    return kept if (kept[:-1] == turns.assistant_start).any() else None


# ---- what is turned around, and what is written ----


def parts_of(tokens: Ints, lengths: Ints, turns: TurnIds) -> Ints:
    """[P] lengths of what `turns` turns around, in segments of these lengths: each marker, each text between two."""
    begins = turns.markers(tokens)
    begins[1:] |= begins[:-1].copy()
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return np.diff(np.append(np.flatnonzero(begins), len(tokens)))


def predicts_user_turn(reading: str, reversal: Reversal) -> bool:
    """Whether a model of that reading writes what the user says, given what follows, instead of answering."""
    return is_mirrored(reading, reversal)


def loss_mask(tokens: Ints, lengths: Ints, reading: Ints, reversal: Reversal, turns: TurnIds) -> NDArray[np.bool_]:
    """[N] true where a token is one that the model writes: the text of its role, and the marker that closes it.

    Tokens in reading order, segment after segment; `reading` [S]. Who answers writes the assistant's text and
    `<|assistant_end|>`; who asks, which is a model that reads a whole conversation backward, the user's text and
    `<|user_start|>`, which comes last there. An answer whose end was cut off, read from there, does not begin with
    what an answer ends with: that token is none.
    """
    marker = turns.markers(tokens)
    place = np.arange(len(tokens))
    last = np.maximum.accumulate(np.where(marker, place, -1))
    known = last >= np.repeat(np.cumsum(lengths) - lengths, lengths)
    opened = np.where(known, tokens[last], -1)
    answer = (~marker & (opened == turns.assistant_start)) | (tokens == turns.assistant_end)
    question = (~marker & (opened == turns.user_start)) | (tokens == turns.user_start)
    asking = np.repeat((reading == BACKWARD) & (reversal == "whole"), lengths)
    mask: NDArray[np.bool_] = np.where(asking, question, answer)
    if reversal == "turns":
        ends = np.cumsum(lengths)[(reading == BACKWARD) & (lengths > 0)] - 1
        mask[ends[~marker[ends]]] = False
    return mask


@dataclass(frozen=True)
class TurnLayout:
    """What the rows of conversations need that those of documents do not; see `lay_out`."""

    turns: TurnIds
    reversal: Reversal
    supervised: bool
    """Whether only what is written is a target; else everything is, as in documents."""


def row_layout(name: str, rows: Rows, reading: Ints, turns: TurnLayout | None) -> Layout:
    """Return the layout of rows of conversations, or without `turns` of documents.

    `name` is the direction of training, or the reading of an evaluation; `reading` [S] is that of each segment.
    """
    if turns is None:
        return Layout(is_mirrored(name))
    by_turns = turns.reversal == "turns"
    return Layout(
        is_mirrored(name, turns.reversal),
        parts_of(rows.tokens, rows.lengths, turns.turns) if by_turns else None,
        loss_mask(rows.tokens, rows.lengths, reading, turns.reversal, turns.turns) if turns.supervised else None,
    )


# ---- what a model is given, and gives back ----


class Prompt(NamedTuple):
    """What a model reads before it writes a message."""

    ids: list[int]
    stop: int
    """The marker that closes the message."""


def build_prompt(
    conversation: Conversation, reading: str, direction: str, reversal: Reversal, tokenizer: Tokenizer
) -> Prompt:
    """For a model of `direction` that reads in `reading`.

    Who answers is given a conversation that ends with the user; who asks, one that begins with the assistant. Raises
    `UserError` for another one.
    """
    turns, asking = TurnIds.from_tokenizer(tokenizer), predicts_user_turn(reading, reversal)
    check_turns(conversation, "conversation")
    edge, role = (0, "assistant") if asking else (-1, "user")
    if not conversation or conversation[edge].role != role:
        raise UserError(f"conversation: must {'begin' if asking else 'end'} with the {role}: add what is missing")
    if asking:
        ids, stop = np.append(np.uint32(turns.user_end), render(conversation, tokenizer)), turns.user_start
    else:
        ids, stop = np.append(render(conversation, tokenizer), np.uint32(turns.assistant_start)), turns.assistant_end
    head = [tokenizer.bos]
    if is_marked(direction):
        head.append(tokenizer.forward if reading == "forward" else tokenizer.backward)
    return Prompt(head + arrange_conversation(ids.astype(np.int64), reading, reversal, turns).tolist(), stop)


def arrange_conversation(tokens: Ints, reading: str, reversal: Reversal, turns: TurnIds) -> Ints:
    """One conversation's tokens in the order in which a model reads them."""
    return arrange(tokens, reading, len(tokens), _parts(tokens, reversal, turns))


def restore_conversation(arranged: Ints, reading: str, reversal: Reversal, turns: TurnIds) -> Ints:
    """Inverse of `arrange_conversation`: back in reading order."""
    return restore(arranged, reading, len(arranged), _parts(arranged, reversal, turns))


def _parts(tokens: Ints, reversal: Reversal, turns: TurnIds) -> Ints | None:
    return parts_of(tokens, np.array([len(tokens)]), turns) if reversal == "turns" else None


def read_message(written_ids: Sequence[int], reading: str, tokenizer: Tokenizer) -> str:
    """The text of a message that a model wrote, put back in reading order; its closing marker is left out."""
    assert reading in READINGS
    specials = set(tokenizer.specials.values())
    text = np.array([token for token in written_ids if token not in specials], dtype=np.int64)
    return tokenizer.decode(restore(text, reading, len(text)))
